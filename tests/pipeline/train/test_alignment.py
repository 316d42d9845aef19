"""Dictionaries pulled towards each other: the term against slow twins, real gradients, and training that survives."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.killing import killed_after
from support.saes_kit import Planted
from support.small_runs import COST, different, outcome, planted_store, settings, stop_at
from support.small_stores import shrunk
from torch import Tensor

from sae.cache import activations
from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CHECKPOINT, Run
from sae.cache.store.manifest import Windows
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import SAE, Clock, SparseLosses, create, parse
from sae.pipeline.train.alignment import AlignConfig, Alignment
from sae.pipeline.train.config import TrainConfig
from sae.pipeline.train.stage import open_run, train
from sae.pipeline.train.sweep import fill_in_align_seeds, open_all, sweep

BY = ("dec", "hid", "x_hat")
MATCHINGS = ("max", "hungarian")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with shrunk() as patch:
        patch.setattr(activations, "CHUNK_ROWS", 256)
        patch.setattr(activations, "WINDOWS", Windows(256, 1024))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    return planted_store(tmp_path_factory.mktemp("cache"))


def made(count: int, **changes: Any) -> list[SAE]:
    """Dictionaries of different seeds, in float64."""
    config = parse({"arch": "topk", "d_sae": 24, "k": 4, **changes})
    found = [create(config, 12, seed=seed).double() for seed in range(count)]
    sample = rows()
    for sae in found:
        sae.initialise(sample)
    return found


def rows() -> Tensor:
    return Planted(width=12)(64).double()


def permuted(sae: SAE) -> SAE:
    """The same dictionary with its latents in another order."""
    other = create(sae.config, sae.d_in, seed=99).double()
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(1))
    state = {
        name: value[order] if value.dim() and len(value) == sae.d_sae else value
        for name, value in sae.state_dict().items()
    }
    other.load_state_dict(state)
    return other


def term(config: AlignConfig, saes: Sequence[SAE], x: Tensor) -> tuple[Tensor, list[SparseLosses]]:
    losses = [sae.loss(x, clock=Clock(0, 10, len(x))) for sae in saes]
    alignment = Alignment(config, saes)
    alignment.search(losses, 0)
    return alignment.term(losses), losses


# The term


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("matching", MATCHINGS)
def test_a_permuted_copy_is_no_different(by: Any, matching: Any) -> None:
    sae = made(1)[0]
    found, _ = term(AlignConfig(by=by, matching=matching), [sae, permuted(sae)], rows())
    assert found.item() == pytest.approx(0, abs=1e-7)


def slow_mmcs(a: Tensor, b: Tensor) -> float:
    def cosine(x: Tensor, y: Tensor) -> float:
        return float(x @ y / (x.norm() * y.norm()))

    a, b = [v for v in a if v.any()], [v for v in b if v.any()]  # type: ignore[assignment]
    one = sum(max(cosine(x, y) for y in b) for x in a) / len(a)
    return (one + sum(max(cosine(x, y) for x in a) for y in b) / len(b)) / 2


def test_the_term_is_the_mean_over_pairs_of_what_is_missing_to_full_similarity() -> None:
    saes, x = made(3), rows()
    pairs = [(0, 1), (0, 2), (1, 2)]
    losses = [sae.loss(x, clock=Clock(0, 10, len(x))) for sae in saes]
    with torch.no_grad():
        dec = sum(1 - slow_mmcs(saes[i].W_dec, saes[j].W_dec) for i, j in pairs) / 3
        hidden = [one.latents.dense().T for one in losses]
        hid = sum(1 - slow_mmcs(hidden[i], hidden[j]) for i, j in pairs) / 3
        out = [one.reconstruction for one in losses]
        x_hat = (
            sum(
                1 - sum(float(a @ b / (a.norm() * b.norm())) for a, b in zip(out[i], out[j], strict=True)) / len(x)
                for i, j in pairs
            )
            / 3
        )
    for by, expected in (("dec", dec), ("hid", hid), ("x_hat", x_hat)):
        assert term(AlignConfig(by=by), saes, x)[0].item() == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_one_to_one_is_no_more_alike_than_each_with_its_best() -> None:
    saes, x = made(2), rows()
    best, one_to_one = (term(AlignConfig(matching=matching), saes, x)[0].item() for matching in MATCHINGS)  # type: ignore[arg-type]
    assert 0 < best <= one_to_one < 1


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize(
    ("by", "reached"), [("dec", {"W_dec"}), ("hid", {"W_enc_rows", "b_enc"}), ("x_hat", {"W_dec", "W_enc_rows"})]
)
def test_gradients_reach_what_is_to_agree_in_every_dictionary(by: Any, matching: Any, reached: set[str]) -> None:
    saes = made(3)
    found, _ = term(AlignConfig(by=by, matching=matching), saes, rows())
    found.backward()
    for sae in saes:
        assert reached <= {name for name, p in sae.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("by", BY)
def test_the_gradient_is_that_of_the_numbers(by: Any) -> None:
    """Against central differences of the term itself, the matching held as it is."""
    saes, x = made(2), rows()
    found, losses = term(AlignConfig(by=by), saes, x)
    alignment = Alignment(AlignConfig(by=by), saes)
    alignment.search(losses, 0)
    (gradient,) = torch.autograd.grad(found, saes[0].W_dec if by == "dec" else saes[0].b_enc, allow_unused=False)
    parameter = (saes[0].W_dec if by == "dec" else saes[0].b_enc).data.view(-1)
    for place in gradient.abs().flatten().topk(5).indices.tolist():
        sides = []
        for change in (1e-6, -2e-6):
            parameter[place] += change
            sides.append(alignment.term([sae.loss(x, clock=Clock(0, 10, len(x))) for sae in saes]).item())
        parameter[place] += 1e-6
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(gradient.view(-1)[place].item(), rel=1e-4)


def test_the_weight_rises() -> None:
    alignment = Alignment(AlignConfig(weight=0.5, warmup=100), made(2))
    assert alignment.weight_at(0) == 0
    assert alignment.weight_at(50) == pytest.approx(0.25)
    assert alignment.weight_at(100) == alignment.weight_at(10**6) == 0.5


def test_matching_vectors_are_looked_for_now_and_then() -> None:
    saes, x = made(2), rows()
    losses = [sae.loss(x, clock=Clock(0, 10, len(x))) for sae in saes]
    alignment = Alignment(AlignConfig(every=5), saes)
    alignment.search(losses, 3)  # there are none yet
    before = alignment.state()
    saes[0].W_dec.data = saes[0].W_dec.data.flip(0)
    alignment.search(losses, 4)
    assert all(torch.equal(value, before[name]) for name, value in alignment.state().items())
    alignment.search(losses, 5)
    assert any(not torch.equal(value, before[name]) for name, value in alignment.state().items())
    other = Alignment(AlignConfig(every=5), saes)
    other.restore(alignment.state())
    assert other.matchings.keys() == alignment.matchings.keys()
    assert other.term(losses).item() == alignment.term(losses).item()


# Training


def aligned(count: int = 3, by: str = "dec", sae: dict[str, Any] | None = None, **changes: Any) -> list[TrainConfig]:
    given = {key: changes.pop(key) for key in ("weight", "matching", "every", "warmup") if key in changes}
    align = AlignConfig(by=by, **{"warmup": 5, "every": 3, **given})  # type: ignore[arg-type]
    return fill_in_align_seeds([settings(sae, seed=seed, align=align, **changes) for seed in range(count)])


def go(configs: Sequence[TrainConfig], store: ActivationStore, root: Path, progress: Silent | None = None) -> list[Run]:
    runs = open_all(configs, Dataset.of(store), root)
    sweep(runs, Dataset.of(store), progress or Silent(), device="cpu")
    return runs


def history(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name not in COST} for entry in run.metrics()]


def test_without_weight_each_is_as_by_itself(tmp_path: Path, store: ActivationStore) -> None:
    together = go(aligned(weight=0), store, tmp_path / "together")
    alone = go([settings(seed=seed) for seed in range(3)], store, tmp_path / "alone")
    for one, other in zip(together, alone, strict=True):
        pulled, free = one.load_weights()[0], other.load_weights()[0]
        assert all(torch.equal(pulled[name], free[name]) for name in free)
        assert {"agreement", "alignment", "alignment_weight", "fvu"} <= one.metrics()[-1].keys()


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("matching", MATCHINGS)
def test_what_is_pulled_together_agrees_more(tmp_path: Path, store: ActivationStore, by: str, matching: str) -> None:
    lengths = {"steps": 80, "log_every": 80, "lr": 1e-2}
    free = go(aligned(2, by, matching=matching, weight=0, **lengths), store, tmp_path / "free")
    pulled = go(aligned(2, by, matching=matching, weight=4.0, **lengths), store, tmp_path / "pulled")
    before, after = (runs[0].metrics()[-1] for runs in (free, pulled))
    assert after["alignment"] < before["alignment"]
    if by == "dec":
        assert after["agreement"] > before["agreement"] + 0.03


def test_the_agreement_is_with_all_the_others(tmp_path: Path, store: ActivationStore) -> None:
    runs = go(aligned(), store, tmp_path)
    tables = [run.load_weights()[0]["W_dec"] for run in runs]
    for i, run in enumerate(runs):
        mine = [slow_mmcs(tables[i], other) for j, other in enumerate(tables) if i != j]
        assert run.metrics()[-1]["agreement"] == pytest.approx(sum(mine) / 2, rel=1e-4)


def test_a_batch_in_parts(tmp_path: Path, store: ActivationStore) -> None:
    """The decoder's term is that of the whole batch; the gradient comes to the same."""
    whole = go(aligned(2, sae={"arch": "l1", "d_sae": 32}, steps=5), store, tmp_path)
    parts = go(aligned(2, sae={"arch": "l1", "d_sae": 32}, steps=5, accumulate=4), store, tmp_path)
    for one, other in zip(whole, parts, strict=True):
        for name, value in one.load_weights()[0].items():
            torch.testing.assert_close(value, other.load_weights()[0][name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_killed_at_every_write_and_resumed(tmp_path_factory: pytest.TempPathFactory, store: ActivationStore) -> None:
    """Also between the writing and the publishing of the checkpoints of a step, and of the finished dictionaries."""
    configs = aligned(steps=6, checkpoint_every=4, log_every=1)
    whole = [outcome(run) for run in go(configs, store, tmp_path_factory.mktemp("whole"))]
    for stop in range(3, 100):  # the first three writes are the configurations
        root = tmp_path_factory.mktemp("killed")
        with killed_after(stop) as killed:
            go(configs, store, root)
        if not killed:
            break
        assert not different(go(configs, store, root), whole), stop
    assert stop == 3 * (1 + 1 + 2 * 2 + 2)  # configuration, metrics, checkpoints (written, published), the dictionary


def test_interrupted_between_two_searches_and_resumed(tmp_path: Path, store: ActivationStore) -> None:
    configs = aligned(every=7)
    whole = [outcome(run) for run in go(configs, store, tmp_path / "whole")]
    with pytest.raises(KeyboardInterrupt):
        go(configs, store, tmp_path / "stopped", stop_at(10))
    assert not different(go(configs, store, tmp_path / "stopped"), whole)


def test_one_of_them_cannot_go_on_alone(tmp_path: Path, store: ActivationStore) -> None:
    configs = aligned()
    with pytest.raises(KeyboardInterrupt):
        go(configs, store, tmp_path, stop_at(10))
    run = open_all(configs, Dataset.of(store), tmp_path)[1]
    with pytest.raises(SaeError, match="is trained together with seeds 0, 1, 2"):
        train([run], Dataset.of(store), Silent(), device="cpu")


def test_checkpoints_that_do_not_belong_together_are_refused(tmp_path: Path, store: ActivationStore) -> None:
    configs = aligned(2)
    with pytest.raises(KeyboardInterrupt):
        go(configs, store, tmp_path, stop_at(10))
    runs = open_all(configs, Dataset.of(store), tmp_path)
    old = (runs[0].path / CHECKPOINT).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        go(configs, store, tmp_path, stop_at(5))
    (runs[0].path / CHECKPOINT).write_bytes(old)
    with pytest.raises(DamagedStore, match="belong together"):
        go(configs, store, tmp_path)


def test_settings_of_a_group() -> None:
    alone = settings(align=AlignConfig())
    with pytest.raises(SaeError, match="two or more seeds; say how many with `seeds`"):
        fill_in_align_seeds([alone])
    pair = [settings(align=AlignConfig(), seed=seed, lr=lr) for lr in (1e-3, 1e-4) for seed in (3, 5)]
    assert [config.align.seeds for config in fill_in_align_seeds(pair) if config.align] == [(3, 5)] * 4
    assert fill_in_align_seeds([settings(), settings(seed=1)]) == [settings(), settings(seed=1)]
    with pytest.raises(SaeError, match=r"^Align\.by = 'encoder'"):
        AlignConfig(by="encoder")  # type: ignore[arg-type]


def test_a_group_known_by_its_seeds_is_another_run(store: ActivationStore, tmp_path: Path) -> None:
    """What a dictionary becomes depends on the others, so the folder's name does."""
    two, three = open_all(aligned(2), Dataset.of(store), tmp_path), open_all(aligned(3), Dataset.of(store), tmp_path)
    assert {run.name for run in two}.isdisjoint({run.name for run in three})
    assert open_run(aligned(2)[0], Dataset.of(store), tmp_path, None, resume=True).name == two[0].name
