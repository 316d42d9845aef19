"""Threads that lay the rows of coming steps, as they are stored, into a few buffers that are used again."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from cache.activations import ActivationStore
from cache.codecs import Encoded, from_numpy, to_numpy
from cache.reading import chunks
from cache.schedule import Batch, Share, Spans

UNIT_BYTES = 2 << 20  # at least, where batches are smaller


class Buffer:
    """Room for rows as stored, of one or several stores. For a GPU pinned, and filled anew only after its copies."""

    def __init__(self, stores: Sequence[ActivationStore], rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.parts: list[Encoded] = []
        for store in stores:
            stored = from_numpy(np.empty(0, store.codec.numpy_dtype)).dtype
            scale = torch.empty(rows, dtype=torch.float16, pin_memory=pinned) if store.codec.has_row_scale else None
            self.parts.append(Encoded(torch.empty((rows, store.d), dtype=stored, pin_memory=pinned), scale))
        self._copied = torch.cuda.Event() if pinned else None

    def part(self, store: int, low: int, high: int) -> Encoded:
        """Rows [low, high) of a store, as views."""
        rows, scale = self.parts[store]
        return Encoded(rows[low:high], None if scale is None else scale[low:high])

    def copied(self) -> None:
        """Note that copies to the GPU have been asked for, on the current stream."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Return when the copies that were asked for have ended."""
        if self._copied is not None:
            self._copied.synchronize()


class Unit(NamedTuple):
    """Rows that are laid out together, and the batches that start among them."""

    spans: Spans
    batches: list[Batch]


class Filler:
    """Iterates (unit, buffer that holds its rows); the buffer is the caller's until the next one is asked for.

    A unit is a batch or, of small batches, several: small enough to be in the processor's cache when it is used.
    A context manager: at its end nothing is being read any more. Work is queued in an order in which a thread never
    waits for work that is still queued, so any number of threads will do.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        plan: Iterator[Share],
        *,
        batch: int,
        device: torch.device,
        pool: Executor,
        threads: int,
    ) -> None:
        self._plan, self._pool = plan, pool
        self._chunks = [chunks(store, pool) for store in stores]
        row_bytes = max(store.arrays["rows"].chunk_bytes // store.chunk_rows for store in stores)
        self._unit_rows = max(1, UNIT_BYTES // row_bytes)
        most = min(max(store.chunk_rows for store in stores), batch + self._unit_rows)
        self._free = [Buffer(stores, most, device) for _ in range(threads + 1)]
        self._steps: deque[list[list[int]]] = deque()  # of each step ahead: the chunks of each store that it needs
        self._left: deque[int] = deque()  # of each of these steps: units still to be given
        self._units: deque[Unit] = deque()
        self._filling: deque[tuple[Unit, Buffer, Future[None]]] = deque()
        self._ahead = threads + 2

    def __enter__(self) -> "Filler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait([filled for _, _, filled in self._filling if not filled.cancel()])
        while self._steps:
            self._release()

    def __iter__(self) -> Iterator[tuple[Unit, Buffer]]:
        while self._go_on():
            unit, buffer, filled = self._filling[0]
            filled.result()
            yield unit, buffer
            self._filling.popleft()
            self._free.append(buffer)
            self._left[0] -= 1
            if not self._left[0]:
                self._release()

    def _go_on(self) -> bool:
        """Have the threads work as far ahead as there is room; whether there is anything to come."""
        while len(self._steps) < self._ahead and (share := next(self._plan, None)):
            needed = [each.chunks_of(share.spans) for each in self._chunks]
            for each, chunks_needed in zip(self._chunks, needed, strict=True):
                each.acquire(chunks_needed)
            units = self._cut(share)
            self._steps.append(needed)
            self._left.append(len(units))
            self._units += units
        while self._units and self._free:
            unit, buffer = self._units.popleft(), self._free.pop()
            self._filling.append((unit, buffer, self._pool.submit(self._fill, unit.spans, buffer)))
        return bool(self._filling)

    def _cut(self, share: Share) -> list[Unit]:
        """A share cut where batches start, into pieces of at least so many rows."""
        cuts: list[int] = []
        parts: list[list[Batch]] = [[]]
        for batch in share.batches:
            if batch.start >= (cuts[-1] if cuts else 0) + (self._unit_rows if parts[-1] else 1):
                cuts.append(batch.start)
                parts.append([])
            parts[-1].append(batch)
        return list(map(Unit, share.spans.split(cuts), parts))

    def _fill(self, spans: Spans, buffer: Buffer) -> None:
        buffer.wait()
        for each, part in zip(self._chunks, buffer.parts, strict=True):
            scale = None if part.row_scale is None else part.row_scale.numpy()
            each.read(spans, to_numpy(part.rows), scale)

    def _release(self) -> None:
        self._left.popleft()
        for each, needed in zip(self._chunks, self._steps.popleft(), strict=True):
            each.release(needed)
