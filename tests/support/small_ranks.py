"""What the processes of test_parallel.py do. They import it anew, so it holds nothing but functions."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch, Batches
from sae.cache.runs import Run
from sae.pipeline.parallel.ranks import Ranks, SingleRank, expect_same
from sae.pipeline.parallel.torch_distributed import DistributedRanks
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Clock, Observed, placement
from sae.pipeline.train.stage import train

STOP_AT = 5


class At(Silent):
    """Does something when so many steps have ended."""

    def __init__(self, steps: int, act: Callable[[], object]) -> None:
        self.left, self.act = steps, act

    def advance(self, n: int, **fields: object) -> None:
        self.left -= n
        if self.left == 0:
            self.act()


def one(store: Path, runs: list[Path], ranks: Ranks, progress: Silent | None = None) -> None:
    train(
        [Run(path) for path in runs],
        Dataset.of(ActivationStore(store)),
        progress or Silent(),
        device="cpu",
        ranks=ranks,
    )


def stopped(store: Path, runs: list[Path], ranks: Ranks, steps: int = STOP_AT) -> None:
    """Train, and be told to stop after some steps; only the last rank is told."""

    def act() -> None:
        if ranks.rank == ranks.world - 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        one(store, runs, ranks, At(steps, act))


def numbers(ranks: Ranks) -> None:
    """What every `Ranks` must do, against results by hand."""
    rank, world = ranks.rank, ranks.world
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2,), (3, 2), (4,), (1,))]
    a, b, _, late = parameters  # one has no gradient; the order of the others differs between the ranks
    with ranks.averaging(parameters):
        for turn in (a * torch.tensor([1.0 + rank, -1.0]), b * rank, late * 2)[:: 1 if rank else -1]:
            turn.sum().backward()
    mean = (world - 1) / 2
    found = [parameter.grad for parameter in parameters]
    wanted = [torch.tensor([1 + mean, -1]), torch.full((3, 2), mean), None, torch.tensor([2.0])]
    assert all(one is other or torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    (3 * a).sum().backward()
    assert torch.equal(a.grad, wanted[0] + 3), "nothing is exchanged afterwards"
    large = torch.tensor([2**60 + rank, -1])  # no float holds them
    assert ranks.sum(large).tolist() == [world * 2**60 + sum(range(world)), -world]
    assert large.tolist() == [2**60 + rank, -1]
    tenth = torch.tensor(0.1, dtype=torch.float64)
    assert ranks.sum(tenth).item() == pytest.approx(0.1 * world, rel=1e-15)
    assert [ranks.any(flag) for flag in (False, rank == 0, rank == world - 1, True)] == [False, True, True, True]
    weights = torch.nn.Parameter(torch.arange(4.0) + rank)
    ranks.broadcast([weights, weights[:0]])
    assert weights.tolist() == [0, 1, 2, 3]
    ranks.barrier()
    assert not ranks.stop_requested


def seen(ranks: Ranks) -> None:
    """Gathered parts come in the order of the ranks, counts and numbers to the bit."""
    clock = Clock(3, 9, 32)

    def parts(rank: int) -> list[Observed]:
        random = torch.Generator().manual_seed(rank)
        fired = torch.randint(2**53, 2**62, (2, 7), generator=random)
        floats = torch.randn(2, 2, generator=random)
        floats[1, 1] = torch.nan
        return [Observed(clock, 5 - i, fired[i], floats[i]) for i in range(2)]

    found = ranks.all_gather(parts(ranks.rank))
    expected = [part for rank in range(ranks.world) for part in parts(rank)]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.clock, one.rows) == (other.clock, other.rows)
        assert torch.equal(one.fired, other.fired) and one.numbers.dtype == torch.float32
        assert torch.equal(one.numbers.view(torch.int32), other.numbers.view(torch.int32))
    stacks = [part._replace(fired=torch.stack([part.fired, -part.fired])) for part in parts(ranks.rank)]
    assert all(
        torch.equal(one.fired[1], -other.fired) for one, other in zip(ranks.all_gather(stacks), expected, strict=True)
    )
    nothing = ranks.all_gather([part._replace(numbers=torch.empty(0)) for part in parts(ranks.rank)])
    assert all(part.numbers.shape == (0,) for part in nothing)


def parted(ranks: Ranks) -> None:
    """Weights that differ in a bit are noticed, on every rank, and named."""
    same = {"step": torch.tensor(3), "flags": torch.tensor([True]), "half": torch.ones(2).half()}
    weights = torch.arange(6.0)
    expect_same({**same, "weights": weights}, ranks, "here")
    if ranks.world > 1:
        weights.view(torch.int32)[4] += ranks.rank
        with pytest.raises(SaeError, match=r"here: weights differ between the \d processes; .*`resume`"):
            expect_same({**same, "weights": weights}, ranks, "here")


def everything(ranks: DistributedRanks, device: str, store: Path, root: Path, together: list[list[str]]) -> None:
    """All that two ranks do where nothing fails, and at the end a Ctrl-C for the parent, which passes it on."""
    assert device == "cpu" and torch.get_num_threads() == 1
    for check in (numbers, seen, parted):
        check(ranks)
    assert ranks.broadcast_text("Größe" if ranks.rank == 0 else "") == "Größe"
    rows: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__iter__", kept(rows))
        one(store, [root / name for name in together[0]], ranks)
    torch.save(torch.stack(rows), root / f"rows{ranks.rank}.pt")
    for names in together[1:]:
        one(store, [root / name for name in names], ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "HOSTS", set())
        one(store, [root / f"stacked-{i}" for i in range(2)], ranks)
    for name in ("parts", "mixed"):
        stopped(store, [root / name], ranks)
    if ranks.rank == 0:
        stopped(store, [root / "mixed"], SingleRank(), steps=3)
    ranks.barrier()
    for name in ("parts", "mixed"):
        one(store, [root / name], ranks)
    tell = At(2, lambda: os.kill(os.getppid(), signal.SIGINT))
    one(store, [root / "endless"], ranks, tell if ranks.rank == 0 else None)


def kept(rows: list[Tensor]) -> Callable[[Batches], Iterator[Batch]]:
    """A loader's iteration that keeps what it gave."""
    whole = Batches.__iter__

    def iterate(self: Batches) -> Iterator[Batch]:
        for batch in whole(self):
            rows.append(batch.x)
            yield batch

    return iterate


def failed(ranks: DistributedRanks, device: str) -> None:
    """The last rank finds fault with its input while the first waits for it."""
    if ranks.rank == ranks.world - 1:
        raise SaeError("batch = 7: nobody likes it; try 8")
    ranks.barrier()


def killed(ranks: DistributedRanks, device: str) -> None:
    """The last rank is killed while the first waits for it."""
    if ranks.rank == ranks.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def unsendable(ranks: DistributedRanks, device: str) -> None:
    """Fails with an error of a kind that no other process knows."""

    class OwnError(Exception):
        pass

    raise OwnError("what happened")


def trained(ranks: DistributedRanks, device: str, store: Path, runs: list[Path]) -> None:
    one(store, runs, ranks)
