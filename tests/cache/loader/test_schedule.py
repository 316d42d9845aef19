"""Which rows come when: arithmetic alone, against slow obvious twins."""

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import some

from sae.cache.errors import SaeError
from sae.cache.loader.schedule import LoaderPosition, Schedule, Share, Spans, shares

sizes = (
    st.integers(1, 3000), st.integers(0, 8).map(lambda n: 1 << n), st.integers(1, 300), st.integers(1, 40),
    st.integers(0, 9),
)  # fmt: skip


def rows_of(spans: Spans) -> list[int]:
    every = zip(spans.start.tolist(), spans.stop.tolist(), strict=True)
    return [row for start, stop in every for row in range(start, stop)]


def epoch_rows(schedule: Schedule, epoch: int) -> list[int]:
    return [row for step in range(schedule.steps) for row in rows_of(schedule.spans(epoch, step))]


@some
@given(*sizes, st.integers(0, 3), st.integers(0, 6).map(lambda n: 1 << n))
def test_every_row_comes_once_an_epoch(
    rows: int, chunk_rows: int, batch: int, open_chunks: int, seed: int, epoch: int, piece: int
) -> None:
    schedule = Schedule(rows, chunk_rows, batch, open_chunks, seed, piece=piece)
    for step in range(schedule.steps):
        spans = schedule.spans(epoch, step)
        assert (spans.start // chunk_rows == (spans.stop - 1) // chunk_rows).all()
        assert (spans.start // piece == (spans.stop - 1) // piece).all()
        assert len(set((spans.start // chunk_rows).tolist())) <= open_chunks
        assert schedule.count(epoch, step) == spans.rows <= chunk_rows
    assert sorted(epoch_rows(schedule, epoch)) == list(range(rows))


def test_a_batch_of_the_usual_size_is_a_slice_of_every_open_chunk() -> None:
    schedule = Schedule(1 << 20, 16_384, 4096, 32, 0)
    assert (schedule.open, schedule.segment, schedule.slice) == (32, 512, 128)
    spans = schedule.spans(0, 3)
    assert len(spans.start) == 4 * 32
    for turn in range(4):
        mine = slice(32 * turn, 32 * turn + 32)
        assert ((spans.stop - spans.start)[mine] == 128).all()
        assert len(set((spans.start[mine] // 16_384).tolist())) == 32
        assert np.array_equal(spans.start[mine] // 512, spans.start[:32] // 512)  # from one segment of each


def test_one_chunk_is_opened_a_step_and_keeps_its_place() -> None:
    schedule = Schedule(64 * 256, 256, 64, 16, 0)
    for step in range(schedule.steps - 1):
        before, after = (schedule.segments(0, step + i)[0] // 256 for i in (0, 1))
        assert (before != after).sum() == 1


def test_the_order_is_pinned() -> None:
    """A training run resumed years later sees what it would have seen, whatever NumPy's version."""
    spans = Schedule(10 * 64, 64, 16, 4, seed=7).spans(3, 5)
    places = list(zip((spans.start // 64).tolist(), (spans.start % 64).tolist(), strict=True))
    assert places[:8] == [(5, 48), (1, 8), (7, 56), (3, 16), (5, 52), (1, 12), (7, 60), (3, 20)]


@some
@given(*sizes, st.lists(st.integers(0, 3000), max_size=30))
def test_splitting(rows: int, chunk_rows: int, batch: int, open_chunks: int, seed: int, places: list[int]) -> None:
    spans = Schedule(rows, chunk_rows, batch, open_chunks, seed).spans(0, 0)
    places = sorted(min(place, spans.rows) for place in places)
    flat = rows_of(spans)
    parts = [flat[low:high] for low, high in pairwise([0, *places, len(flat)])]
    assert [rows_of(part) for part in spans.split(places)] == parts


@some
@given(*sizes, st.sets(st.integers(0, 3000), max_size=200))
def test_dropped_rows_are_left_out(
    rows: int, chunk_rows: int, batch: int, open_chunks: int, seed: int, dropped: set[int]
) -> None:
    def of(chunk: int) -> np.ndarray:
        return np.array(sorted(row for row in dropped if row // chunk_rows == chunk), np.int64)

    every = epoch_rows(Schedule(rows, chunk_rows, batch, open_chunks, seed), 1)
    kept = epoch_rows(Schedule(rows, chunk_rows, batch, open_chunks, seed, dropped=of), 1)
    assert kept == [row for row in every if row not in dropped]


def test_without_any_row_there_is_an_error_and_no_endless_search() -> None:
    schedule = Schedule(10, 4, 2, 2, 0, dropped=lambda chunk: np.arange(4 * chunk, 4 * chunk + 4))
    with pytest.raises(SaeError, match="every one of the 10 rows is an outlier"):
        schedule.after(LoaderPosition(3, 1, 0), 5, None)
    assert schedule.after(LoaderPosition(0, 1, 0), 5, 1)[0] == 0


@some
@given(*sizes, st.integers(1, 5), st.integers(1, 3), st.integers(0, 40))
def test_ranks_share_every_round(
    rows: int, chunk_rows: int, batch: int, open_chunks: int, seed: int, world: int, epochs: int, from_round: int
) -> None:
    """Rank by rank, the shares of a round laid end to end are the round: nothing lost, nothing doubled."""
    schedule = Schedule(rows, chunk_rows, batch * world, open_chunks, seed)
    every = [row for epoch in range(epochs) for row in epoch_rows(schedule, epoch)]
    given, place = schedule.after(LoaderPosition(), from_round * batch * world, epochs)
    expected = [every[low : low + batch * world] for low in range(given, len(every), batch * world)]
    ranks = []
    for rank in range(world):
        found = list(shares(schedule, place, batch=batch, epochs=epochs, rank=rank, world=world))
        ranks.append(batches_of(found))
    for number, whole in enumerate(expected):
        parts = [one[number] if number < len(one) else [] for one in ranks]
        assert [row for part in parts for row in part] == whole
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert max(map(len, ranks)) == len(expected)


def batches_of(found: list[Share]) -> list[list[int]]:
    """The rows of a rank cut into its batches, each of which is announced where it starts."""
    flat = [row for share in found for row in rows_of(share.spans)]
    made = []
    for share in found:
        assert share.spans.rows
        for _, size, _ in share.batches:
            made.append(flat[:size])
            flat = flat[size:]
    assert not flat
    return made


def test_a_rank_reads_hardly_more_than_its_own_chunks() -> None:
    """Four ranks and 32 open chunks: eight each, and one more where rounds do not end with turns."""
    schedule = Schedule(100 * 256 - 77, 256, 4 * 16, 32, 0)
    own = []
    for rank in range(4):
        for share in islice(shares(schedule, LoaderPosition(), batch=16, epochs=1, rank=rank, world=4), 100):
            own.append(len(set((share.spans.start // 256).tolist())))
    assert sorted(own)[len(own) // 2] <= 9
    assert sum(own) / len(own) <= 10
