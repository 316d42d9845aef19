"""What is trained without being a sparse dictionary: the contract that all of it keeps, and its runs."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes_kit import DICTIONARIES, B, D, batches, one_thread, small
from support.small_stores import activation_recipe, extend, shrunk
from torch import Tensor

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline import saes
from sae.pipeline.evaluate.judging import EvalConfig, judge
from sae.pipeline.formats import trained
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Clock, Coder, Losses, Trainable
from sae.pipeline.train.stage import TrainConfig, open_run, train

single = pytest.fixture(autouse=True, scope="module")(one_thread)
OTHERS = [tag for tag, kind in saes.ARCHITECTURES.items() if tag not in DICTIONARIES and not kind.several_stores]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "fsq": [{"groups": 1, "hidden": 8, "reduction": "fvu"}],
    "vae": [{"hidden": 8, "free_bits": 0.05, "sigma": "one", "reduction": "mean_d", "beta": 0.01}],
    "nvae": [{"spectral": 0.01, "beta_warmup": 0.5}],
    "molt": [{"gate": "relu", "penalty": "l1", "standardise": False}, {"coefficient": 0.5, "aux_coefficient": 0.0}],
}
CASES = [{"arch": tag} | more for tag in OTHERS for more in ({}, *VARIANTS.get(tag, []))]
OUT = 7


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture(params=[None, OUT], ids=["itself", "another"])
def d_out(request: pytest.FixtureRequest) -> int | None:
    return request.param


def made(case: dict[str, Any], d_out: int | None, seed: int = 0) -> Trainable:
    found = saes.trainable(small(case), D, d_out, seed=seed)
    found.initialise(*next(batches(d_out, 1)))
    return found


def steps(it: Trainable, data: Any, optimiser: torch.optim.Optimizer, first: int = 0) -> list[Losses]:
    history = []
    for step, (x, y) in enumerate(data, first):
        losses = it.loss(x, y, Clock(step, 200, len(x)))
        optimiser.zero_grad()
        losses.total.backward()
        it.before_step()
        optimiser.step()
        it.after_step()
        it.track(it.observe(losses))
        history.append(losses)
    return history


def adam(it: Trainable) -> torch.optim.Optimizer:
    return torch.optim.Adam(it.parameters(), lr=3e-3, fused=True)


def test_shapes_and_terms(case: dict[str, Any], d_out: int | None) -> None:
    it = made(case, d_out)
    before = copy.deepcopy(it.state_dict())
    x, y = next(batches(d_out, 1))
    losses = it.loss(x, y, Clock(3, 10, B))
    assert losses.rows == B and losses.x_hat.shape == it(x).shape == (B, d_out or D)
    assert torch.equal(losses.total, sum(losses.terms.values())) and losses.total.dim() == 0  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in it.state_dict().items())
    assert torch.equal(it.loss(x, y, Clock(3, 10, B)).total, losses.total)
    losses.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in it.parameters())
    assert {id(p) for group in it.parameter_groups() for p in group.parameters} == {id(p) for p in it.parameters()}
    if isinstance(it, Coder):
        codes = it.encode(x)
        assert codes.batch == B and codes.dense().shape == (B, it.width)
        assert torch.equal(codes.l0(), (codes.dense() != 0).sum(1))
        assert torch.equal(codes.fired(), (codes.dense() != 0).sum(0))
        assert torch.equal(it.decode(codes), it(x))
    with pytest.raises(ValueError, match="a batch without rows"):
        it.loss(x[:0], None if y is None else y[:0])


def test_it_learns_and_resumes_to_the_bit(case: dict[str, Any], d_out: int | None) -> None:
    it = made(case, d_out)
    optimiser = adam(it)
    data = list(batches(d_out, 60))
    history = steps(it, data[:30], optimiser)
    again = made(case, d_out, seed=0)
    again.load_state_dict(it.state_dict())
    other = adam(again)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for one, same in zip(steps(it, data[30:], optimiser, 30), steps(again, data[30:], other, 30), strict=True):
        assert torch.equal(one.total, same.total)
    error = [(it.loss(x, y).x_hat - (x if y is None else y)).square().mean().item() for x, y in data[:1]]
    assert error[0] < (history[0].x_hat - (data[0][0] if data[0][1] is None else data[0][1])).square().mean().item()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in it.state_dict().items())


def test_the_seed_decides(case: dict[str, Any]) -> None:
    one, same, other = (made(case, None, seed) for seed in (0, 0, 1))
    x = next(batches(None, 1))[0]
    clock = Clock(1, 10, B)
    assert torch.equal(one.loss(x, clock=clock).total, same.loss(x, clock=clock).total)
    assert not torch.equal(one.loss(x, clock=clock).total, other.loss(x, clock=clock).total)


@pytest.mark.parametrize("odd", [0.0, 1e8, 1e-8])
def test_odd_rows_leave_numbers(case: dict[str, Any], odd: float) -> None:
    it = made(case, None)
    x = next(batches(None, 1))[0] * odd
    losses = it.loss(x, clock=Clock(3, 10, B))
    assert losses.total.isfinite() or odd > 1
    assert it(x).isfinite().all()
    fresh = saes.trainable(small(case), D)
    with pytest.raises(ValueError, match="finite rows, not all zero"):
        fresh.initialise(torch.zeros(20, D))


# Runs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    """Rows of one site and what a layer of sorts makes of them."""
    root = tmp_path_factory.mktemp("cache")
    x, y = (torch.cat(parts) for parts in zip(*batches(OUT, 8), strict=True))  # type: ignore[arg-type]
    with shrunk():
        yield Dataset.of(written(root, x, "mlp_in"), written(root, y, "mlp_out"))


def written(root: Path, rows: Tensor, site: str) -> ActivationStore:
    with ActivationWriter(root, f"planted-1.{site}", activation_recipe(rows.shape[1], "float32", site=site)) as writer:
        extend(writer, rows, ended=True)
        return writer.store


class Stopping(Silent):
    left = 7

    def advance(self, n: int, **fields: object) -> None:
        self.left -= n
        if not self.left:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("target", [False, True], ids=["itself", "another"])
def test_a_run_is_stopped_continued_saved_loaded_and_judged(
    tmp_path: Path, pair: Dataset, arch: str, target: bool
) -> None:
    dataset = pair if target else Dataset.of(pair.inputs)
    config = TrainConfig(sae=small({"arch": arch}), lr=3e-3, batch=64, steps=16, log_every=4, initial_rows=256)

    def go(name: str, progress: Silent, *, resume: bool = False) -> Run:
        run = open_run(config, dataset, tmp_path, name, resume=resume)
        train([run], dataset, progress, device="cpu")
        return run

    whole = go("whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        go("parts", Stopping())
    parts = go("parts", Silent(), resume=True)
    one, other = whole.load_checkpoint()[0], parts.load_checkpoint()[0]
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    loaded, same = trained.load_any(whole), trained.load_any(parts)
    batch = dataset.rows(0, dataset.n_rows)
    assert torch.equal(loaded(batch.x), same(batch.x)) and not any(p.requires_grad for p in loaded.parameters())
    found = judge(Subject(loaded), dataset, dataset, EvalConfig(dead_rows=0), Silent()).as_json()
    error = (loaded(batch.x) - batch.y).square().sum() / (batch.y - batch.y.mean(0)).square().sum()
    assert found["fvu"] == pytest.approx(error.item(), rel=1e-3)
    with pytest.raises(SaeError, match="not a sparse dictionary"):
        trained.load_run(whole)
