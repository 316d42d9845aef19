"""Several processes that train the same dictionaries, each on its share of every batch; or one that is alone.

What they exchange, and nothing else: gradients (their mean), what was seen of a batch (everybody's), sums for the
metrics, and whether somebody was told to stop. All of it comes out the same to the bit on every rank, so weights,
counters and random draws never part.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from pipeline.saes import Observed


class Ranks(Protocol):
    """Rank `rank` of `world` processes. Every method is called by all of them, in the same order."""

    rank: int
    world: int

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks."""

    def gather(self, parts: Sequence[Observed]) -> list[Observed]:
        """The parts of all ranks, those of rank 0 first; of as many parts on each."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks."""

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""

    def wait(self) -> None:
        """Return once all ranks are here."""


class Alone:
    """The only process."""

    rank, world = 0, 1

    def average(self, gradients: Iterable[Tensor]) -> None: ...

    def gather(self, parts: Sequence[Observed]) -> list[Observed]:
        return list(parts)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def any(self, flag: bool) -> bool:
        return flag

    def wait(self) -> None: ...
