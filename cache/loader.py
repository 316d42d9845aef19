"""Shuffled batches of rows from an activation store.

Rows were permuted inside their window when they were written, so mixing at read time needs no gather: chunks are
visited in a seeded random order, each from a random slice on, `open_chunks` of them (B) are open at once, and a batch
is made of one contiguous slice from each. Openings are staggered, so that one chunk is decoded while the others are
being read, and the circle is closed: the chunks that are half read when an epoch starts are finished at its end. Every
row comes exactly once an epoch, whatever the store's size.

The order is a closed formula of (seed, epoch, turn), so it is the same for any number of threads and the state is
three numbers. Memory: B chunks and a few prefetched ones (twice B for a moment between epochs), whatever the store's
size: about 13 MB each for int8 at width 768.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.activations import ActivationStore
from cache.codecs import Columns, Encoded
from cache.errors import SaeError

AHEAD = 3  # openings prefetched


class Span(NamedTuple):
    """Rows [start, stop) of one chunk."""

    chunk: int
    start: int
    stop: int


class Schedule:
    """Which rows come when: pure arithmetic on (epoch, turn). A turn takes one slice from each open chunk."""

    def __init__(self, rows: int, chunk_rows: int, batch: int, open_chunks: int, seed: int) -> None:
        self.rows, self.chunk_rows, self.seed = rows, chunk_rows, seed
        self.n_chunks = -(-rows // chunk_rows)
        self.open = _power_of_two(min(open_chunks, self.n_chunks, chunk_rows))
        self.slice = min(_power_of_two(max(1, batch // self.open)), chunk_rows // self.open)
        self.turns_open = chunk_rows // self.slice  # turns a chunk stays open
        self.stagger = self.turns_open // self.open  # turns between two openings
        self.turns = self.n_chunks * self.stagger  # turns of an epoch
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order in which the chunks are opened in an epoch, and the slice each chunk (by its index) starts with."""
        if self._drawn is None or self._drawn[0] != epoch:
            # the bits of PCG64 are promised by NumPy for ever; what Generator.permutation makes of them is not
            bits = np.random.PCG64([self.seed, epoch])
            chunks = np.argsort(bits.random_raw(self.n_chunks), kind="stable")
            self._drawn = (epoch, chunks, bits.random_raw(self.n_chunks) % self.turns_open)
        return self._drawn[1:]

    def opened(self, epoch: int, step: int) -> list[int]:
        """Chunks open during opening number `step` of an epoch (steps past its end belong to the next one)."""
        epoch, step = epoch + step // self.n_chunks, step % self.n_chunks
        order, _ = self.order(epoch)
        return [int(order[(step - i) % self.n_chunks]) for i in range(self.open)]

    def spans(self, epoch: int, turn: int) -> list[Span]:
        """The slices of one turn; fewer and shorter where they fall beyond the last row."""
        step = turn // self.stagger
        _, first = self.order(epoch)
        spans = []
        for i, chunk in enumerate(self.opened(epoch, step)):
            opened_at = ((step - i) % self.n_chunks) * self.stagger
            turns = (turn - opened_at) % self.turns  # for which the chunk has been open
            start = (turns + int(first[chunk])) % self.turns_open * self.slice
            stop = min(start + self.slice, self.rows - chunk * self.chunk_rows)
            if start < stop:
                spans.append(Span(chunk, start, stop))
        return spans


class Loader:
    """Iterates float32 batches [batch, d] of a store's first `rows` rows (default: all committed ones).

    `epochs=None` never ends (a batch may straddle two epochs); otherwise the last batch may be short. With `world`
    ranks, every rank takes its own `batch` rows of each round of world * batch: none is lost or doubled.
    `state_dict()` after a batch, loaded into a fresh loader of the same arguments, continues with the next batch.
    """

    def __init__(
        self,
        store: ActivationStore,
        batch: int = 4096,
        *,
        seed: int = 0,
        epochs: int | None = None,
        rows: int | None = None,
        open_chunks: int = 32,
        threads: int = 2,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert batch > 0 and open_chunks > 0 and seed >= 0 and 0 <= rank < world, (batch, open_chunks, seed, rank)
        self.store, self.batch, self.epochs = store, batch, epochs
        self.device = torch.device(device)
        self.rank, self.world = rank, world
        self.rows = store.n_rows if rows is None else rows
        if not 0 < self.rows <= store.n_rows:
            raise SaeError(f"{store.path}: {self.rows:,} rows asked for, {store.n_rows:,} are there; harvest more")
        self._order = {"rows": self.rows, "batch": batch * world, "open_chunks": open_chunks, "seed": seed}
        self.schedule = Schedule(self.rows, store.chunk_rows, batch * world, open_chunks, seed)
        self.columns = Columns(*(column.to(self.device) for column in store.columns))
        self._place = (0, 0, 0)  # epoch, turn, rows of the turn already given
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._chunks: dict[int, Future[Encoded]] = {}

    def state_dict(self) -> dict[str, int]:
        """Where the next batch starts, and what the order depends on: a few numbers, whatever the store's size."""
        epoch, turn, taken = self._place
        return {"epoch": epoch, "turn": turn, "taken": taken, **self._order}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken. Raises SaeError for a state of another order."""
        for name, mine in self._order.items():
            if state[name] != mine:
                raise SaeError(f"{self.store.path}: the state is of {name} = {state[name]:,}, this loader has {mine:,}")
        self._place = (state["epoch"], state["turn"], state["taken"])

    @property
    def epoch(self) -> int:
        """The epoch the next batch starts in."""
        return self._place[0]

    def __iter__(self) -> Iterator[Tensor]:
        while (spans := self._next_spans()) is not None:
            if spans:
                yield self._gather(spans)
            self._forget()

    def close(self) -> None:
        """Stop the prefetching threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_spans(self) -> list[Span] | None:
        """This rank's part of the next round of world * batch rows; None at the end of the last epoch."""
        wanted = self.batch * self.world
        first, last = self.batch * self.rank, self.batch * (self.rank + 1)
        epoch, turn, taken = self._place
        mine: list[Span] = []
        given = 0
        while given < wanted:
            if turn == self.schedule.turns:
                epoch, turn = epoch + 1, 0
            if self.epochs is not None and epoch >= self.epochs:
                break
            self._prefetch(epoch, turn)
            spans = self.schedule.spans(epoch, turn)
            total = sum(span.stop - span.start for span in spans)
            used = min(total - taken, wanted - given)
            mine += _cut(spans, taken + max(first - given, 0), taken + min(last - given, used))
            given, taken = given + used, taken + used
            if taken == total:
                turn, taken = turn + 1, 0
        self._place = (epoch, turn, taken)
        return mine if given else None

    def _coming(self, epoch: int, turn: int) -> dict[int, None]:
        """Chunks of this opening and the next ones, soonest first."""
        step = turn // self.schedule.stagger
        return dict.fromkeys(c for ahead in range(AHEAD + 1) for c in self.schedule.opened(epoch, step + ahead))

    def _prefetch(self, epoch: int, turn: int) -> None:
        for chunk in self._coming(epoch, turn):
            if chunk not in self._chunks:
                self._chunks[chunk] = self._pool.submit(self.store.encoded_chunk, chunk)

    def _forget(self) -> None:
        """Let go of the chunks that no coming opening needs."""
        coming = self._coming(*self._place[:2])
        for chunk in [chunk for chunk in self._chunks if chunk not in coming]:
            self._chunks.pop(chunk).cancel()

    def _gather(self, spans: list[Span]) -> Tensor:
        """The rows of the spans: copied as stored, decoded on the device."""
        size = sum(span.stop - span.start for span in spans)
        rows: Tensor | None = None
        scale: Tensor | None = None
        filled = 0
        for span in spans:
            chunk = self._chunks[span.chunk].result()
            if rows is None:
                rows = torch.empty((size, self.store.d), dtype=chunk.rows.dtype)
                scale = None if chunk.row_scale is None else torch.empty(size, dtype=chunk.row_scale.dtype)
            end = filled + span.stop - span.start
            rows[filled:end] = chunk.rows[span.start : span.stop]
            if scale is not None and chunk.row_scale is not None:
                scale[filled:end] = chunk.row_scale[span.start : span.stop]
            filled = end
        assert rows is not None
        moved = Encoded(rows.to(self.device), None if scale is None else scale.to(self.device))
        return self.store.codec.decode(moved, self.columns)


def _cut(spans: list[Span], start: int, stop: int) -> list[Span]:
    """The part of consecutive spans that covers places [start, stop) of their rows laid end to end."""
    parts = []
    for span in spans:
        size = span.stop - span.start
        low, high = max(start, 0), min(stop, size)
        if low < high:
            parts.append(Span(span.chunk, span.start + low, span.start + high))
        start, stop = start - size, stop - size
    return parts


def _power_of_two(n: int) -> int:
    """The largest power of two up to n >= 1."""
    return 1 << (n.bit_length() - 1)
