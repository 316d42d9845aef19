"""Threads that lay the rows of coming steps, as they are stored, into a few buffers that are used again."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from types import TracebackType

import numpy as np
import torch

from sae.cache.activations import ActivationStore
from sae.cache.loader.chunks import DecodingReader, DirectReader, chunks
from sae.cache.loader.schedule import Share, Spans
from sae.cache.store.codecs import Encoded, from_numpy, to_numpy


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


class Prefetcher:
    """Iterates (share, buffer that holds its rows); the buffer is the caller's until the next one is asked for.

    A whole step's share is laid out at once, in one read of each open chunk: calls and handing over cost more than is
    lost where a buffer is larger than the processor's cache.
    A context manager: at its end nothing is being read any more. Work is queued in an order in which a thread never
    waits for work that is still queued, so any number of threads will do.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        plan: Iterator[Share],
        *,
        device: torch.device,
        pool: Executor,
        threads: int,
    ) -> None:
        self._plan, self._pool = plan, pool
        self._next = next(plan, None)
        self._chunks = [chunks(store, pool) for store in stores]
        most = max(store.chunk_rows for store in stores)  # a step has no more rows
        self._free = [Buffer(stores, most, device) for _ in range(threads + 1)]
        self._steps: deque[list[list[int]]] = deque()  # of each step ahead: the chunks of each store that it needs
        self._waiting: deque[Share] = deque()  # for a buffer
        self._filling: deque[tuple[Share, Buffer, Future[None]]] = deque()
        self._ahead = threads + 2

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait([filled for _, _, filled in self._filling if not filled.cancel()])
        while self._steps:
            self._release()

    def __iter__(self) -> Iterator[tuple[Share, Buffer]]:
        while self._go_on():
            share, buffer, filled = self._filling[0]
            filled.result()
            yield share, buffer
            self._filling.popleft()
            self._free.append(buffer)
            self._release()

    def _go_on(self) -> bool:
        """Have the threads work as far ahead as there is room; whether there is anything to come."""
        while len(self._steps) < self._ahead and (share := self._next):
            needed = [each.chunks_of(share.spans) for each in self._chunks]
            if self._steps and any(map(self._too_many, self._chunks, needed)):
                break  # an epoch, which starts with other chunks, waits for the end of the one before
            for each, chunks_needed in zip(self._chunks, needed, strict=True):
                each.acquire(chunks_needed)
            self._steps.append(needed)
            self._waiting.append(share)
            self._next = next(self._plan, None)
        while self._waiting and self._free:
            share, buffer = self._waiting.popleft(), self._free.pop()
            self._filling.append((share, buffer, self._pool.submit(self._fill, share.spans, buffer)))
        return bool(self._filling)

    def _too_many(self, chunks: DirectReader | DecodingReader, needed: list[int]) -> bool:
        """Return True if more chunks would be held, beside those needed, than are read ahead."""
        return chunks.beside(needed) > self._ahead

    def _fill(self, spans: Spans, buffer: Buffer) -> None:
        buffer.wait()
        for each, part in zip(self._chunks, buffer.parts, strict=True):
            scale = None if part.row_scale is None else part.row_scale.numpy()
            each.read(spans, to_numpy(part.rows), scale)

    def _release(self) -> None:
        for each, needed in zip(self._chunks, self._steps.popleft(), strict=True):
            each.release(needed)
