"""The loader: every row exactly once an epoch, in an order that nothing but the seed decides."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_stores import CHUNK, few, heavy_rows, shrunk, some, write_activations
from torch import Tensor

from cache.activations import ActivationStore
from cache.errors import DamagedStore, SaeError
from cache.loader import AHEAD, Loader, Schedule
from cache.manifest import Windows

N = 9 * CHUNK + 5


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


def numbered(n: int) -> Tensor:
    """Rows [n, 2] that say which they are."""
    return torch.stack([torch.arange(n), -torch.arange(n)], dim=1).float()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    return write_activations(tmp_path_factory.mktemp("loader"), numbered(N), "float32", ended=True)


def numbers(batch: Tensor) -> list[int]:
    assert torch.equal(batch[:, 0], -batch[:, 1])
    return [int(n) for n in batch[:, 0]]


def batches(loader: Loader, most: int | None = None) -> list[list[int]]:
    with loader:
        return [numbers(batch) for batch in islice(loader, most)]


def laid_out(batches: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


# --- the schedule: arithmetic alone -----------------------------------------------------------------------------------


@some
@given(
    st.integers(1, 5000), st.integers(0, 8).map(lambda n: 1 << n), st.integers(1, 300), st.integers(1, 40),
    st.integers(0, 9), st.integers(0, 3),
)  # fmt: skip
def test_a_schedule_visits_every_row_once(
    rows: int, chunk_rows: int, batch: int, open_chunks: int, seed: int, epoch: int
) -> None:
    schedule = Schedule(rows, chunk_rows, batch, open_chunks, seed)
    visits = np.zeros(rows, np.int64)
    for turn in range(schedule.turns):
        spans = schedule.spans(epoch, turn)
        assert len({span.chunk for span in spans}) == len(spans) <= open_chunks
        for chunk, start, stop in spans:
            assert 0 <= start < stop <= chunk_rows
            visits[chunk * chunk_rows + start : chunk * chunk_rows + stop] += 1
        assert {span.chunk for span in spans} <= set(schedule.opened(epoch, turn // schedule.stagger))
    assert visits.tolist() == [1] * rows


def test_a_batch_of_the_usual_size_is_one_turn() -> None:
    schedule = Schedule(1 << 20, 16_384, 4096, 32, 0)
    assert (schedule.open, schedule.slice, schedule.turns_open, schedule.stagger) == (32, 128, 128, 4)
    assert all(sum(s.stop - s.start for s in schedule.spans(0, turn)) == 4096 for turn in range(schedule.turns))


def test_chunks_are_opened_one_at_a_time() -> None:
    schedule = Schedule(64 * 256, 256, 64, 16, 0)
    for epoch in range(2):
        for step in range(schedule.n_chunks - 1):
            before, after = (set(schedule.opened(epoch, step + i)) for i in (0, 1))
            assert len(after - before) == len(before - after) == 1
    assert schedule.opened(0, schedule.n_chunks + 3) == schedule.opened(1, 3)


def test_the_order_is_pinned() -> None:
    """A training run resumed years later sees what it would have seen, whatever NumPy's version."""
    spans = Schedule(10 * 64, 64, 16, 4, seed=7).spans(3, 21)
    assert [tuple(span) for span in spans] == [(1, 12, 16), (5, 52, 56), (3, 20, 24), (7, 60, 64)]


# --- what comes out ---------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, N), st.integers(1, 120), st.integers(1, 12), st.integers(0, 3), st.integers(1, 3))
def test_every_row_once_an_epoch(
    store: ActivationStore, rows: int, batch: int, open_chunks: int, seed: int, epochs: int
) -> None:
    found = batches(Loader(store, batch, rows=rows, open_chunks=open_chunks, seed=seed, epochs=epochs))
    assert [len(one) for one in found[:-1]] == [batch] * (len(found) - 1)  # batches straddle epochs
    stored = [int(n) for n in store.positions(0, rows)]  # the first rows of the store, not of the text
    flat = laid_out(found)
    for epoch in range(epochs):
        assert sorted(flat[epoch * rows : (epoch + 1) * rows]) == sorted(stored)
    assert len(flat) == epochs * rows


def test_the_order_is_shuffled_and_new_every_epoch(store: ActivationStore) -> None:
    first, second = np.array(laid_out(batches(Loader(store, 16, epochs=2)))).reshape(2, N)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(N))
    other = np.array(laid_out(batches(Loader(store, 16, epochs=1, seed=1))))
    assert not np.array_equal(first, other)


def test_even_a_store_of_one_chunk_is_not_the_same_every_epoch(store: ActivationStore) -> None:
    epochs = np.array(laid_out(batches(Loader(store, 4, rows=CHUNK, epochs=12)))).reshape(12, CHUNK)
    assert len({epoch.tobytes() for epoch in epochs}) > 4


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_nothing(store: ActivationStore, threads: int) -> None:
    reference = batches(Loader(store, 24, open_chunks=4, threads=2, epochs=2))
    assert batches(Loader(store, 24, open_chunks=4, threads=threads, epochs=2)) == reference


@few
@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 12), st.integers(1, N))
def test_resuming_from_any_batch(store: ActivationStore, batch: int, open_chunks: int, done: int, rows: int) -> None:
    def loader() -> Loader:
        return Loader(store, batch, open_chunks=open_chunks, rows=rows, seed=5)

    whole = batches(loader(), done + 8)
    with loader() as first:
        iterator = iter(first)
        assert [numbers(next(iterator)) for _ in range(done)] == whole[:done]
        state = first.state_dict()
    assert all(type(value) is int for value in state.values())
    with loader() as second:
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert [numbers(one) for one in islice(second, 8)] == whole[done:]


def test_a_state_of_another_order_is_refused(store: ActivationStore) -> None:
    with Loader(store, 16) as loader:
        state = loader.state_dict()
    for name, other in (
        ("rows", Loader(store, 16, rows=100)),
        ("batch", Loader(store, 17)),
        ("seed", Loader(store, 16, seed=1)),
        ("open_chunks", Loader(store, 16, open_chunks=4)),
    ):
        with other, pytest.raises(SaeError, match=rf"the state is of {name} = \d+, this loader has \d+"):
            other.load_state_dict(state)


@few
@given(st.integers(1, 4), st.integers(1, 50), st.integers(1, 12), st.integers(1, N))
def test_ranks_share_every_round(store: ActivationStore, world: int, batch: int, open_chunks: int, rows: int) -> None:
    """Rank by rank, the batches of a round laid end to end are those of one loader with the whole batch."""
    whole = batches(Loader(store, batch * world, open_chunks=open_chunks, rows=rows, epochs=2))
    ranks = [
        batches(Loader(store, batch, open_chunks=open_chunks, rows=rows, epochs=2, rank=rank, world=world))
        for rank in range(world)
    ]
    for turn, expected in enumerate(whole):
        parts = [one[turn] if turn < len(one) else [] for one in ranks]
        assert laid_out(parts) == expected
        assert max(map(len, parts)) == min(batch, len(expected))


def test_endless_batches_straddle_epochs(store: ActivationStore) -> None:
    with Loader(store, 50) as loader:
        found = [numbers(one) for one in islice(loader, 20)]
        assert {len(one) for one in found} == {50}
        assert loader.epoch == 1000 // N
    counts = Counter(laid_out(found))
    assert set(counts.values()) <= {1000 // N, 1000 // N + 1}


@pytest.mark.parametrize("codec", ["int8", "bfloat16", "float16", "float32"])
def test_batches_are_the_stores_rows(tmp_path: Path, codec: str) -> None:
    """Decoded from slices as from whole chunks; a batch belongs to whoever got it."""
    store = write_activations(tmp_path, heavy_rows(4 * CHUNK, 5), codec)
    expected = store.rows(0, store.n_rows)
    with Loader(store, 48, epochs=1, open_chunks=2) as loader:
        found = []
        for batch in loader:
            assert (batch.dtype, batch.is_contiguous()) == (torch.float32, True)
            found.append(batch.clone())
            batch.fill_(7.0)
    rows = torch.cat(found)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_rows_beyond_the_store_are_refused(store: ActivationStore) -> None:
    for rows in (0, N + 1):
        with pytest.raises(SaeError, match=rf"{rows} rows asked for, {N} are there; harvest more"):
            Loader(store, rows=rows)


def test_a_damaged_chunk_stops_the_loader(tmp_path: Path) -> None:
    store = write_activations(tmp_path, numbered(4 * CHUNK), "float32")
    path = store.path / "rows/c/2/0"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with (
        Loader(store, 16, epochs=1) as loader,
        pytest.raises(DamagedStore, match=re.escape(f"{path}: damaged")),
    ):
        list(loader)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Open chunks and the few that come next, whatever the store's size; twice as many between two epochs."""
    store = write_activations(tmp_path, numbered(64 * CHUNK), "float32")
    opened = 8
    with Loader(store, 16, open_chunks=opened, epochs=2) as loader:
        held = []
        for _ in loader:
            held.append(len(loader._chunks))
    steps = loader.schedule.n_chunks
    assert max(held) <= 2 * opened + AHEAD
    assert sorted(held)[len(held) // 2] <= opened + AHEAD
    assert steps == 64


def test_a_chunk_is_read_about_once_an_epoch(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: Counter[int] = Counter()
    lock = threading.Lock()

    def count(self: ActivationStore, index: int) -> object:
        with lock:
            reads[index] += 1
        return original(self, index)

    original = ActivationStore.encoded_chunk
    monkeypatch.setattr(ActivationStore, "encoded_chunk", count)
    batches(Loader(store, 16, open_chunks=4, epochs=3))
    # a chunk half read when an epoch starts is read again at its end; four are fetched for an epoch that never comes
    assert sum(reads.values()) <= 3 * (10 + 3) + 4
    assert sorted(reads) == list(range(10))


def variance_ratio(store: ActivationStore, rows: Tensor, batch: int) -> float:
    """Variance of batch means times the batch, over the variance of rows: 1 for independent rows."""
    with Loader(store, batch, epochs=2) as loader:
        means = torch.stack([one.mean(dim=0) for one in loader if len(one) == batch])
    return float((means.var(dim=0) * batch / rows.var(dim=0)).mean())


def test_documents_are_mixed(tmp_path: Path) -> None:
    """Rows of a document resemble each other (correlation .3); batches must not: at most 1.1 of independent ones."""
    with shrunk() as patch:
        patch.setattr("cache.activations.CHUNK_ROWS", 256)
        patch.setattr("cache.activations.WINDOWS", Windows(256, 4096))
        random = torch.Generator().manual_seed(0)
        n, d, document = 16 * 4096, 24, 50
        effects = torch.randn(-(-n // document), d, generator=random).repeat_interleave(document, dim=0)[:n]
        rows = 0.3**0.5 * effects + 0.7**0.5 * torch.randn(n, d, generator=random)
        store = write_activations(tmp_path, rows, "float32")
        in_order = rows.reshape(-1, 512, d).mean(dim=1).var(dim=0) * 512 / rows.var(dim=0)
        assert float(in_order.mean()) > 10
        assert 0.9 < variance_ratio(store, rows, 512) <= 1.1
