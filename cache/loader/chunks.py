"""The open chunks of one store, which the threads that fill the loader's buffers share.

Uncompressed chunks of this machine take no buffer of their own: what a step takes of one is read in one call, each
slice straight to its place in the batches (`DirectReader`). Everything else, that is compressed chunks and remote
stores, is decoded ahead of its first use into buffers that are used again (`DecodingReader`). Either way every byte of
a chunk is checked against what was committed before one of its rows is given: compressed ones each time they are
decoded, uncompressed ones when a loader first opens them. (A check of each slice, each time, cost a quarter of the
speed; files are replaced, never changed in place.)
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, final

import numpy as np
from google_crc32c import extend as crc32c_of

from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import opened, unreadable
from sae.cache.disk.paths import is_remote
from sae.cache.loader.schedule import Spans

IOV_MAX = os.sysconf("SC_IOV_MAX")  # buffers that one call can fill
PIECE = 1 << 18  # bytes read and checked at a time, while they are in the processor's nearest cache


Opened = TypeVar("Opened", "OpenFile", "DecodedChunk")


class Chunks(ABC, Generic[Opened]):
    """The open chunks of a store. The pool opens them; a chunk is closed when nobody needs it any more."""

    def __init__(self, store: ActivationStore, pool: Executor) -> None:
        self.store = store
        self._pool = pool
        self._open: dict[int, Future[Opened]] = {}
        self._needed: dict[int, int] = {}
        self._ready: dict[int, Opened] = {}  # results of those that have been asked for: asking takes its time
        self._row_bytes = store.arrays["rows"].chunk_bytes // store.chunk_rows

    def acquire(self, chunks: Iterable[int]) -> None:
        """Open chunks ahead of their use. To be called by one thread, as `release`."""
        for chunk in chunks:
            if not self._needed.setdefault(chunk, 0):
                self._open[chunk] = self._pool.submit(self._opened, chunk)
            self._needed[chunk] += 1

    def release(self, chunks: Iterable[int]) -> None:
        """Undo an `acquire`."""
        for chunk in chunks:
            self._needed[chunk] -= 1
            if not self._needed[chunk]:
                del self._needed[chunk]
                self._ready.pop(chunk, None)
                opened = self._open.pop(chunk)
                if not opened.cancel():
                    opened.add_done_callback(self._done)

    def chunks_of(self, spans: Spans) -> list[int]:
        """The chunks that hold the spans' rows."""
        return np.unique(spans.start // self.store.chunk_rows).tolist()

    def beside(self, chunks: Iterable[int]) -> int:
        """Return how many other chunks are open."""
        return len(self._open.keys() - chunks)

    def read(self, spans: Spans, rows: np.ndarray, scale: np.ndarray | None) -> None:
        """Copy the spans' rows, whose chunks were acquired, to `rows` [n, d] and their scales to `scale` [n].

        No span may straddle two chunks. Raises DamagedStore for bytes that are not those committed.
        """
        order = np.argsort(spans.start)
        sizes = spans.stop - spans.start
        end = np.cumsum(sizes)[order]
        start, sizes = spans.start[order], sizes[order]
        chunk, low = np.divmod(start, self.store.chunk_rows)
        # a stretch of a file is read in one call; another begins after a gap, and with another chunk
        apart = (start[1:] != start[:-1] + sizes[:-1]) | (low[1:] == 0)
        apart[IOV_MAX - 1 :: IOV_MAX] = True
        runs: np.ndarray = np.concatenate([[0], np.flatnonzero(apart) + 1])  # the first span of each stretch of a file
        first, last = low[runs], low[runs] + np.add.reduceat(sizes, runs)
        buffers = _cut(rows, (end - sizes) * self._row_bytes, end * self._row_bytes)
        theirs = [buffers[i:j] for i, j in pairwise([*runs.tolist(), len(buffers)])]
        scales = []
        for number, at, to, buffer in zip(chunk[runs].tolist(), first.tolist(), last.tolist(), theirs, strict=True):
            opened = self._ready.get(number)
            if opened is None:
                opened = self._ready[number] = self._open[number].result()
            self._copy(opened, at * self._row_bytes, to * self._row_bytes, buffer)
            scales.append(opened.scale[at:to])
        if scale is not None:
            _lay(np.concatenate(scales), sizes, end, scale)

    def _scale(self, chunk: int) -> np.ndarray:
        scale = self.store.row_scale(chunk)
        return np.empty(0, np.float16) if scale is None else scale

    def _done(self, opened: "Future[Opened]") -> None:
        if not opened.cancelled() and opened.exception() is None:
            self._close(opened.result())

    @abstractmethod
    def _copy(self, opened: Opened, first: int, last: int, buffers: list[memoryview]) -> None:
        """Fill the buffers, one after the other, with bytes [first, last) of a decoded chunk."""

    @abstractmethod
    def _opened(self, chunk: int) -> Opened: ...

    @abstractmethod
    def _close(self, opened: Opened) -> None: ...


class OpenFile(NamedTuple):
    """An open chunk file, and its rows' scales (nothing where there are none)."""

    path: Path
    handle: int
    scale: np.ndarray


@final
class DirectReader(Chunks[OpenFile]):
    """Uncompressed chunk files of this machine, of which each stretch is read to where its slices belong."""

    def __init__(self, store: ActivationStore, pool: Executor) -> None:
        super().__init__(store, pool)
        self._checked: set[int] = set()

    def _copy(self, opened: OpenFile, first: int, last: int, buffers: list[memoryview]) -> None:
        try:
            got = os.preadv(opened.handle, buffers, first)
        except OSError as error:
            raise unreadable(error, opened.path) from error
        if got != last - first:
            raise self.store.damaged(opened.path)

    def _opened(self, chunk: int) -> OpenFile:
        name = self.store.arrays["rows"].chunk_file(chunk)
        path = self.store.path / name
        scale = self._scale(chunk)
        handle = opened_file(self.store, name)
        try:
            if chunk not in self._checked:
                buffer = np.empty(PIECE, np.uint8)
                read_checked(self.store, handle, name, lambda got: buffer)
                self._checked.add(chunk)
            elif os.fstat(handle).st_size != self.store.committed(name)[0]:
                raise self.store.damaged(path)
        except BaseException:
            os.close(handle)
            raise
        return OpenFile(path, handle, scale)

    def _close(self, opened: OpenFile) -> None:
        os.close(opened.handle)


class DecodedChunk(NamedTuple):
    """A decoded chunk, its bytes, and its rows' scales (nothing where there are none)."""

    buffer: np.ndarray
    rows: memoryview
    scale: np.ndarray


@final
class DecodingReader(Chunks[DecodedChunk]):
    """Chunks decoded whole, into buffers that are used again."""

    def __init__(self, store: ActivationStore, pool: Executor) -> None:
        super().__init__(store, pool)
        self._free: list[np.ndarray] = []  # buffer for decoded chunks
        self._stored: list[np.ndarray] = []  # buffer for stored ones
        self._local = not is_remote(store.path)

    def _copy(self, opened: DecodedChunk, first: int, last: int, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = opened.rows[first : first + len(buffer)]
            first += len(buffer)

    def _opened(self, chunk: int) -> DecodedChunk:
        spec, scale = self.store.arrays["rows"], self._scale(chunk)
        name = spec.chunk_file(chunk)
        buffer = self._free.pop() if self._free else np.empty(spec.chunk_shape, spec.dtype)
        if not self._local:
            self.store.decoded_chunk(name, self.store.stored(name), buffer)
            return DecodedChunk(buffer, bytes_of(buffer), scale)
        size = self.store.committed(name)[0]
        stored = self._stored.pop() if self._stored else np.empty(0, np.uint8)
        if len(stored) <= size:  # one byte more, so that a file that grew is noticed
            stored = np.empty(size + size // 8 + 1, np.uint8)
        handle = opened_file(self.store, name)
        try:
            read_checked(self.store, handle, name, lambda got: stored[got : min(got + PIECE, size + 1)])
        finally:
            os.close(handle)
        self.store.decoded_chunk(name, stored[:size], buffer)
        self._stored.append(stored)
        return DecodedChunk(buffer, bytes_of(buffer), scale)

    def _close(self, opened: DecodedChunk) -> None:
        self._free.append(opened.buffer)


def bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, as a view."""
    return rows.reshape(-1).view(np.uint8).data


def _cut(rows: np.ndarray, begin: np.ndarray, end: np.ndarray) -> list[memoryview]:
    """Bytes [begin, end) of an array, for each of them."""
    buffer = bytes_of(rows)
    return [buffer[low:high] for low, high in zip(begin.tolist(), end.tolist(), strict=True)]


def _lay(found: np.ndarray, sizes: np.ndarray, end: np.ndarray, out: np.ndarray) -> None:
    """Lay `found`, pieces of these sizes one after the other, so that piece i ends at out[end[i]]."""
    block = np.gcd.reduce(sizes)  # numbers that stay together: a piece, as a rule
    places = np.repeat((end - np.cumsum(sizes)) // block, sizes // block)
    places += np.arange(len(places))
    out[: len(found)].reshape(-1, block)[places] = found.reshape(-1, block)


def opened_file(store: ActivationStore, name: str) -> int:
    """A descriptor of a committed file of this machine. Raises DamagedStore where it is missing."""
    path = store.path / name
    try:
        return opened(path)
    except FileNotFoundError as error:
        raise store.missing(path) from error
    except OSError as error:
        raise unreadable(error, path) from error


def read_checked(store: ActivationStore, handle: int, name: str, room_at: Callable[[int], np.ndarray]) -> None:
    """Read a committed file piece by piece, what starts at byte `got` into `room_at(got)`.

    The buffers must have place for a byte more than was committed, so that a file that grew is noticed. Raises
    DamagedStore where the bytes are not those committed.
    """
    path = store.path / name
    size, crc = store.committed(name)
    got = found = 0
    while got <= size:
        buffer = room_at(got)
        try:
            n = os.preadv(handle, (buffer.data,), got)
        except OSError as error:
            raise unreadable(error, path) from error
        if not n:
            break
        found, got = crc32c_of(found, buffer[:n]), got + n
    if got != size or f"{found:08x}" != crc:
        raise store.damaged(path)


def chunks(store: ActivationStore, pool: Executor) -> DirectReader | DecodingReader:
    """The fastest way to read a store."""
    direct = store.arrays["rows"].zstd is None and not is_remote(store.path)
    return DirectReader(store, pool) if direct else DecodingReader(store, pool)
