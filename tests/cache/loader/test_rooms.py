"""Rooms whose rows are copied to a device: on a GPU that lags behind, on one without numbers, and on a real one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.lagging import FakeCuda
from support.small_stores import CHUNK, heavy_rows, shrunk, write_activations
from support.watching import watched
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.loader import prefetch, rooms
from sae.cache.loader.loader import Batch, Batches, Loader
from sae.cache.loader.rooms import StreamedRoom

CODECS = ["int8", "bfloat16", "float16:zstd=1", "float32"]
HOST = torch.device("cpu")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ActivationStore]]:
    with shrunk():
        root, rows = tmp_path_factory.mktemp("rooms"), heavy_rows(9 * CHUNK + 5, 3)
        yield {codec: write_activations(root, rows, codec, ended=True) for codec in CODECS}


# --- a GPU that lags behind -------------------------------------------------------------------------------------------


@contextmanager
def lagging(seed: int) -> Iterator[FakeCuda]:
    """Loaders send rows to a GPU that lags behind; what reads them within lags, too."""
    fake = FakeCuda(seed)
    copying = fake.Stream(HOST)

    def streamed(stores: Any, rows: int, device: torch.device, count: int) -> list[StreamedRoom]:
        return [StreamedRoom(stores, rows, HOST, copying) for _ in range(count)]  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, fake.stream(fake.streams[0]):
        patch.setattr(rooms, "cuda", fake)
        patch.setattr(prefetch, "rooms", streamed)
        yield fake


def batches_of_lagging(store: ActivationStore, batch: int, seed: int) -> list[Tensor]:
    """Batches as stored, copied by a reader."""
    found = []
    with lagging(seed) as fake:
        with Loader(store, batch, epochs=2, threads=2, open_chunks=4) as loader:
            for (encoded,) in loader.encoded():
                found.append(torch.zeros_like(encoded.rows))
                found[-1].copy_(encoded.rows)
        for stream in fake.streams:
            stream.run(len(stream.asked))
    return found


@pytest.mark.parametrize("batch", [16, 24, 200])  # parts of a step, batches that straddle two, and several
def test_a_gpu_that_lags_behind_gets_the_rows(stores: dict[str, ActivationStore], batch: int) -> None:
    store = stores["int8"]
    with Loader(store, batch, epochs=2, open_chunks=4) as loader:
        expected = [one.rows.clone() for (one,) in loader.encoded()]
    for seed in range(3):
        found = batches_of_lagging(store, batch, seed)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("order", ["begin", "receive", "leave"])
def test_no_order_can_be_left_out(
    stores: dict[str, ActivationStore], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would notice."""
    store = stores["int8"]
    with Loader(store, 24, epochs=2, open_chunks=4) as loader:
        expected = [one.rows.clone() for (one,) in loader.encoded()]
    monkeypatch.setattr(StreamedRoom, order, lambda self: None)
    assert any(not all(map(torch.equal, batches_of_lagging(store, 24, seed), expected)) for seed in range(10))


def test_memory_goes_back_when_nothing_is_under_way(stores: dict[str, ActivationStore]) -> None:
    """Whoever gets it next asks the stream that it was taken on: that one comes after the copies."""
    for seed in range(3):
        with lagging(seed) as fake, Loader(stores["int8"], 16, threads=2) as loader:
            batches = loader.encoded()
            for _ in range(7):
                next(batches)
            batches.close()  # type: ignore[attr-defined]
            owner, copying = fake.streams
            owner.run(len(owner.asked))
            assert copying.done == len(copying.asked) > 0


# --- a device without numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_taking_a_batch_waits_for_no_device(stores: dict[str, ActivationStore], codec: str) -> None:
    """Stored rows are decoded there in a few operations; not a number is copied by who takes the batch."""
    with Batches([stores[codec]], [], 24, threads=2, device="meta") as loader:
        stream = iter(loader)
        taken: list[Batch] = []
        for _ in range(20):
            seen = watched(lambda: taken.append(next(stream)), "meta")
            assert seen.waited == []
            assert sum(seen.launched.values()) <= 5 + 4  # the latter where a batch straddles two steps
        assert {(one.x.device.type, one.x.dtype, one.x.shape) for one in taken} == {("meta", torch.float32, (24, 3))}


# --- a real one -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("codec", CODECS)
def test_a_gpu_decodes_to_the_bits_of_the_cpu(stores: dict[str, ActivationStore], codec: str) -> None:
    for batch in (16, 24, 200):
        with (
            Loader(stores[codec], batch, epochs=2) as here,
            Loader(stores[codec], batch, epochs=2, device="cuda") as there,
        ):
            for one, other in zip(here, there, strict=True):
                assert torch.equal(one, other.cpu())
