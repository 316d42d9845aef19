"""Shuffled batches of rows from activation stores.

Rows were permuted inside their window when they were written, so mixing at read time needs no gather: a batch is made
of one contiguous slice of each of `open_chunks` chunks (loading.schedule says which). The order is a closed formula of
the seed, so it is the same for any number of threads, and the state is three numbers.

Threads open chunks (loader.chunks) and gather the rows of coming steps (loader.prefetch). To a GPU a step goes as it is
stored, from pinned memory, on a stream of its own (loader.rooms), and batches are decoded there, by the operations that
the CPU does one by one, so to the same bits. Memory is bounded whatever the store's size. Of each store there are, of a
chunk's size (13 MB of int8 at width 768, 24 MiB at most): as many rooms as threads and one, but five at most, on a GPU
as many there; and of a compressed or remote store `open_chunks` decoded chunks, two, and the store's share of one a
thread. It reads no further ahead than the end of an epoch.

Given up: a pass opens up to `open_chunks` - 1 chunks twice, and where documents are long a batch mixes them less well
than a permutation of all rows would (cache.loader.shuffle_quality measures it).
"""

import inspect
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self, TypedDict, Unpack, final
from weakref import WeakSet, finalize

import numpy as np
import torch
from torch import Tensor

from sae.cache.activations import ActivationStore, origin
from sae.cache.disk.identity import canonical
from sae.cache.disk.parsing import whole
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.prefetch import Prefetcher, Threads
from sae.cache.loader.rooms import Room
from sae.cache.loader.schedule import OPEN_CHUNKS, BatchRows, LoaderPosition, Schedule, Spans, shares
from sae.cache.outliers import Outliers, largest_norm
from sae.cache.store.codecs import Columns, Encoded, from_numpy

MOST_THREADS = 16  # a loader's own: each holds a chunk more


class Batch(NamedTuple):
    """Some rows of a dataset. x: float32 [B, d_in]. y: float32 [B, d_out], x itself where the inputs are the targets.
    position: int64 [B], the token or the sample that each row came from, where it was asked for."""

    x: Tensor
    y: Tensor
    position: Tensor | None = None

    def split(self, parts: int) -> "list[Batch]":
        """The batch in so many parts of (almost) equal size; y stays x where it is."""
        xs = self.x.tensor_split(parts)
        ys = xs if self.y is self.x else self.y.tensor_split(parts)
        positions = [None] * parts if self.position is None else self.position.tensor_split(parts)
        return [Batch(*each) for each in zip(xs, ys, positions, strict=True)]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its rows on a device; y stays x where it is."""
        x = self.x.to(device)
        return self._replace(x=x, y=x if self.y is self.x else self.y.to(device))


class Settings(TypedDict, total=False):
    """Settings of every loader."""

    seed: int  # of the order; default 0
    epochs: int | None  # passes over the rows; default None: it never ends, and a batch may straddle two epochs
    rows: int | None  # the first rows of the store; default None: all that were committed
    open_chunks: int  # chunks mixed at any time; default 64
    threads: int | None  # that check and decode chunks ahead; default None: as `usual_threads` says
    device: str | torch.device  # where batches go; default the CPU
    rank: int  # which share of every round of world * batch rows is this loader's; default 0
    world: int  # default 1
    outliers: float | None  # leave out rows whose norm is above so many medians of norms; default None: keep all
    largest: (
        float | Sequence[float | None] | None
    )  # leave out rows of a larger norm (in any store; None: of any norm); default: as `outliers` says


class _Stored:
    """The part that both loaders share: the order, the state, and batches as stored."""

    def __init__(
        self,
        stores: Sequence[ActivationStore],
        batch: int,
        *,
        seed: int = 0,
        epochs: int | None = None,
        rows: int | None = None,
        open_chunks: int = OPEN_CHUNKS,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world: int = 1,
        outliers: float | None = None,
        largest: float | Sequence[float | None] | None = None,
    ) -> None:
        assert batch > 0 and open_chunks > 0 and seed >= 0 and 0 <= rank < world, (batch, open_chunks, seed, rank)
        self.stores, self.batch, self.epochs = tuple(stores), batch, epochs
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.rows = _common_rows(self.stores) if rows is None else rows
        for store in self.stores:
            if not 0 < self.rows <= store.n_rows:
                raise SaeError(f"{store.path}: {self.rows:,} rows asked for, {store.n_rows:,} are there; harvest more")
        limits: list[float | None] | None = None
        if largest is not None:
            limits = [largest] * len(self.stores) if isinstance(largest, float | int) else [*largest]
            if len(limits) != len(self.stores):
                raise SaeError(f"largest: {len(limits)} norms for {len(self.stores)} stores; give one for each, or one")
        elif outliers is not None:
            limits = [largest_norm(store, outliers) for store in self.stores]
        alike = limits is not None and len({*limits}) == 1
        self._order: dict[str, Any] = {
            "rows": self.rows, "batch": batch * world, "open_chunks": open_chunks, "seed": seed,
            **({} if outliers is None else {"outliers": outliers}),
            **({} if outliers is not None or limits is None else {"largest": limits[0] if alike else limits}),
        }  # fmt: skip
        sizes = [store.chunk_rows for store in self.stores]
        dropped = None if limits is None else Outliers(self.stores, max(sizes), tuple(limits))
        self.schedule = Schedule(
            self.rows, max(sizes), batch * world, open_chunks, seed, piece=min(sizes), dropped=dropped
        )
        self._columns = [Columns(*(column.to(self.device) for column in store.columns)) for store in self.stores]
        self._place = LoaderPosition()
        self._last: list[tuple[Spans, int, int]] = []  # the steps, and rows [low, high) of each, of the last batch
        self._threads = Threads(usual_threads() if threads is None else threads)
        self._running: WeakSet[Generator[list[Encoded], None, None]] = WeakSet()
        finalize(self, _end, self._running)

    def state_dict(self) -> dict[str, Any]:
        """Return the start of the next batch, and what the order depends on: a few numbers, whatever the store's
        size.
        """
        return {**self._place._asdict(), **self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken (by any rank). Raises SaeError for a state of another order."""
        for name in {**self._order, **state}:
            given, mine = state.get(name), self._order.get(name)
            if name not in LoaderPosition._fields and given != mine:
                where = self.stores[0].path
                raise SaeError(f"{where}: the state is of {name} = {given}, this loader has {mine}")
        try:
            place = LoaderPosition(whole(state, "epoch", 0, 1 << 40), whole(state, "step"), whole(state, "taken"))
            if place.step >= self.schedule.steps or place.taken > self.schedule.count(place.epoch, place.step):
                raise ValueError(f"step {place.step} of {self.schedule.steps} has no row {place.taken}")
        except ValueError as error:
            raise DamagedStore(f"{self.stores[0].path}: the state of its loader is not one ({error})") from error
        self._place = place

    @property
    def epoch(self) -> int:
        """The epoch the next batch starts in."""
        return self._place.epoch

    @property
    def threads(self) -> int:
        """The threads that check and decode chunks."""
        return self._threads.count

    def close(self) -> None:
        """Stop the reading threads."""
        self._threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encoded(self) -> Iterator[list[Encoded]]:
        """Batches as they are stored: numbers and row scales of each store, on the device, for `codec.decode`.

        They are views of memory that is used again, valid until the next batch is asked for. On a GPU that is meant of
        the order of its work: all batches are to be asked for on the stream that reads them.
        """
        batches = self._encoded()
        self._running.add(batches)
        return batches

    def _encoded(self) -> Generator[list[Encoded], None, None]:
        begun: list[list[Encoded]] = []  # the parts of a batch, store by store
        spans: list[tuple[Spans, int, int]] = []  # and which rows of a step they are
        coming: deque[BatchRows] = deque()
        got = 0
        with self._filler() as shares_of_steps:
            for share, room in shares_of_steps:
                coming.extend(share.batches)
                low, there = 0, share.spans.rows
                while low < there:
                    size = coming[0].rows
                    high = min(there, low + size - got)
                    begun.append(self._taken(room, low, high, keep=got + high - low < size))
                    spans.append((share.spans, low, high))
                    got, low = got + high - low, high
                    if got == size:
                        self._place, self._last = coming.popleft().after, spans
                        yield [_joined(parts) for parts in zip(*begun, strict=True)]
                        begun, spans, got = [], [], 0

    def _filler(self) -> Prefetcher:
        plan = shares(
            self.schedule, self._place, batch=self.batch, epochs=self.epochs, rank=self.rank, world=self.world
        )
        return Prefetcher(self.stores, self.schedule, plan, device=self.device, threads=self._threads)

    def _taken(self, room: Room, low: int, high: int, *, keep: bool) -> list[Encoded]:
        """Rows of a room; with `keep` they outlive what the room holds."""
        parts = [one.part(low, high) for one in room.there]
        return [part.clone() for part in parts] if keep else parts

    def _decoded(self) -> Iterator[tuple[Tensor, ...]]:
        """Batches as float32, each with memory of its own."""
        for batch in self.encoded():
            each = zip(self.stores, batch, self._columns, strict=True)
            yield tuple(store.codec.decode(one, columns) for store, one, columns in each)


@final
class Loader(_Stored):
    """Iterates float32 batches [batch, d] of a store's rows, each with memory of its own.

    With finite `epochs` the last batch may be short. With `world` ranks each takes its own `batch` rows of a round of
    world * batch: none is lost or doubled, and the shares of a short last round differ by at most one row (a rank whose
    share is empty gets no batch of it).
    `state_dict()` after a batch, loaded into a fresh loader of the same arguments, continues with the next batch.
    Raises SaeError for settings the store cannot serve, DamagedStore where its bytes are not those committed.
    """

    def __init__(self, store: ActivationStore, batch: int = 4096, **settings: Unpack[Settings]) -> None:
        super().__init__([store], batch, **settings)

    def __iter__(self) -> Iterator[Tensor]:
        return (batch[0] for batch in self._decoded())


@final
class Batches(_Stored):
    """As `Loader`, over aligned stores at once: a `Batch` of the inputs' rows and the targets'.

    Where several stores are one side their rows lie side by side: d_in is the sum of their widths.

    targets: none where the inputs are what is to be reconstructed. positions: whether batches say what each row is of,
    which takes reading it. Raises SaeError where the stores' rows do not align.
    """

    def __init__(
        self, inputs: Sequence[ActivationStore], targets: Sequence[ActivationStore] = (), batch: int = 4096, *,
        positions: bool = False, **settings: Unpack[Settings],
    ) -> None:  # fmt: skip
        stores = [*inputs, *targets]
        expect_aligned(stores, settings.get("rows"))
        super().__init__(stores, batch, **settings)
        self._inputs, self._with_positions = len(inputs), positions
        chunk = stores[0].arrays["position"].chunk_rows
        self._positions = lru_cache(maxsize=self.schedule.open + 2)(
            lambda index: stores[0].positions(index * chunk, min((index + 1) * chunk, stores[0].n_rows))
        )

    def __iter__(self) -> Iterator[Batch]:
        for rows in self._decoded():
            x = side_by_side(rows[: self._inputs])
            y = side_by_side(rows[self._inputs :]) if rows[self._inputs :] else x
            yield Batch(x, y, self._positions_of_last() if self._with_positions else None)

    def _positions_of_last(self) -> Tensor:
        """int64 [B]: the positions of the rows of the last batch."""
        chunk = self.stores[0].arrays["position"].chunk_rows
        found = [
            self._positions(start // chunk)[start % chunk : start % chunk + stop - start]
            for step, low, high in self._last
            for start, stop in zip(*step.split([low, high])[1], strict=True)
        ]
        return from_numpy(np.concatenate(found))


def side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """The rows [n, d] of one store as they are; those of several as [n, the sum of their widths]."""
    return rows[0] if len(rows) == 1 else torch.cat([*rows], dim=1)


def expect_aligned(stores: Sequence[ActivationStore], rows: int | None = None) -> None:
    """Raise SaeError unless row i of every store came from one and the same token, for the first `rows` (None: all)."""
    first = stores[0]
    for other in stores[1:]:
        mine, its = first.recipe, other.recipe
        for differs, what in (
            (canonical(origin(mine)) != canonical(origin(its)), "from other tokens"),
            (mine.get("rows") != its.get("rows"), "by another rule which tokens become rows"),
        ):
            if differs:
                raise SaeError(
                    f"{other.path}: was made {what} than {first.key}, so their rows do not align; "
                    "make both from one token store with the same settings"
                )
    shortest, longest = (pick(stores, key=lambda store: store.n_rows) for pick in (min, max))
    if rows is not None and common_rows(stores) < rows <= shortest.n_rows:
        raise SaeError(
            f"{shortest.path}: its last rows lie in another order than those of {longest.key}, as it was made when the "
            f"text ended earlier; read the first {common_rows(stores):,} alone, or remove it and harvest it again"
        )


def common_rows(stores: Sequence[ActivationStore]) -> int:
    """The number of first rows that lie in the same windows of every store, in which alone they are permuted alike."""
    ends = set.intersection(*({window.stop for window in store.manifest.windows} for store in stores))
    return max(ends, default=0)


def usual_threads() -> int:
    """The threads of a loader that is told no number: as many as compute (`--threads`), so each process that shares a
    machine has its share of them. At least 2, at most 16."""
    return min(max(2, torch.get_num_threads()), MOST_THREADS)


def _common_rows(stores: Sequence[ActivationStore]) -> int:
    """The number of rows all stores have. Raises SaeError where they differ."""
    for other in stores[1:]:
        if other.n_rows != stores[0].n_rows:
            shorter, longer = sorted((stores[0], other), key=lambda store: store.n_rows)
            raise SaeError(
                f"{shorter.path}: has {shorter.n_rows:,} rows, {longer.key} has {longer.n_rows:,}; harvest more of it"
            )
    return stores[0].n_rows


def _end(running: Iterable[Generator[list[Encoded], None, None]]) -> None:
    """End iterators that are still open when the interpreter exits, while there are modules to do it with."""
    for batches in list(running):
        if inspect.getgeneratorstate(batches) != inspect.GEN_RUNNING:  # as it may be in a daemon thread
            batches.close()


def _joined(parts: Sequence[Encoded]) -> Encoded:
    if len(parts) == 1:
        return parts[0]
    scales = [part.row_scale for part in parts if part.row_scale is not None]
    return Encoded(torch.cat([part.rows for part in parts]), torch.cat(scales) if scales else None)
