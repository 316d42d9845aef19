"""The open chunks of one store, which the threads that fill the loader's buffers share.

Uncompressed chunks of this machine take no buffer of their own: what a step takes of one is read in one call, each
slice straight to its place in the batches (`DirectReader`). Everything else, that is compressed chunks and remote
stores, is decoded ahead of its first use into places that are used again (`DecodingReader`), from which a step's slices
are gathered in one call that holds no lock of Python's. Either way every byte of a chunk is checked against what was
committed before one of its rows is given: compressed ones each time they are decoded, uncompressed ones when a loader
first opens them. (A check of each slice, each time, cost a quarter of the speed; files are replaced, never changed in
place.)
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


Opened = TypeVar("Opened", "OpenFile", int)


class Chunks(ABC, Generic[Opened]):
    """The open chunks of a store. The pool opens them; a chunk is closed when nobody needs it any more.

    One thread acquires and releases, any number of others read.
    """

    def __init__(self, store: ActivationStore, pool: Executor) -> None:
        self.store = store
        self._pool = pool
        self._open: dict[int, Future[Opened]] = {}
        self._needed: dict[int, int] = {}

    def acquire(self, chunks: Iterable[int]) -> None:
        """Open chunks ahead of their use."""
        for chunk in chunks:
            if not self._needed.setdefault(chunk, 0):
                self._open[chunk] = self._begin(chunk)
            self._needed[chunk] += 1

    def release(self, chunks: Iterable[int]) -> None:
        """Undo an `acquire`."""
        for chunk in chunks:
            self._needed[chunk] -= 1
            if not self._needed[chunk]:
                del self._needed[chunk]
                self._end(chunk, self._open.pop(chunk))

    def chunks_of(self, spans: Spans) -> list[int]:
        """The chunks that hold the spans' rows."""
        return np.unique(spans.start // self.store.chunk_rows).tolist()

    def beside(self, chunks: Iterable[int]) -> int:
        """Return how many other chunks are open."""
        return len(self._open.keys() - chunks)

    @abstractmethod
    def read(self, spans: Spans, rows: np.ndarray, scale: np.ndarray | None) -> None:
        """Copy the spans' rows, whose chunks were acquired, to `rows` [n, d] and their scales to `scale` [n].

        No span may straddle two chunks. Raises DamagedStore for bytes that are not those committed.
        """

    def _scale(self, chunk: int) -> np.ndarray:
        scale = self.store.row_scale(chunk)
        return np.empty(0, np.float16) if scale is None else scale

    @abstractmethod
    def _begin(self, chunk: int) -> "Future[Opened]": ...

    @abstractmethod
    def _end(self, chunk: int, opened: "Future[Opened]") -> None: ...


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
        self._ready: dict[int, OpenFile] = {}  # results of those that have been asked for: asking takes its time
        self._row_bytes = store.arrays["rows"].chunk_bytes // store.chunk_rows

    def read(self, spans: Spans, rows: np.ndarray, scale: np.ndarray | None) -> None:
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

    def _copy(self, opened: OpenFile, first: int, last: int, buffers: list[memoryview]) -> None:
        """Fill the buffers, one after the other, with bytes [first, last) of a file."""
        try:
            got = os.preadv(opened.handle, buffers, first)
        except OSError as error:
            raise unreadable(error, opened.path) from error
        if got != last - first:
            raise self.store.damaged(opened.path)

    def _begin(self, chunk: int) -> "Future[OpenFile]":
        return self._pool.submit(self._opened, chunk)

    def _end(self, chunk: int, opened: "Future[OpenFile]") -> None:
        self._ready.pop(chunk, None)
        if not opened.cancel():
            opened.add_done_callback(_closed)

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


def _closed(opened: "Future[OpenFile]") -> None:
    if not opened.cancelled() and opened.exception() is None:
        os.close(opened.result().handle)


@final
class DecodingReader(Chunks[int]):
    """Chunks decoded whole, into places of one array; a chunk that was opened is the number of its place.

    A chunk that nobody needs any more stays until its place is wanted, so a store that fits is decoded once.
    most: chunks that are open at once, at the most.
    """

    def __init__(self, store: ActivationStore, pool: Executor, most: int) -> None:
        super().__init__(store, pool)
        spec, most = store.arrays["rows"], min(most, store.n_chunks)
        self._rows = np.empty((most, *spec.chunk_shape), spec.dtype)  # memory is taken as places are first used
        self._scales = np.ones((most, store.chunk_rows), np.float16) if store.codec.has_row_scale else None
        self._places = [*reversed(range(most))]
        self._place_of = np.zeros(store.n_chunks, np.int64)
        self._ready: set[int] = set()  # chunks that have been asked for: asking takes its time
        self._kept: dict[int, Future[int]] = {}  # nobody needs these; the oldest first
        self._stored: list[np.ndarray] = []  # buffers for stored chunks
        self._local = not is_remote(store.path)

    def read(self, spans: Spans, rows: np.ndarray, scale: np.ndarray | None) -> None:
        per_chunk = self.store.chunk_rows
        chunk, low = np.divmod(spans.start, per_chunk)
        sizes = spans.stop - spans.start
        for number in {*chunk.tolist()} - self._ready:
            self._open[number].result()  # raises what opening it raised
            self._ready.add(number)
        block = int(np.gcd.reduce(np.concatenate([[per_chunk], low, sizes])))  # rows that stay together
        starts, counts = (self._place_of[chunk] * per_chunk + low) // block, sizes // block
        blocks = np.repeat(starts - np.cumsum(counts) + counts, counts)
        blocks += np.arange(len(blocks))
        total = len(blocks) * block
        _gather(self._rows, blocks, rows[:total])
        if scale is not None and self._scales is not None:
            _gather(self._scales, blocks, scale[:total])

    def _begin(self, chunk: int) -> "Future[int]":
        if (kept := self._kept.pop(chunk, None)) is not None:
            return kept
        place = self._places.pop() if self._places else self._given_up()
        self._place_of[chunk] = place
        return self._pool.submit(self._opened, chunk, place)

    def _given_up(self) -> int:
        """The place of the chunk that nobody has needed for longest."""
        oldest = next(iter(self._kept))
        self._ready.discard(oldest)
        return self._kept.pop(oldest).result()

    def _end(self, chunk: int, opened: "Future[int]") -> None:
        if not opened.cancel():  # only at the end: what is released has been read before
            self._kept[chunk] = opened

    def _opened(self, chunk: int, place: int) -> int:
        name = self.store.arrays["rows"].chunk_file(chunk)
        if self._scales is not None:
            scale = self._scale(chunk)
            self._scales[place, : len(scale)] = scale
        if not self._local:
            self.store.decoded_chunk(name, self.store.stored(name), self._rows[place])
            return place
        size = self.store.committed(name)[0]
        try:
            stored = self._stored.pop()  # in one go: other threads take from it, too
        except IndexError:
            stored = np.empty(0, np.uint8)
        if len(stored) <= size:  # one byte more, so that a file that grew is noticed
            stored = np.empty(size + size // 8 + 1, np.uint8)
        handle = opened_file(self.store, name)
        try:
            read_checked(self.store, handle, name, lambda got: stored[got : min(got + PIECE, size + 1)])
        finally:
            os.close(handle)
        self.store.decoded_chunk(name, stored[:size], self._rows[place])
        self._stored.append(stored)
        return place


def _gather(places: np.ndarray, blocks: np.ndarray, out: np.ndarray) -> None:
    """Copy blocks of numbers, by their numbers, out of all places. Python's lock is let go meanwhile."""
    size = out.size // len(blocks)
    np.take(places.reshape(-1, size), blocks, axis=0, out=out.reshape(-1, size), mode="clip")  # `raise` copies twice


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


def chunks(store: ActivationStore, pool: Executor, most: int) -> DirectReader | DecodingReader:
    """The fastest way to read a store of which `most` chunks are open at once, at the most."""
    direct = store.arrays["rows"].zstd is None and not is_remote(store.path)
    return DirectReader(store, pool) if direct else DecodingReader(store, pool, most)
