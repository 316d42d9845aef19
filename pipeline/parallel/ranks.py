"""Several processes that train the same dictionaries, each on its share of every batch; or one that is alone.

What they exchange, and nothing else: gradients (their mean), what was seen of a batch (everybody's), sums for the
metrics, and whether somebody was told to stop. All of it comes out the same to the bit on every rank, so weights,
counters and random draws never part; that they have not is checked whenever a checkpoint is read or written.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from sae.cache.errors import SaeError
from sae.pipeline.saes import Observed

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> how its bits are read


class Ranks(Protocol):
    """Rank `rank` of `world` processes. Every method is called by all of them, in the same order."""

    rank: int
    world: int

    @property
    def stop_requested(self) -> bool:
        """Return True if whoever started this process wants the training to stop."""

    def averaging(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within comes a backward pass; at the end every gradient of the parameters is its mean over the ranks.

        Each is on its way as soon as it and those of the parameters before it are there: in one order on all ranks.
        """

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""

    def all_gather(self, parts: Sequence[Observed]) -> list[Observed]:
        """The parts of all ranks, those of rank 0 first; of as many parts on each."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank."""

    def barrier(self) -> None:
        """Return once all ranks are here."""


class SingleRank:
    """The only process."""

    rank, world, stop_requested = 0, 1, False

    def averaging(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def broadcast(self, tensors: Iterable[Tensor]) -> None: ...

    def all_gather(self, parts: Sequence[Observed]) -> list[Observed]:
        return list(parts)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None: ...


def expect_same(tensors: Mapping[str, Tensor], ranks: Ranks, what: str) -> None:
    """Raise SaeError, on every rank alike, unless each tensor is the same on all of them.

    Compared are the sums of the numbers' bits, so a tensor with another order of the same numbers is not noticed.
    """
    if ranks.world == 1 or not tensors:
        return
    mine = torch.stack(
        [value.detach().view(BITS[value.itemsize]).sum(dtype=torch.int64).cpu() for value in tensors.values()]
    )
    apart = ranks.sum((ranks.sum(mine) != mine * ranks.world).long())
    if apart.any():
        names = [name for name, differs in zip(tensors, apart.tolist(), strict=True) if differs]
        raise SaeError(
            f"{what}: {', '.join(names[:3])} differ between the {ranks.world} processes; give them machines of one "
            "kind that see the same files, then continue from the last checkpoint with `resume`"
        )
