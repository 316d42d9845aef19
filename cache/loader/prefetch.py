"""Threads that lay the rows of coming steps, as they are stored, into a few rooms that are used again."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

import torch

from sae.cache.activations import ActivationStore
from sae.cache.loader.chunks import DecodingReader, DirectReader, chunks
from sae.cache.loader.rooms import Room, rooms
from sae.cache.loader.schedule import Schedule, Share, Spans
from sae.cache.store.codecs import to_numpy

FILLING = 4  # threads that fill rooms, at the most: a step is gathered in a tenth of the time that its chunk takes
SPARE = 2  # steps read ahead beyond those that keep the threads busy


class Threads:
    """The threads of a loader: `opening` check and decode chunks, `filling` gather steps of them.

    Those that open wait for nobody, those that fill only for these, so any number of either will do.
    """

    def __init__(self, count: int) -> None:
        self.count, self.fillers = count, min(count, FILLING)
        self.opening = ThreadPoolExecutor(count, thread_name_prefix="loader-opening")
        self.filling = ThreadPoolExecutor(self.fillers, thread_name_prefix="loader-filling")

    def close(self) -> None:
        """End them. What they have not begun they never will."""
        for pool in (self.opening, self.filling):
            pool.shutdown(wait=True, cancel_futures=True)


class Prefetcher:
    """Iterates (share, room that holds its rows); the room is the caller's until the next one is asked for.

    A whole step's share is laid out at once, in one read of each open chunk: calls and handing over cost more than is
    lost where a room is larger than the processor's cache.
    A context manager: at its end nothing is being read any more.
    """

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        schedule: Schedule,
        plan: Iterator[Share],
        *,
        device: torch.device,
        threads: Threads,
    ) -> None:
        self._plan, self._threads = plan, threads
        self._next = next(plan, None)
        self._ahead = SPARE - -threads.count // len(stores)  # a step opens a chunk of each store
        self._chunks = [
            chunks(store, threads.opening, schedule.chunks_of_step(store.chunk_rows) + self._ahead) for store in stores
        ]
        most = max(store.chunk_rows for store in stores)  # a step has no more rows
        self._rooms = rooms(stores, most, device, threads.fillers + 1)
        self._free = [*self._rooms]
        self._steps: deque[list[list[int]]] = deque()  # of each step ahead: the chunks of each store that it needs
        self._waiting: deque[Share] = deque()  # for a room
        self._filling: deque[tuple[Share, Room, Future[None]]] = deque()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        wait([filled for _, _, filled in self._filling if not filled.cancel()])
        while self._steps:
            self._release()
        for room in self._rooms:
            room.close()

    def __iter__(self) -> Iterator[tuple[Share, Room]]:
        while self._go_on():
            share, room, filled = self._filling[0]
            filled.result()
            room.receive()
            yield share, room
            room.leave()
            self._filling.popleft()
            self._free.append(room)
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
            share, room = self._waiting.popleft(), self._free.pop()
            self._filling.append((share, room, self._threads.filling.submit(self._fill, share.spans, room)))
        return bool(self._filling)

    def _too_many(self, chunks: DirectReader | DecodingReader, needed: list[int]) -> bool:
        """Return True if more chunks would be held, beside those needed, than are read ahead."""
        return chunks.beside(needed) > self._ahead

    def _fill(self, spans: Spans, room: Room) -> None:
        room.begin()
        for each, part in zip(self._chunks, room.host, strict=True):
            scale = None if part.row_scale is None else part.row_scale.numpy()
            each.read(spans, to_numpy(part.rows), scale)
        room.send(spans.rows)

    def _release(self) -> None:
        for each, needed in zip(self._chunks, self._steps.popleft(), strict=True):
            each.release(needed)
