"""The loader: every row exactly once an epoch, in an order that nothing but the seed decides."""

import gc
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.harvesting import synthesize
from support.small_stores import CHUNK, few, files, heavy_rows, shrunk, write_activations
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.paths import parse_path
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.chunks import Chunks, DecodingReader, DirectReader
from sae.cache.loader.loader import Batches, Loader, Settings
from sae.cache.loader.prefetch import Prefetcher
from sae.cache.loader.schedule import LoaderPosition, shares
from sae.cache.store.codecs import to_numpy
from sae.cache.store.manifest import Windows
from sae.pipeline.harvest.sources.synthetic import Independent, SyntheticConfig
from sae.pipeline.runtime.progress import Silent

ROOT = Path(__file__).resolve().parents[3]

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


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(plain: dict[str, ActivationStore], threads: int) -> None:
    """Neither the order nor a bit, also where another number of them goes on."""
    for codec, store in plain.items():
        settings: Settings = {"open_chunks": 4, "epochs": 2, "seed": 3}
        with Loader(store, 24, threads=1, **settings) as loader:
            expected = list(loader)
        found = []
        with (
            Loader(store, 24, threads=threads, **settings) as before,
            Loader(store, 24, threads=3, **settings) as after,
        ):
            found += islice(before, 17)
            after.load_state_dict(before.state_dict())
            found += after
        assert len(found) == len(expected), codec
        assert all(map(torch.equal, found, expected)), codec


def test_as_many_threads_as_compute(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for computing, reading in ((1, 2), (5, 5), (64, 16)):
        monkeypatch.setattr(torch, "get_num_threads", lambda computing=computing: computing)
        with Loader(store) as one, Loader(store, threads=3) as told:
            assert (one.threads, told.threads) == (reading, 3)


def loading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


@pytest.mark.parametrize("end", ["closed", "failed", "forgotten"])
def test_threads_end_with_the_loader(plain: dict[str, ActivationStore], end: str) -> None:
    assert not loading_threads()
    loader = Loader(plain["int8"], 24, threads=5)
    stream = iter(loader)
    next(stream)
    assert 2 <= len(loading_threads()) <= 5 + 4
    if end == "closed":
        loader.close()
    elif end == "failed":
        with pytest.raises(ZeroDivisionError), loader:
            raise ZeroDivisionError
    else:
        del loader, stream
        gc.collect()
        for thread in loading_threads():
            thread.join(20)
    assert not loading_threads()


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
        with other, pytest.raises(SaeError, match=rf"the state is of {name} = \w+, this loader has \d+"):
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
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_endless_batches_straddle_epochs(store: ActivationStore) -> None:
    with Loader(store, 50) as loader:
        found = [numbers(one) for one in islice(loader, 20)]
        assert {len(one) for one in found} == {50}
        assert loader.epoch == 1000 // N
    counts = Counter(laid_out(found))
    assert set(counts.values()) <= {1000 // N, 1000 // N + 1}


every_reader = pytest.mark.parametrize(
    "codec", ["int8", "int8:zstd=none", "bfloat16", "bfloat16:zstd=1", "float16", "float32"]
)


@every_reader
@pytest.mark.parametrize("batch", [48, 64])
def test_batches_are_the_stores_rows(tmp_path: Path, codec: str, batch: int) -> None:
    """DecodingReader from slices as from whole chunks; a batch belongs to whoever got it."""
    store = write_activations(tmp_path, heavy_rows(4 * CHUNK, 5), codec)
    expected = store.rows(0, store.n_rows)
    with Loader(store, batch, epochs=1, open_chunks=2) as loader:
        found = []
        for one in loader:
            assert (one.dtype, one.is_contiguous()) == (torch.float32, True)
            found.append(one.clone())
            one.fill_(7.0)
    rows = torch.cat(found)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


@few
@given(st.integers(1, 120), st.integers(1, 12), st.integers(1, 3), st.integers(CHUNK, N), st.sampled_from([1, 3, 1024]))
def test_rows_come_as_the_schedule_says(
    plain: dict[str, ActivationStore], batch: int, open_chunks: int, world: int, rows: int, most: int
) -> None:
    """In its order, span by span, however many of them one read can fill."""
    for codec, store in plain.items():
        settings: Settings = {"open_chunks": open_chunks, "rows": rows, "world": world, "rank": world - 1}
        with pytest.MonkeyPatch.context() as patch, Loader(store, batch, **settings, outliers=1.2) as loader:
            patch.setattr("sae.cache.loader.chunks.IOV_MAX", most)
            found = [[part.clone() for part in one] for one in islice(loader.encoded(), 6)]
        plan = shares(loader.schedule, LoaderPosition(), batch=batch, epochs=None, rank=world - 1, world=world)
        spans = (span for share in plan for span in zip(*map(np.ndarray.tolist, share.spans), strict=True))
        expected = islice(chain.from_iterable(range(*span) for span in spans), sum(len(one[0].rows) for one in found))
        numbers = list(expected)
        assert numbers, codec
        rows_found = torch.cat([one[0].rows for one in found])
        assert np.array_equal(to_numpy(rows_found), store.read("rows", 0, store.n_rows)[numbers]), codec
        if store.codec.has_row_scale:
            scales = np.concatenate([one[0].row_scale for one in found])
            assert np.array_equal(scales, store.read("row_scale", 0, store.n_rows)[numbers])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, small: None) -> dict[str, ActivationStore]:
    root = tmp_path_factory.mktemp("plain")
    rows = heavy_rows(N, 3)
    return {codec: write_activations(root, rows, codec, ended=True) for codec in ("int8:zstd=none", "bfloat16", "int8")}


def test_a_step_reads_each_open_chunk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_activations(tmp_path, numbered(16 * CHUNK), "float32")
    with Loader(store, 16, open_chunks=8, epochs=2, threads=1) as loader:
        rows = loader.encoded()
        for _ in range(16 * CHUNK // 16):  # chunks are checked in the first pass
            next(rows)
        reads: list[int] = []
        original = os.preadv

        def preadv(handle: int, rooms: list[memoryview], at: int) -> int:
            reads.append(len(rooms))
            return original(handle, rooms, at)

        monkeypatch.setattr(os, "preadv", preadv)
        list(rows)
    assert loader.schedule.slice < loader.schedule.segment
    assert 16 - 3 <= len(reads) / 8 <= 16  # what was read ahead is not counted
    assert set(reads) == {loader.schedule.segment // loader.schedule.slice}


def test_open_iterators_end_before_the_interpreter_does(tmp_path: Path) -> None:
    """Later, the modules they need to end are gone."""
    store = write_activations(tmp_path, numbered(2 * CHUNK), "float32")
    script = f"""
import atexit, inspect
atexit.register(lambda: print(*map(inspect.getgeneratorstate, (first, second, third))))  # after all others
from pathlib import Path
from sae.cache import activations; from sae.cache.store import manifest
from sae.cache.loader import loader
activations.CHUNK_ROWS, activations.WINDOWS = {CHUNK}, manifest.Windows{(store.windows.first, store.windows.largest)}
store = activations.ActivationStore(Path({str(store.path)!r}))
kept = loader.Loader(store, 4)
first, second = kept.encoded(), kept.encoded()
next(first), next(second)
with loader.Loader(store, 4) as closed:
    third = closed.encoded()
    next(third)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("GEN_CLOSED GEN_CLOSED GEN_CLOSED\n", "")


def test_rows_beyond_the_store_are_refused(store: ActivationStore) -> None:
    for rows in (0, N + 1):
        with pytest.raises(SaeError, match=rf"{rows} rows asked for, {N} are there; harvest more"):
            Loader(store, rows=rows)


@every_reader
@pytest.mark.parametrize("harm", ["changed", "cut", "grown", "missing"])
@pytest.mark.parametrize("batch", [16, 64])  # pieces of blocks, whole blocks
def test_a_damaged_chunk_stops_the_loader(tmp_path: Path, codec: str, harm: str, batch: int) -> None:
    store = write_activations(tmp_path, heavy_rows(4 * CHUNK, 5), codec)
    path = store.path / "rows/c/2/0"
    data = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes({"changed": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "grown": data + b"x"}[harm])
    with (
        Loader(store, batch, epochs=1, open_chunks=4) as loader,
        pytest.raises(DamagedStore, match=re.escape(f"{path}: {'missing' if harm == 'missing' else 'damaged'}")),
    ):
        list(loader)


@pytest.mark.parametrize("threads", [1, 5])
def test_damage_is_told_when_its_step_comes(tmp_path: Path, threads: int) -> None:
    """Batches before it are given, whoever found it how far ahead."""
    store = write_activations(tmp_path, heavy_rows(16 * CHUNK, 5), "int8")
    with Loader(store, CHUNK, epochs=1, open_chunks=4, threads=threads) as loader:
        expected = list(loader)
        order = loader.schedule.order(0)[0]
    (path := store.path / f"rows/c/{order[5]}/0").write_bytes(b"no chunk")
    found = []
    with (
        Loader(store, CHUNK, epochs=1, open_chunks=4, threads=threads) as loader,
        pytest.raises(DamagedStore, match=re.escape(f"{path}: damaged (its checksum differs); `verify(")),
    ):
        found.extend(iter(loader))
    assert len(found) == 5
    assert all(map(torch.equal, found, expected))


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Of an uncompressed chunk, whose file is never checked as a whole."""
    store = write_activations(tmp_path, heavy_rows(CHUNK, 3), "bfloat16")
    path = store.path / "rows/c/0/0"
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        with Loader(store, 8, epochs=1) as loader, pytest.raises(DamagedStore):
            list(loader)


@every_reader
def test_encoded_batches_are_decoded_by_the_codec(tmp_path: Path, codec: str) -> None:
    store = write_activations(tmp_path, heavy_rows(4 * CHUNK + 3, 5), codec, ended=True)
    with Loader(store, 24, epochs=2, threads=1) as one, Loader(store, 24, epochs=2, threads=3) as other:
        for (encoded,), rows in zip(one.encoded(), other, strict=True):
            assert torch.equal(store.codec.decode(encoded, store.columns), rows)


@every_reader
def test_remote_stores_are_read_whole(tmp_path: Path, codec: str) -> None:
    """A place that is not a folder of this machine gives the same batches."""
    local = write_activations(tmp_path, heavy_rows(4 * CHUNK + 3, 5), codec, ended=True)
    with Loader(local, 24, epochs=1) as here:
        expected = list(here)
    remote = parse_path("memory://" + tmp_path.name)
    for name, data in files(local.path).items():
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_bytes(data)
    local.path = remote
    with Loader(local, 24, epochs=1) as there:
        found = list(there)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


# --- several stores ---------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 12))
def test_aligned_stores(pair: list[ActivationStore], batch: int, open_chunks: int, done: int) -> None:
    """Row i of every store is of one token, whatever their widths, codecs and chunk sizes; and it resumes."""

    def loader() -> Batches:
        return Batches(pair[:1], pair[1:], batch, open_chunks=open_chunks, positions=True)

    with loader() as first:
        whole = list(islice(first, done + 3))
    with Loader(pair[0], batch, open_chunks=open_chunks) as alone, loader() as second:
        list(zip(range(done), second, strict=False))
        state = second.state_dict()
        for one, (x, *_) in zip(alone, whole, strict=False):
            assert len(one) == len(x)
    numbers = {int(p): n for p, n in zip(pair[0].positions(0, N), pair[0].rows(0, N)[:, 0].tolist(), strict=True)}
    for x, y, position in whole:
        assert position is not None and [numbers[p] for p in position.tolist()] == x[:, 0].tolist()
        assert x[:, 0].tolist() == y[:, 0].tolist() == (-y[:, 2]).tolist()
        assert (x.shape[1], y.shape[1]) == (2, 3)
    with loader() as third:
        third.load_state_dict(state)
        for one, other in zip(whole[done:], third, strict=False):
            assert all(map(torch.equal, one, other))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, small: None) -> list[ActivationStore]:
    root, rows = tmp_path_factory.mktemp("aligned"), numbered(N)
    with shrunk() as patch:  # chunks half as large
        one = write_activations(root, rows, "float32", ended=True)
        patch.setattr("sae.cache.activations.CHUNK_BYTES", CHUNK // 2 * 3 * 4)
        wide = torch.cat([rows[:, :1], rows[:, :1] * 0, rows[:, 1:]], dim=1)
        other = write_activations(root, wide, "float32:zstd=1", ended=True, site="resid_post")
        assert (one.chunk_rows, other.chunk_rows) == (CHUNK, CHUNK // 2)
        return [one, other]


def test_stores_that_do_not_align_are_refused(tmp_path: Path, store: ActivationStore) -> None:
    elsewhere = write_activations(tmp_path, numbered(N), "float32", seed=1, ended=True)
    with pytest.raises(SaeError, match="was made from other tokens than"):
        Batches([store], [elsewhere])
    shape = SyntheticConfig(d=8, features=8, presence=Independent(), rows=1, validation_rows=1)
    made = [shape.model_copy(update={"seed": seed}) for seed in (0, 1)]
    with pytest.raises(SaeError, match="was made from other tokens than"):
        Batches([synthesize(one, tmp_path, Silent())["train"] for one in made])
    shorter = write_activations(tmp_path, numbered(2 * CHUNK), "float32", site="resid_post")
    with pytest.raises(SaeError, match=f"has {2 * CHUNK} rows, .* has {N}; harvest more of it"):
        Batches([store], [shorter])
    with Batches([store], [shorter], 8, rows=2 * CHUNK, epochs=1) as loader:
        assert sum(len(one.x) for one in loader) == 2 * CHUNK


# --- outliers ---------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 90), st.integers(1, 12), st.integers(1, 3), st.integers(0, 20))
def test_outliers_are_left_out(noisy: ActivationStore, batch: int, open_chunks: int, world: int, done: int) -> None:
    """Every other row once an epoch, in full batches, shared by ranks and resumable."""

    def loader(rank: int) -> Loader:
        return Loader(noisy, batch, open_chunks=open_chunks, epochs=2, rank=rank, world=world, outliers=5.0)

    kept = sorted(n for n in range(1, N + 1) if n % 17)
    ranks = [batches(loader(rank)) for rank in range(world)]
    rounds = [laid_out([one[i] for one in ranks if i < len(one)]) for i in range(max(map(len, ranks)))]
    assert {len(one) for one in rounds[:-1]} <= {batch * world}
    flat = laid_out(rounds)
    assert sorted(flat[: len(kept)]) == kept
    assert sorted(flat[len(kept) :]) == kept
    with loader(0) as first, loader(0) as second:
        done = len(list(zip(range(min(done, len(ranks[0]))), first, strict=False)))
        second.load_state_dict(first.state_dict())
        assert [numbers(one) for one in second] == ranks[0][done:]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    """Rows (n, -n, size): every 17th is 100 times larger than the others."""
    rows = torch.cat([numbered(N + 1)[1:], torch.full((N, 1), 1e4)], dim=1)
    rows[16::17, 2] = 1e6
    return write_activations(tmp_path_factory.mktemp("noisy"), rows, "float32", ended=True)


def test_the_multiple_of_outliers_is_checked(store: ActivationStore, noisy: ActivationStore) -> None:
    with pytest.raises(SaeError, match=r"outliers = 0\.5: rows around the median norm must stay; try 10"):
        Loader(noisy, outliers=0.5)
    with Loader(noisy, 16, outliers=5.0) as one, Loader(noisy, 16) as other:
        with pytest.raises(SaeError, match=r"the state is of outliers = 5.0, this loader has None"):
            other.load_state_dict(one.state_dict())
        with pytest.raises(SaeError, match=r"the state is of outliers = None, this loader has 5.0"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("codec", ["float32", "float32:zstd=1"])
@pytest.mark.parametrize("threads", [2, 7])
def test_memory_is_bounded(tmp_path: Path, codec: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open chunks and the few that come next, whatever the store's size, also between two epochs."""
    held: list[int] = []
    original = Chunks.acquire

    def acquire(self: Chunks[object], chunks: Iterable[int]) -> None:
        original(self, chunks)
        held.append(len(self._open))

    monkeypatch.setattr(Chunks, "acquire", acquire)
    store = write_activations(tmp_path, numbered(64 * CHUNK), codec)
    with Loader(store, 16, open_chunks=8, epochs=3, threads=threads) as loader:
        list(loader)
    ahead = threads + 2
    assert 8 < max(held) <= 8 + ahead


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_what_is_held_is_known_beforehand(
    pair: list[ActivationStore], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places of decoded chunks and rooms are counted out at the start; aligned stores share what is ahead."""
    held: list[tuple[int, int]] = []
    original = Prefetcher.__init__

    def count(self: Prefetcher, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        (small,) = (each for each in self._chunks if isinstance(each, DecodingReader))
        held.append((len(small._rows), len(self._rooms)))

    monkeypatch.setattr(Prefetcher, "__init__", count)
    for open_chunks in (1, 2, 4):
        with Batches(pair[:1], pair[1:], 16, open_chunks=open_chunks, epochs=2, threads=threads) as loader:
            assert sum(len(batch.x) for batch in loader) == 2 * N
        ahead = 2 + -(-threads // 2)
        halves = max(1, 2 // open_chunks)  # chunks of the other store that an open chunk's segment lies in
        assert held.pop() == (min(pair[1].n_chunks, open_chunks * halves + ahead), min(threads, 4) + 1)


@pytest.mark.parametrize("codec", ["float32", "float32:zstd=1"])
def test_a_chunk_is_opened_about_once_an_epoch(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_activations(tmp_path, numbered(N), codec, ended=True)
    opened: Counter[int] = Counter()
    lock = threading.Lock()
    kind = DirectReader if codec == "float32" else DecodingReader
    original = kind._opened

    def count(self: object, chunk: int, *place: int) -> object:
        with lock:
            opened[chunk] += 1
        return original(self, chunk, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "_opened", count)
    batches(Loader(store, 16, open_chunks=4, epochs=3))
    # a chunk half read when an epoch starts is opened again at its end
    assert 3 * 10 - 2 * 6 <= sum(opened.values()) <= 3 * (10 + 3)
    assert sorted(opened) == list(range(10))
    if codec == "float32":
        return
    opened.clear()
    batches(Loader(store, 16, open_chunks=8, epochs=3))
    assert opened == Counter(range(10))  # there is room for all of them


def variance_ratio(store: ActivationStore, rows: Tensor, batch: int) -> float:
    """Variance of batch means times the batch, over the variance of rows: 1 for independent rows."""
    with Loader(store, batch, epochs=2) as loader:
        means = torch.stack([one.mean(dim=0) for one in loader if len(one) == batch])
    return float((means.var(dim=0) * batch / rows.var(dim=0)).mean())


def test_documents_are_mixed(tmp_path: Path) -> None:
    """Rows of a document resemble each other (correlation .3); batches must not: at most 1.1 of independent ones."""
    with shrunk() as patch:
        patch.setattr("sae.cache.activations.CHUNK_ROWS", 256)
        patch.setattr("sae.cache.activations.WINDOWS", Windows(256, 4096))
        random = torch.Generator().manual_seed(0)
        n, d, document = 16 * 4096, 24, 50
        effects = torch.randn(-(-n // document), d, generator=random).repeat_interleave(document, dim=0)[:n]
        rows = 0.3**0.5 * effects + 0.7**0.5 * torch.randn(n, d, generator=random)
        store = write_activations(tmp_path, rows, "float32")
        in_order = rows.reshape(-1, 512, d).mean(dim=1).var(dim=0) * 512 / rows.var(dim=0)
        assert float(in_order.mean()) > 10
        assert 0.9 < variance_ratio(store, rows, 512) <= 1.1
