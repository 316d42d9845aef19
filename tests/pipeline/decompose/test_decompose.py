"""A decomposition from its stores to its run folder: planted truth, resumption to the bit, kills, what it leaves."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.harvesting import harvest
from support.killing import killed_at
from support.small_models import BEGIN, CONTEXT, made_up, plain_model, save_model, small_stages, token_store
from support.small_runs import stop_at
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import DECOMPOSITION, WEIGHTS, Run
from sae.cache.tokens import TokenStore
from sae.pipeline.decompose import folder, opening, plots
from sae.pipeline.decompose.config import LiveConfig, LocalConfig, ToyConfig
from sae.pipeline.decompose.contexts import Contexts
from sae.pipeline.decompose.losses import faithfulness
from sae.pipeline.decompose.stage import decompose
from sae.pipeline.decompose.subjects import Clean, Counted, Feed, LiveModel, LocalMLP, Subject
from sae.pipeline.decompose.training import Training
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.matrices import Product
from sae.pipeline.runtime.interrupts import Interrupted
from sae.pipeline.runtime.progress import Progress, Silent
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.saes.contract import generator_of
from sae.session import Session

SMALL: dict[str, Any] = {
    "components": 6,
    "gate_hidden": 4,
    "warmup": 5,
    "log_every": 2,
    "checkpoint_every": 3,
    "judged": 2,
}
LOCAL = LocalConfig(**SMALL, batch=16, steps=8)
LIVE = LiveConfig(**SMALL, batch=2, steps=6, matrices=("1.mlp.*",), model="...")
TOY = ToyConfig(**SMALL | {"components": 5}, batch=32, steps=8, toy_steps=20, instances=2)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with small_stages():
        yield


@dataclass(frozen=True)
class World:
    """A small Llama, tokens, and what its second MLP read and gave."""

    root: Path
    model: Path
    tokens: TokenStore
    dataset: Dataset

    def place(self, runs: Path, progress: Progress | None = None) -> Workplace:
        return Workplace(self.root, runs, progress or Silent(), device="cpu", offline=True)

    def booted(self) -> LanguageModel:
        return LanguageModel.boot(str(self.model))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small: None) -> World:
    root = tmp_path_factory.mktemp("cache")
    model = save_model("llama", tmp_path_factory.mktemp("model"))
    lengths = np.full(12, CONTEXT)
    lengths[::3] = 5
    held_out = made_up(12, seed=2)
    held_out[::3, 5:] = BEGIN
    tokens = token_store(root, made_up(40, seed=1), packing="document")
    token_store(root, held_out, lengths, packing="document", split="validation")
    config = HarvestConfig(model=str(model), layer=(1,), site=("mlp_in", "mlp_out"), codec="float32")
    stores = [tokens, token_store(root, held_out, lengths, packing="document", split="validation")]
    reads, writes = harvest(config, stores, root, Silent()).stores["train"]
    return World(root, model, tokens, Dataset.of(reads, writes))


def opened(world: World, kind: str, runs: Path, progress: Progress | None = None) -> opening.Opened:
    place = world.place(runs, progress)
    if kind == "local":
        return opening.local(LOCAL, world.dataset, place)
    if kind == "live":
        return opening.live(LIVE.model_copy(update={"model": str(world.model)}), world.tokens, place)
    return opening.toy(TOY, place)


def begun(world: World, kind: str, runs: Path, *, resume: bool = False, progress: Progress | None = None) -> Run:
    """Train a decomposition called `one`, or continue it."""
    found = opened(world, kind, runs, progress)
    run = folder.open_run(found.config, found.about, runs, "one", resume=resume)
    decompose(run, found.config, found.opener, progress or Silent())
    return run


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return left(begun(world, "local", tmp_path_factory.mktemp("runs")))


def left(run: Run) -> dict[str, Any]:
    """All that a run leaves, bit for bit, but for the seconds it took."""
    found: dict[str, Any] = {
        name: (run.path / name).read_bytes() for name in ("config.json", "cfg.json", WEIGHTS, DECOMPOSITION)
    }
    tensors, state = run.load_checkpoint()
    found |= {name: tensor.numpy().tobytes() for name, tensor in tensors.items()} | {"state": state}
    return found | {"metrics": [{k: v for k, v in entry.items() if k != "seconds"} for entry in run.metrics()]}


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, which take longer than the small trainings."""
    monkeypatch.setattr(plots, "draw", lambda *_: None)


@pytest.mark.parametrize("kind", ["local", "live", "toy"])
def test_a_resumed_run_is_one_that_was_never_stopped(world: World, tmp_path: Path, undrawn: None, kind: str) -> None:
    whole = left(begun(world, kind, tmp_path / "whole"))
    steps = 4 + (TOY.toy_steps if kind == "toy" else 0)  # which train the toys
    with pytest.raises(Interrupted, match="checkpoint at step 4"):
        begun(world, kind, tmp_path / "parts", progress=stop_at(steps))
    assert left(begun(world, kind, tmp_path / "parts", resume=True)) == whole


@pytest.mark.parametrize("files", range(1, 11))
def test_a_kill_at_any_file_loses_nothing(
    world: World, tmp_path: Path, undrawn: None, whole: dict[str, Any], files: int
) -> None:
    """Between two files that are put in their places: a folder, checkpoints, the weights, what was found."""
    with killed_at(files, "replace") as came:
        begun(world, "local", tmp_path)
    assert came == [True]
    assert left(begun(world, "local", tmp_path, resume=True)) == whole


@pytest.mark.parametrize("kind", ["local", "live", "toy"])
def test_what_a_run_says(world: World, tmp_path: Path, kind: str) -> None:
    found = folder.figures(run := begun(world, kind, tmp_path))
    assert found is not None and (run.path / "eval" / "components.png").stat().st_size > 1000
    key = {"local": "fvu", "live": "kl", "toy": "mse"}[kind]
    assert found["itself"][key] == pytest.approx(0, abs=1e-9)
    assert min(found[name][key] for name in ("unmasked", "ci_masked", "rounded", "stochastic", "nothing")) > 0
    for one in found["matrices"].values():
        assert 0 <= one["ci_l0"] <= one["alive"] <= found["components"] and one["ci_l0"] <= one["ci_l0_above_0"]
    if kind == "live":
        assert found["itself"]["ce"] < 20 and found["nothing"]["ce"] != found["itself"]["ce"]
        assert {*found["matrices"]} == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    loaded = folder.load(run)
    assert faithfulness(loaded.parts.values()).item() / (2 if kind == "toy" else 1) == pytest.approx(
        found["faithfulness"]
    )
    assert run.check() == []
    again = opening.again(run, world.place(tmp_path))
    assert again.config == folder.settings_of(run)
    assert decompose(run, again.config, again.opener, Silent()) == found  # nothing is done twice


@pytest.mark.parametrize("tied", [True, False])
def test_a_toys_second_matrix_has_the_firsts_components_or_its_own(
    world: World, tmp_path: Path, undrawn: None, tied: bool
) -> None:
    config = TOY.model_copy(update={"tied": tied})
    found = opening.toy(config, world.place(tmp_path))
    run = folder.open_run(config, found.about, tmp_path, "one", resume=False)
    decompose(run, config, found.opener, Silent())
    loaded = folder.load(run)
    one, other = (loaded.parts[name].factors() for name in ("in", "out"))
    assert (one[0].equal(other[1].mT) and one[1].equal(other[0].mT)) == tied
    assert ("out.V" in run.load_weights()[0]) == (not tied)


def test_a_toy_of_before_had_components_for_each_matrix(world: World, tmp_path: Path, undrawn: None) -> None:
    """Its settings do not say `tied` or how fast what learns: it is read, and continued, as it was begun."""
    config = TOY.model_copy(update={"tied": False, "factor_rate": 1.0})
    found = opening.toy(config, world.place(tmp_path))
    said = config.model_dump(mode="json")
    assert (said.pop("tied"), said.pop("factor_rate")) == (False, 1.0)
    run = Run.create(tmp_path / "one", {"decompose": said, **found.about})
    with pytest.raises(Interrupted):
        decompose(run, config, found.opener, stop_at(4))
    run = folder.open_run(config, found.about, tmp_path, "one", resume=True)
    again = opening.again(run, world.place(tmp_path))
    assert again.config == config
    decompose(run, again.config, again.opener, Silent())
    assert "out.V" in run.load_weights()[0] and folder.load(run).parts["out"].factors()[0].shape == (2, 2, 5)
    with pytest.raises(SaeError, match=r"other settings \(factor_rate, tied\)"):
        folder.open_run(TOY, found.about, tmp_path, "one", resume=True)


def test_a_session_decomposes(world: World, tmp_path: Path, undrawn: None) -> None:
    lab = Session(world.root, tmp_path, device="cpu", offline=True, progress=False)
    stores = world.dataset.inputs[0].key, world.dataset.targets[0].key
    run = lab.decompose(*stores, batch=16, steps=2, **SMALL)
    assert {*run.load().parts} == {*run.figures()["matrices"]} and run.history()[-1]["step"] == 2
    assert lab.decompose(*stores, batch=16, steps=2, **SMALL).path == run.path
    live = {"tokens_from": world.tokens, "matrices": ["1.mlp.up_proj"], "batch": 2, "steps": 2, **SMALL}
    by_name = lab.decompose(kind="live", model=str(world.model), **live)
    assert lab.decompose(kind="live", model=world.booted(), name="booted", **live).figures() == by_name.figures()
    with pytest.raises(SaeError, match="model = nowhere"):
        lab.decompose(kind="live", model="nowhere", **live)
    with pytest.raises(SaeError, match="decomposition of weights, no dictionary"):
        lab.evaluate(run.name)
    with pytest.raises(SaeError, match="decomposition of weights, no dictionary"):
        lab.load(run.name)
    local, *_ = rows = lab.compare()
    assert {row["sae.arch"] for row in rows} == {"spd"} and [row["kind"] for row in rows] == ["local", "live", "live"]
    said = run.figures()
    assert (local["fvu"], local["l0"]) == (
        said["rounded"]["fvu"], pytest.approx(sum(one["ci_l0"] for one in said["matrices"].values())),
    )  # fmt: skip
    assert local["active_parameters"] <= sum(6 * sum(one["shape"]) for one in said["matrices"].values())
    assert 0 <= local["bits"] <= 6 * len(said["matrices"]) and local["ce_degradation"] is None
    assert rows[1]["ce_degradation"] == pytest.approx(
        by_name.figures()["rounded"]["ce"] - by_name.figures()["itself"]["ce"]
    )


def test_a_figure_that_was_lost_is_found_again(world: World, tmp_path: Path) -> None:
    run = begun(world, "toy", tmp_path)
    before = (run.path / DECOMPOSITION).read_bytes()
    (run.path / DECOMPOSITION).unlink()
    begun(world, "toy", tmp_path, resume=True)
    assert (run.path / DECOMPOSITION).read_bytes() == before


def test_all_components_at_once_are_the_model_and_their_products_are_its_own(world: World) -> None:
    """With W itself among the components the masked pass gives what the plain model gives, to rounding."""
    model = world.booted()
    subject = LiveModel(("1.mlp.*",), 2, 0, model, world.tokens, world.tokens, 8)
    ids = torch.from_numpy(world.tokens.contexts(0, 2))
    own = plain_model(world.model)(ids).logits
    exact: dict[str, Product] = {name: (lambda x, w=w: x @ w.T) for name, w in subject.matrices.items()}
    torch.testing.assert_close(model.logits(ids, exact), own, rtol=1e-4, atol=1e-4)
    local = LocalMLP(LOCAL, world.dataset, model)
    assert local.matrices.keys() == subject.matrices.keys()
    rows = world.dataset.sample(50)
    torch.testing.assert_close(local.predict(rows.x, {}), rows.y, rtol=1e-4, atol=1e-4)


def test_kl_and_cross_entropy_count_real_tokens_alone(world: World) -> None:
    """Against the plain model with its weights changed."""
    held_out = opened(world, "live", world.root / "none").opener({})
    batch = next(iter(held_out.batches(held_out=True)))
    batch = batch._replace(lengths=torch.tensor([5, CONTEXT]))
    name = "model.layers.1.mlp.up_proj"
    found = held_out.clean(batch).measured({name: lambda x: 0.5 * (x @ held_out.matrices[name].T)})
    model = plain_model(world.model)
    before = model(batch.tokens).logits.log_softmax(-1)
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(0.5)
    after = model(batch.tokens).logits.log_softmax(-1)
    pairs = [(i, t) for i, n in enumerate(batch.lengths.tolist()) for t in range(n)]
    kl = [(before[i, t].exp() * (before[i, t] - after[i, t])).sum() for i, t in pairs]
    ce = [-after[i, t - 1, batch.tokens[i, t]] for i, t in pairs if t]
    assert found["kl"].item() == pytest.approx(torch.stack(kl).mean().item(), rel=1e-3)
    assert found["ce"].item() == pytest.approx(torch.stack(ce).mean().item(), rel=1e-4)


def test_every_context_comes_once_a_pass_and_its_place_is_all_the_state(world: World) -> None:
    order = Contexts(world.tokens, 37, seed=3)
    tokens = world.tokens.contexts(0, 37)
    for epoch in (0, 1):
        seen = order.batch(epoch * 37, 37).tokens.numpy()
        assert sorted(map(bytes, seen)) == sorted(map(bytes, tokens)) and not (seen == tokens).all()
    parts = [order.batch(start, 5).tokens for start in range(0, 75, 5)]
    assert torch.cat(parts).equal(torch.cat([order.batch(0, 37).tokens, order.batch(37, 38).tokens]))
    assert not order.batch(0, 37).tokens.equal(order.batch(37, 37).tokens)
    assert not order.batch(0, 37).tokens.equal(Contexts(world.tokens, 37, seed=4).batch(0, 37).tokens)


class Mechanisms(Subject):
    """y = sum_k on_k u_k: a matrix that is a known sum of rank-one mechanisms, of which few are used at a time."""

    unit = "rows"

    def __init__(self, d: int, count: int) -> None:
        random = generator_of(0, "mechanisms", 0)
        self.reads = torch.linalg.qr(torch.randn(d, d, generator=random)).Q[:count]
        self.writes = torch.nn.functional.normalize(torch.randn(count, d, generator=random), dim=1)
        self.matrices = {"only": self.writes.T @ self.reads}

    def batches(self, held_out: bool = False) -> Feed:
        def batch(number: int) -> Tensor:
            random = generator_of(1, "rows", number)
            on = torch.rand(256, len(self.reads), generator=random) < 0.15
            return (on * torch.rand(on.shape, generator=random)) @ self.reads

        return Counted(batch)

    def clean(self, batch: Tensor) -> Clean:
        y = batch @ self.matrices["only"].T

        def measured(products: Mapping[str, Product]) -> dict[str, Tensor]:
            new = products["only"](batch)
            assert new is not None
            return {"mse": (new - y).square().mean()}

        return Clean({"only": batch}, None, measured)


@pytest.mark.slow
def test_few_components_are_on_for_a_planted_mechanism() -> None:
    """One for most, two for some: so many steps do not part all that share one."""
    subject = Mechanisms(d=8, count=5)
    settings = {"components": 10, "batch": 256, "steps": 2500, "lr": 4e-3, "importance": 1e-3, "delta": False}
    training = Training(LocalConfig(**settings), subject)
    training.warm_up()
    feed = iter(subject.batches())
    for step in range(2500):
        training.step(next(feed), step)
    part = training.decomposition.parts["only"]
    with torch.no_grad():
        active = part.importance(0.75 * subject.reads) > 0.1  # [mechanism, C]
        assert ((active.sum(1) >= 1) & (active.sum(1) <= 2)).all() and (active.sum(1) == 1).sum() >= 3
