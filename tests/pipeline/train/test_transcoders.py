"""Transcoders: any architecture trained from one store to another, and all that goes with a run."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import sae
from support.saes_kit import DICTIONARIES
from support.small_stores import CHUNK, activation_recipe, extend, shrunk
from torch import Tensor

from sae.cache import activations
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batches
from sae.cache.metrics_log import METRICS
from sae.cache.runs import CONFIG, Run
from sae.cache.store.manifest import Windows
from sae.pipeline.formats import saelens, trained
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import SAE, create, parse
from sae.pipeline.train.stage import TrainConfig, open_run, run_name, train
from sae.pipeline.train.sweep import open_each, sweep_each

D, OUT, D_SAE, ROWS = 12, 9, 24, 1024
COST = ("seconds", "seconds_per_step", "megabytes")
SMALL: dict[str, dict[str, Any]] = {
    "topk": {"k": 4}, "batchtopk": {"k": 4}, "matryoshka": {"k": 4}, "crosscoder": {"k": 4},
    "jumprelu": {"target_l0": 4.0, "coefficient": 0.1},
}  # fmt: skip
REVIVALS = [{"kind": "resample", "every": 5, "rows": 256}, {"kind": "reinitialise", "every": 5, "threshold": 0.01}]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with shrunk():
        yield
    torch.set_num_threads(threads)


def read_and_written(n: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [n, D] away from the origin, and what a layer of sorts makes of them [n, OUT]."""
    random = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, D, generator=random).relu() + 1
    mixing = torch.randn(D, OUT, generator=torch.Generator().manual_seed(5))
    return x, 10 * (x @ mixing).relu() - 2


def written(
    root: Path, rows: Tensor, site: str, *, ended: bool = True, changes: dict[str, Any] | None = None
) -> ActivationStore:
    full = activation_recipe(rows.shape[1], "float32", site=site) | (changes or {})
    with ActivationWriter(root, f"planted-1.{site}", full) as writer:
        extend(writer, rows, ended=ended)
        return writer.store


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, small: None) -> tuple[ActivationStore, ActivationStore]:
    root = tmp_path_factory.mktemp("cache")
    x, y = read_and_written()
    return written(root, x, "mlp_in"), written(root, y, "mlp_out")


@pytest.fixture
def dataset(pair: tuple[ActivationStore, ActivationStore]) -> Dataset:
    return Dataset.of(*pair)


def settings(arch: str = "topk", **changes: Any) -> TrainConfig:
    given = {"lr": 1e-2, "batch": 64, "steps": 24, "log_every": 4, "checkpoint_every": 100, "initial_rows": 512}
    described = {"arch": arch, "d_sae": D_SAE, "dead_after": 200, **SMALL.get(arch, {})}
    return TrainConfig(**{"sae": parse(described), "decoder": None, **given, **changes})


def stop_at(step: int) -> Silent:
    class Stopping(Silent):
        left = step

        def advance(self, n: int, **fields: object) -> None:
            self.left -= n
            if not self.left:
                signal.raise_signal(signal.SIGINT)

    return Stopping()


def go(
    config: TrainConfig, dataset: Dataset, root: Path, *, resume: bool = False, progress: Silent | None = None
) -> Run:
    run = open_run(config, dataset, root, "it", resume=resume)
    train([run], dataset, progress or Silent(), device="cpu")
    return run


def outcome(run: Run) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    metrics = [{name: value for name, value in line.items() if name not in COST} for line in run.metrics()]
    return run.load_weights()[0] | run.load_checkpoint()[0], metrics


@pytest.mark.parametrize(("arch", "skip"), [*((arch, False) for arch in DICTIONARIES), ("topk", True)])
def test_every_architecture_learns_the_target_and_is_resumed_to_the_bit(
    tmp_path: Path, dataset: Dataset, arch: str, skip: bool
) -> None:
    config = settings(arch, revive=REVIVALS[0])
    config = config.model_copy(update={"sae": config.sae.model_copy(update={"skip": skip})})
    run = go(config, dataset, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(config, dataset, tmp_path / "parts", progress=stop_at(7))
    (weights, metrics), (again, its) = outcome(run), outcome(go(config, dataset, tmp_path / "parts", resume=True))
    assert metrics == its and weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    found, batch = trained.load_run(run), dataset.rows(0, 256)
    assert found.is_transcoder and (found.d_in, found.d_out) == (D, OUT) and not found.b_dec_applied_to_input
    assert metrics[-1]["fvu"] < metrics[0]["fvu"]
    error = (batch.y - found(batch.x)).square().sum() / (batch.y - batch.y.mean(0)).square().sum()
    assert error < 0.9 * metrics[0]["fvu"]


def test_a_step_is_that_of_the_same_numbers_written_out(tmp_path: Path, dataset: Dataset) -> None:
    config = settings(warmup=0, decay=0, clip=None)
    run = go(config, dataset, tmp_path)
    x, y = dataset.inputs[0], dataset.targets[0]
    made = create(config.sae, D, OUT, seed=0)
    made.initialise(x.rows(0, 512), y.rows(0, 512))
    optimiser = torch.optim.Adam(made.parameters(), lr=config.lr, betas=config.decay_rates, fused=True)
    numbers = {row: n for n, row in enumerate(map(tuple, x.rows(0, ROWS).tolist()))}
    with Batches([x], [], 64, seed=0) as order:
        for step, batch in zip(range(24), order, strict=False):
            target = y.rows(0, ROWS)[[numbers[row] for row in map(tuple, batch.x.tolist())]]
            losses = made.loss(batch.x, target, trained_clock(step, 24))
            optimiser.zero_grad()
            losses.total.backward()
            made.before_step()
            optimiser.step()
            made.after_step()
            made.track(made.observe(losses))
    expected = made.fold()
    tensors, _ = run.load_weights()
    torch.testing.assert_close(tensors["W_dec"], expected.W_dec.detach(), rtol=1e-4, atol=1e-5)


def trained_clock(step: int, steps: int) -> Any:
    from sae.pipeline.saes import Clock

    return Clock(step, steps, 32)


@pytest.mark.parametrize("revive", REVIVALS, ids=lambda one: one["kind"])
def test_what_revives_latents_looks_at_the_target(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, revive: dict[str, Any]
) -> None:
    """Every row that any method is given beside an input is that input's own."""
    known = {tuple(x.tolist()): y for x, y in zip(*dataset.rows(0, ROWS)[:2], strict=True)}
    seen = {"initialise": 0, "loss": 0, "directions": 0}
    for name in seen:
        method = getattr(SAE, name)

        def watched(self: SAE, x: Tensor, y: Tensor | None = None, *more: Any, m: Any = method, n: str = name) -> Any:
            assert y is not None and all(torch.equal(known[tuple(a.tolist())], b) for a, b in zip(x, y, strict=True))
            seen[n] += 1
            return m(self, x, y, *more)

        monkeypatch.setattr(SAE, name, watched)
    described = settings().sae.model_dump() | {"dead_after": 70}
    go(settings(revive=revive, sae=parse(described)), dataset, tmp_path)
    assert seen["loss"] >= 24
    assert seen["directions"] > 0 if revive["kind"] == "resample" else seen["initialise"] > 1


def test_a_run_says_what_it_reads_and_what_it_writes(tmp_path: Path, dataset: Dataset) -> None:
    config = settings()
    name = run_name(config, dataset)
    assert name.startswith("topk-24-k4-lr0.01-s0-1.mlp_in-to-1.mlp_out-")
    backwards = Dataset.of(dataset.targets, dataset.inputs)
    alone = Dataset.of(dataset.inputs)
    assert len({run_name(config, each) for each in (dataset, backwards, alone)}) == 3
    run = go(config, dataset, tmp_path)
    said = run.read_json(CONFIG)
    assert said["activations"]["key"] == dataset.inputs[0].key and said["activations"]["rows"] == ROWS
    assert said["targets"] == [{"key": dataset.targets[0].key, "recipe": dataset.targets[0].recipe}]
    assert Run(run.path).seen == run.seen and run.seen.recipes == dataset.recipes
    _, cfg = run.load_weights()
    assert cfg["architecture"] == "topk_transcoder" and (cfg["d_in"], cfg["d_out"]) == (D, OUT)
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_mlp_in"
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    assert saelens.formula_of(*run.load_weights()).transcoder
    with pytest.raises(SaeError, match=r"it was started with other settings \(target\)"):
        open_run(config, alone, tmp_path, "it", resume=True)
    with pytest.raises(SaeError, match=r"it: is for 1,024 rows of .*mlp_in.* -> .*mlp_out.*, not 1,024 of"):
        train([run], backwards, Silent(), device="cpu")


def test_a_target_that_is_damaged_in_the_settings_is_named(tmp_path: Path, dataset: Dataset) -> None:
    run = open_run(settings(), dataset, tmp_path, "it", resume=False)
    said = run.read_json(CONFIG)
    for wrong in ("x", [3], [{"key": "../x", "recipe": {}}], [{**said["targets"][0], "largest_norm": "far"}]):
        run.write_json(CONFIG, {**said, "targets": wrong})
        with pytest.raises(SaeError, match=r"config\.json: is not what was written"):
            _ = Run(run.path).seen


def test_rows_that_lie_far_out_on_either_side_are_left_out(tmp_path: Path) -> None:
    x, y = read_and_written()
    x[5::100] *= 1000
    y[7::100] *= 1000
    far = Dataset.of(written(tmp_path, x, "mlp_in"), written(tmp_path, y, "mlp_out"))
    config = settings(outliers=10.0, steps=8)
    run = go(config, far, tmp_path / "runs")
    assert run.seen.limits is not None and len(run.seen.limits) == 2 and run.seen.limits == far.limits_by(10.0)
    kept = far.kept_up_to(run.seen.limits)
    with kept.batches(64, epochs=1) as loader:
        found = list(loader)
    norms = [torch.cat([getattr(one, side).norm(dim=1) for one in found]) for side in ("x", "y")]
    assert all(one.max() <= most * 1.01 for one, most in zip(norms, run.seen.limits, strict=True))
    gone = list(kept.left_out(ROWS, 50))
    assert (
        sum(len(one.x) for one in gone) + len(norms[0]) == ROWS
        and sum(len(one.x) for one in gone) == len(range(5, ROWS, 100)) * 2
    )
    assert Run(run.path).seen == run.seen


@pytest.mark.parametrize("side", [0, 1])
def test_massive_rows_of_one_side_are_left_out_of_both(tmp_path: Path, side: int) -> None:
    """The other side has no limit; a resumed training is the uninterrupted one."""
    rows = read_and_written()
    rows[side][5::100, 1] += 50 * rows[side].norm(dim=1).median()
    far = Dataset.of(written(tmp_path, rows[0], "mlp_in"), written(tmp_path, rows[1], "mlp_out"))
    straight = go(settings(), far, tmp_path / "straight")
    limits = straight.seen.limits
    assert limits is not None and limits[side] is not None and limits[1 - side] is None
    assert Run(straight.path).seen == straight.seen and trained.dataset_of(straight, tmp_path).limits == limits
    gone = sum(len(one.x) for one in far.kept_up_to(limits).left_out(ROWS, 50))
    assert gone == len(range(5, ROWS, 100))
    with pytest.raises(KeyboardInterrupt):
        go(settings(), far, tmp_path / "stopped", progress=stop_at(5))
    again = go(settings(), far, tmp_path / "stopped", resume=True)
    for one, other in zip(outcome(again)[0].values(), outcome(straight)[0].values(), strict=True):
        assert torch.equal(one, other)
    assert outcome(again)[1] == outcome(straight)[1]


def test_stores_that_do_not_align_are_one_line(tmp_path: Path, pair: tuple[ActivationStore, ActivationStore]) -> None:
    _, y = read_and_written()
    tokens = activation_recipe(seed=1)["tokens"]
    others = {
        "was made from other tokens than": written(tmp_path / "a", y, "mlp_out", changes={"tokens": tokens}),
        "by another rule which tokens become rows than": written(
            tmp_path / "b", y, "mlp_out", changes={"rows": {"skip_first": 2, "skip_begin": True}}
        ),
        r"has 960 rows, .* has 1,024; harvest more of it, or read the first 896 alone":
            written(tmp_path / "c", y[:960], "mlp_out", ended=False),
    }  # fmt: skip
    for says, target in others.items():
        with pytest.raises(SaeError, match=says):
            Dataset.of(pair[0], target)
    assert Dataset.of(pair[0], target, rows=896).n_rows == 896


def test_a_window_that_ended_early_is_in_another_order(tmp_path: Path) -> None:
    """Rows are permuted within their window, so two stores of one text align only where their windows are the same."""
    x, y = read_and_written(8 * CHUNK)
    whole, short = written(tmp_path, x, "mlp_in"), written(tmp_path, y[: 8 * CHUNK - 5], "mlp_out")
    assert short.closed and short.n_rows < whole.n_rows
    there = {*short.positions(0, short.n_rows)} == {*whole.positions(0, short.n_rows)}
    assert not there
    with pytest.raises(
        SaeError, match=r"its last rows lie in another order than those of planted-.*read the first 128 alone"
    ):
        Dataset.of(whole, short, rows=short.n_rows)
    first = Dataset.of(whole, short, rows=4 * CHUNK)
    assert np.array_equal(*(store.positions(0, 4 * CHUNK) for store in first.stores))


def test_several_datasets_take_turns_and_each_has_runs_of_its_own(tmp_path: Path, dataset: Dataset) -> None:
    """As on its own: the runs of an autoencoder of either side and of the transcoder, in one call."""
    datasets = [Dataset.of(dataset.inputs), Dataset.of(dataset.targets), dataset]
    configs = [settings(steps=6), settings(steps=6, seed=1)]
    opened = open_each([(configs, each) for each in datasets], tmp_path)
    sweep_each(opened, Silent(), device="cpu")
    assert len({run.name for runs, _ in opened for run in runs}) == 6
    for runs, each in opened:
        alone = go(configs[1], each, tmp_path / "alone" / runs[1].name)
        assert (runs[1].path / METRICS).exists() and all(run.finished for run in runs)
        assert all(torch.equal(one, outcome(alone)[0][name]) for name, one in outcome(runs[1])[0].items())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_ROWS", 16_384)  # as a process that is started has them
    monkeypatch.setattr(activations, "WINDOWS", Windows(16_384, 524_288))
    x, y = read_and_written()
    dataset = Dataset.of(written(tmp_path, x, "mlp_in"), written(tmp_path, y, "mlp_out"))
    config = settings(revive=REVIVALS[0])
    ((runs, each),) = open_each([([config], dataset)], tmp_path / "runs")
    sweep_each([(runs, each)], Silent(), device="cpu", processes=2)
    alone = go(settings(revive=REVIVALS[0], accumulate=2), dataset, tmp_path / "alone")
    for name, value in runs[0].load_weights()[0].items():
        torch.testing.assert_close(value, alone.load_weights()[0][name], rtol=1e-3, atol=1e-4)


# On the command line


COMMON = "--device cpu --threads 1 --batch 64 --steps 4 --d-sae 16 --k 4 --set train.log_every=2"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with both sides of layers 1 and 2, of the same tokens."""
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    x, y = read_and_written(256)
    for layer in (1, 2):
        for site, rows in (("mlp_in", x), ("mlp_out", y[:, :8] + layer)):
            recipe = activation_recipe(rows.shape[1], "float32", site=site)
            recipe |= {"layer": layer, "hook": f"blocks.{layer}.hook_{site}"}
            with ActivationWriter(tmp_path / "cache", f"planted-{layer}.{site}", recipe) as writer:
                extend(writer, rows, ended=True)
    return tmp_path


def test_a_transcoder_is_named_by_points_or_stores(home: Path) -> None:
    answer = sae(f"train --input 1.mlp_in --target 1.mlp_out {COMMON} --json")
    assert answer.code == 0, answer.err
    run = Run(Path(answer.json["run"]))
    assert "-1.mlp_in-to-1.mlp_out-" in run.name and "targets: planted-1.mlp_out" in answer.err
    again = sae(f"train --input planted-1.mlp_in --target planted-1.mlp_out {COMMON} --resume --json")
    assert again.code == 0, again.err
    assert again.json["run"] == str(run.path) and "nothing to do" in again.err
    assert sae(f"train --resume --name {run.name} --json").json["run"] == str(run.path)
    assert sae(f"train --activations planted-2.mlp_in --target 2.mlp_out {COMMON}").code == 0
    skips = sae(f"train --input 1.mlp_in --target 1.mlp_out {COMMON} --set train.sae.skip=true --json").json["run"]
    assert skips != str(run.path) and trained.load_run(Run(Path(skips))).W_skip is not None
    shutil.rmtree(skips)
    mixed = sae(f"train --input 1.mlp_in --target 2.mlp_out {COMMON} --sweep lr=1e-3,1e-4 --seeds 2 --json")
    assert len(mixed.json["runs"]) == 4 and all("planted-2.mlp_out" in row["activations"] for row in mixed.json["runs"])
    listed = sae("list --json").json["runs"]
    assert any("planted-1.mlp_in" in one["help"] and " -> planted-1.mlp_out" in one["help"] for one in listed)
    rows = sae("compare --json --plot", home / "plot.png").json["runs"]
    assert len(rows) == 6 and all(" -> " in row["activations"] for row in rows)


def test_layers_and_sites_are_a_dictionary_each(home: Path) -> None:
    for line in (
        "--layer 1,2 --site mlp_out",
        "--sweep layer=1,2 --sweep site=mlp_out",
        "--layer 1-2 --sweep site=mlp_out",
    ):
        answer = sae(f"train --activations planted-1.mlp_in {line} {COMMON} --json")
        assert answer.code == 0, answer.err
        assert [row["activations"][:17] for row in answer.json["runs"]] == [
            "planted-1.mlp_out", "planted-2.mlp_out",
        ]  # fmt: skip
    assert len(list((home / "runs").iterdir())) == 2, "said again, it trains nothing anew"
    rows = sae(f"train --activations planted-1.mlp_in --layer 1,2 {COMMON} --sweep lr=1e-3,1e-4 --json").json["runs"]
    assert [(row["activations"][:16], row["lr"]) for row in rows] == [
        ("planted-1.mlp_in", 1e-3), ("planted-1.mlp_in", 1e-4), ("planted-2.mlp_in", 1e-3), ("planted-2.mlp_in", 1e-4),
    ]  # fmt: skip
    one = sae(f"train --activations planted-1.mlp_in --layer 2 --name two {COMMON} --json")
    assert one.json["run"].endswith("two") and Run(home / "runs" / "two").seen.key.startswith("planted-2.mlp_in")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--input 1.mlp_in --target 7.mlp_out", "--target 7.mlp_out: no store of it beside planted-1.mlp_in"),
        ("--input 1.mlp_in --target 7.mlp_out", "there is 1.mlp_in, 1.mlp_out, 2.mlp_in, 2.mlp_out"),
        ("--input 9.mlp_in --target 1.mlp_out", "--input 9.mlp_in: no store of it in"),
        ("--input nothing --target 1.mlp_out", "--input nothing: no such store in"),
        ("--input 1.mlp_in --target 1.mlp_in", "--target 1.mlp_in: is what is read; without --target"),
        ("--input 1.mlp_in --activations planted-1.mlp_in", "both say what is read; give one of them"),
        ("--input 1.mlp_in --set train.sae.skip=true", "train.sae.skip: true would give an autoencoder its own input"),
        ("--input 1.mlp_in --layer 2", "--input and --target say the layer and the site themselves"),
        ("--target 1.mlp_out", "--activations: ambiguous"),
        ("--activations planted-1.mlp_in --layer 1,5", "no store of 5.mlp_in beside planted-1.mlp_in"),
        ("--activations planted-1.mlp_in --layer one", "--layer one: is not a whole number"),
        ("--activations planted-1.mlp_in --site mlp_in,", "--site mlp_in,: between two commas nothing stands"),
        ("--layer 1 --sweep layer=1,2", "--sweep layer=1,2: --layer fixes it; give one of them"),
        ("--sweep layer=1 --sweep layer=2", "--sweep layer=2: layer is swept twice; give all its values at once"),
        ("--sweep layer=", "--sweep layer"),
        ("--activations planted-1.mlp_in --layer 1,2 --name one", "--layer and --site: names its runs itself"),
        ("--activations planted-1.mlp_in --layer 1,2 --resume", "leave out --name and --resume"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_line(home: Path, line: str, says: str) -> None:
    answer = sae(f"train {line} {COMMON}")
    assert answer.code == 2 and says in answer.complaint, answer.err
    assert not (home / "runs").exists() or json.dumps([*map(str, (home / "runs").iterdir())]) == "[]"
