"""The rows of a window are kept on the disk while it is computed, and taken up again (`cache.store.scratch`).

A window may take an hour. What its batches have become is written when half a minute has passed since the last time, so
that no end, `kill -9` included, loses much more than that; a window that takes less writes nothing. The rows go on
exactly where they ended, and only under what they were computed with: the window, its parts, what the source says that
its bits depend on (the kind of device, the precision), and the versions of what computes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.cache.store import scratch
from sae.cache.window_buffer import WindowBuffer
from sae.pipeline.runtime.interrupts import Interrupted

EVERY = 30.0  # seconds between two writes


@dataclass(frozen=True)
class Keeper:
    """The settings of keeping the rows of unfinished windows.

    `note` is told one line where something kept cannot be used or written, `took` the rows that were taken up. When
    `stopping` fills, what there is is kept and Interrupted raised.
    """

    note: Callable[[str], None]
    took: Callable[[int], None]
    stopping: Sequence[int] = ()


class Window:
    """The kept part of one window. positions [rows]: those of its rows. ends: the rows there are after each batch."""

    def __init__(
        self, keeper: Keeper, number: int, identity: Recipe, folders: Mapping[str, Path],
        buffers: Mapping[str, WindowBuffer], positions: np.ndarray, ends: Sequence[int],
    ) -> None:  # fmt: skip
        self._keeper, self._number, self._identity, self._folders = keeper, number, identity, folders
        self._buffers, self._positions, self._ends = buffers, positions, ends
        self._kept = dict.fromkeys(buffers, 0)  # rows that are on the disk
        self._last = time.monotonic()

    def take_up(self) -> None:
        """Fill the buffers with what was kept of this window, up to the end of a batch."""
        for point, buffer in self._buffers.items():
            for part in scratch.chain(self._folders[point], self._number):
                fits = part.stop in self._ends
                made = scratch.take(part, self._identity, buffer.shapes(part.stop - part.start)) if fits else None
                if made is None:
                    self._keeper.note(
                        f"{part.path}: rows that were kept of an unfinished window are damaged, or were computed "
                        "otherwise; they are computed again"
                    )
                    break
                buffer.take(made, self._positions[part.start : part.stop])
                self._kept[point] = part.stop
            scratch.remove(self._folders[point], self._number, self._kept[point])
        if taken := min(self._kept.values()):
            self._keeper.took(taken)

    def after_batch(self) -> None:
        """Keep the rows there are where it is time to, or where somebody wants the harvest to end."""
        if time.monotonic() - self._last >= EVERY or self._keeper.stopping:
            self._keep()
        if self._keeper.stopping:
            raise Interrupted(self._keeper.stopping[0])

    def _keep(self) -> None:
        try:
            for point, buffer in self._buffers.items():
                start, stop = self._kept[point], buffer.filled
                if start < stop:
                    made = buffer.made(start, stop)
                    scratch.keep(self._folders[point], self._number, start, stop, self._identity, made)
                    self._kept[point] = stop
        except SaeError as error:  # the window itself may still find room
            self._keeper.note(f"rows of the window under way cannot be kept: {error}")
        self._last = time.monotonic()


def rows_kept(folders: Sequence[Path], first: int) -> int:
    """Rows kept in every one of the stores in some folders, of their windows from `first` on."""

    def rows(folder: Path) -> int:
        windows = {part.window for part in scratch.kept(folder) if part.window >= first}
        return sum(links[-1].stop for window in windows if (links := scratch.chain(folder, window)))

    return min(rows(folder) for folder in folders)
