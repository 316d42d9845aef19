"""One window of an activation store in the making: rows come in the source's order, and are stored permuted.

Rows are encoded where they are, a slice at a time, and what they are stored as comes to the host
(`cache.device.landing`), which holds the window as it came. Each chunk is gathered from it when it is written
(`Permuted`).

Every float32 and float64 operation on the way is one that IEEE 754 rounds, by itself, in one order (no sum that a
device may order otherwise, no fused multiply and add, no product with a reciprocal), and columns are calibrated on the
host. So the same rows are stored as the same bytes, whatever device computed them.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sae.cache.device.landing import landing, moved
from sae.cache.errors import SaeError
from sae.cache.store import scratch
from sae.cache.store.codecs import Columns, Encoded, calibrate, from_numpy, to_numpy
from sae.cache.store.writer import Permuted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae.cache.activations import ActivationStore

SLICE = {"cpu": 1 << 19}  # values encoded at a time: on the CPU what its caches hold
DEVICE_SLICE = 1 << 24


class Memory:
    """Memory of windows that are written, for those that come: new memory takes several times longer to fill."""

    def __init__(self) -> None:
        self._spare: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """So many bytes. What is spare of windows that were smaller goes."""
        import torch

        with self._lock:
            if spare := self._spare.get(size):
                return spare.pop()
            self._spare = {there: spare for there, spare in self._spare.items() if there > size}
        return torch.empty(size, dtype=torch.uint8)

    def give(self, memory: Tensor) -> None:
        """Have what `take` gave again."""
        with self._lock:
            self._spare.setdefault(len(memory), []).append(memory)


class WindowBuffer:
    """One window in the making. Rows arrive in the source's order, on any device.

    Holds the window in its stored form: 384 MiB for 524,288 int8 rows of width 768. The first window of a store waits
    in float32 until its columns are calibrated.
    """

    def __init__(
        self, store: ActivationStore, window: int, rows: int, columns: Columns | None, memory: Memory | None = None
    ) -> None:
        """Of a store's window of so many rows. It is released into `memory` where it is taken of it."""
        import torch

        self.store, self.columns, self.filled = store, columns, 0
        self._window, self._size = window, rows
        self._under_way: deque[Future[None]] = deque()
        self._columns_on: dict[torch.device, Columns] = {}
        self._waiting = torch.empty(rows, store.d) if columns is None else None
        self.position = np.empty(rows, np.int64)
        self._memory = memory or Memory()
        self._taken: list[Tensor] = []
        names = ["rows", "row_norm"] + [name for name in ("row_scale",) if name in store.arrays]
        self._stored = {name: self._empty(name) for name in names}
        self.coefficient = self._empty("coefficient") if "coefficient" in store.arrays else None

    def add(self, rows: Tensor, positions: np.ndarray, coefficients: Tensor | None = None) -> None:
        """The next rows [n, d] in the source's order, where each came from [n], and of a toy's [n, G] coefficients.

        Rows that are no numbers, or that the codec cannot hold, raise SaeError: here, later, or by `arrays` at the
        latest. Those of a device that runs ahead may not be changed afterwards.
        """
        assert (coefficients is None) == (self.coefficient is None)
        assert len(rows) == len(positions) and self.filled + len(rows) <= self._size
        if coefficients is not None and self.coefficient is not None:
            self.coefficient[self.filled : self.filled + len(rows)] = coefficients
        self.position[self.filled : self.filled + len(rows)] = positions
        self._send(rows, self.filled)
        self.filled += len(rows)
        self._landed(wait=False)

    def made(self, start: int, stop: int) -> list[np.ndarray]:
        """Return rows [start, stop) in the source's order, as `take` takes them up: as stored, with norms (and scales),
        or float32 where they wait for columns.
        """
        assert start < stop <= self.filled
        self._landed()
        kept = [] if self.coefficient is None else [self.coefficient]
        kept += self._stored.values() if self._waiting is None else [self._waiting]
        return [to_numpy(values[start:stop]) for values in kept]

    def shapes(self, rows: int) -> list[scratch.Shape]:
        """Types and axes of what `made` says of so many rows."""
        specs = self.store.arrays
        names = [] if self.coefficient is None else ["coefficient"]
        names += [] if self._waiting is not None else [*self._stored]
        waiting: list[scratch.Shape] = [] if self._waiting is None else [("<f4", (rows, self.store.d))]
        return [*((specs[name].dtype, (rows, *specs[name].row_shape)) for name in names), *waiting]

    def take(self, made: list[np.ndarray], positions: np.ndarray) -> None:
        """The next rows in the source's order, as `made` gave them."""
        start, self.filled = self.filled, self.filled + len(positions)
        self.position[start : self.filled] = positions
        if self.coefficient is not None:
            self.coefficient[start : self.filled] = from_numpy(made[0])
            made = made[1:]
        self._land(start, [from_numpy(values) for values in made])

    def arrays(self) -> dict[str, np.ndarray | Permuted]:
        """The window's arrays as they are stored, all rows present."""
        assert self.filled == self._size, (self.filled, self._size)
        self._landed()
        arrays: dict[str, np.ndarray | Permuted] = {}
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self.columns = calibrate(waiting)
            arrays |= {"col_mean": self.columns.mean.numpy(), "col_scale": self.columns.scale.numpy()}
            self._send(waiting, 0)
            self._landed()
        made = {"position": self.position, **{name: to_numpy(values) for name, values in self._stored.items()}}
        if self.coefficient is not None:
            made["coefficient"] = to_numpy(self.coefficient)
        order = self.store.order(self._window, self._size)
        return arrays | {name: Permuted(values, order) for name, values in made.items()}

    def release(self) -> None:
        """Give the memory back. What `arrays` gave has no meaning any more."""
        while self._taken:
            self._memory.give(self._taken.pop())

    def _empty(self, name: str) -> Tensor:
        """Memory for the window's part of an array."""
        spec = self.store.arrays[name]
        shape = (self._size, *spec.row_shape)
        self._taken.append(self._memory.take(math.prod(shape) * np.dtype(spec.dtype).itemsize))
        return self._taken[-1].view(from_numpy(np.empty(0, spec.dtype)).dtype).view(shape)

    def _send(self, rows: Tensor, start: int) -> None:
        """Encode rows where they are, and have them come to their place, `start` and on."""
        under_way = landing(rows.device)
        for part in rows.split(max(1, SLICE.get(rows.device.type, DEVICE_SLICE) // self.store.d)):
            stored, land = self._encoded(part.float()), partial(self._land, start)
            if under_way is None:
                land([values.cpu() for values in stored])
            else:
                self._under_way.append(under_way.send(stored, land))
            start += len(part)

    def _encoded(self, rows: Tensor) -> list[Tensor]:
        """What is kept of float32 rows, as `_land` takes it."""
        if self.columns is None:
            return [rows]
        if rows.device not in self._columns_on:
            self._columns_on[rows.device] = Columns(*(moved(values, rows.device) for values in self.columns))
        encoded = self.store.codec.encode(rows, self._columns_on[rows.device])
        return [encoded.rows, norms_of(rows), *([] if encoded.row_scale is None else [encoded.row_scale])]

    def _land(self, start: int, made: list[Tensor]) -> None:
        """Check what is kept of the rows from `start` on, and put it to its place."""
        stop = start + len(made[0])
        if self._waiting is not None:
            self._expect_numbers(made[0])
            self._waiting[start:stop] = made[0]
            return
        rows, norm, *scale = made
        self._expect_numbers(norm)
        self.store.codec.expect(Encoded(rows, scale[0] if scale else None))
        for kept, values in zip(self._stored.values(), made, strict=True):
            # by this thread alone: torch would have all cores at it, which compress the window before
            np.copyto(to_numpy(kept[start:stop]), to_numpy(values))

    def _landed(self, *, wait: bool = True) -> None:
        """Return when all rows are at their place. Rows that were refused are so each time somebody asks."""
        while self._under_way and (wait or self._under_way[0].done()):
            self._under_way[0].result()
            self._under_way.popleft()

    def _expect_numbers(self, values: Tensor) -> None:
        """Raise SaeError unless rows, or their norms, are finite."""
        if not values.isfinite().all():
            recipe = self.store.recipe
            of_model = "model" in recipe
            name = f"{recipe['model']['model']} {recipe['layer']}.{recipe['site']}" if of_model else self.store.slug
            raise SaeError(f"{name}: activations hold NaN or infinity, or are too large for a norm in float32")


def norms_of(rows: Tensor) -> Tensor:
    """float32 [...]: the norms of rows [..., d] as a store keeps them, rounded so that zstd halves their bytes.

    Squares of float32 numbers are exact in float64, and are summed in an order that is the same on every device: the
    second half is added to the first, until one is left.
    """
    import torch

    squares = rows.to(torch.float64, copy=True)
    squares.mul_(squares)
    left = squares.shape[-1]
    while left > 1:
        half = left // 2
        squares[..., :half].add_(squares[..., left - half : left])
        left -= half
    return squares[..., 0].sqrt().float().bfloat16().float()
