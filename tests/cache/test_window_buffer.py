"""A window in the making: the same bytes whatever device its rows are on, and nothing waits for one that runs ahead."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.lagging import FakeCuda, Stream
from support.late_card import Card, rows_come_late
from support.small_stores import CHUNK, files, heavy_rows, shrunk, write_activations
from support.watching import watched
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae.cache import window_buffer
from sae.cache.activations import ActivationWriter
from sae.cache.device.landing import AHEAD, Copies, Landing, landing
from sae.cache.errors import SaeError
from sae.cache.store.codecs import CODECS, BFloat16, Codec, Columns, Float16, Int8, calibrate, codec, to_numpy
from sae.cache.window_buffer import norms_of

N = 4 * CHUNK  # three windows
every_codec = pytest.mark.parametrize("codec_text", CODECS)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return rows_come_late(monkeypatch, 7 * 5)


# --- what is stored -------------------------------------------------------------------------------------------------


@every_codec
def test_rows_of_a_card_are_the_same_bytes(tmp_path: Path, codec_text: str, card: Card) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_buffer, "landing", lambda device: None)
        patch.setattr(window_buffer, "SLICE", {})
        direct = write_activations(tmp_path / "direct", heavy_rows(N, 7, massive=0), codec_text, ended=True)
    assert not card.sent
    landed = write_activations(tmp_path / "landed", heavy_rows(N, 7, massive=0), codec_text, ended=True)
    assert card.sent > N // 5
    assert files(landed.path) == files(direct.path)


def test_what_was_kept_of_a_window_is_what_had_come(tmp_path: Path, card: Card) -> None:
    rows, store = heavy_rows(2 * CHUNK, 7), write_activations(tmp_path, heavy_rows(CHUNK, 7))
    for number, columns in ((0, None), (1, store.columns)):
        one, other = (window_buffer.WindowBuffer(store, number, CHUNK, columns) for _ in range(2))
        card.going.clear()
        one.add(rows[:20], np.arange(20))
        threading.Timer(0.01, card.going.set).start()
        made = one.made(0, 20)
        assert [(kept.dtype.str, kept.shape) for kept in made] == one.shapes(20)
        other.take(made, np.arange(20))
        for buffer in (one, other):
            buffer.add(rows[20:CHUNK], np.arange(20, CHUNK))
        found, again = one.arrays(), other.arrays()
        assert found.keys() == again.keys()
        for name in found:
            np.testing.assert_array_equal(found[name][:], again[name][:])


def float32(values: Any) -> np.ndarray:
    assert values.dtype == np.float32
    return np.asarray(values)


def by_ieee_operations(value: Codec, rows: np.ndarray, columns: Columns) -> list[np.ndarray]:
    """What a codec stores, by NumPy: one rounded operation after the other."""
    mean, scale = (part.numpy() for part in columns)
    if isinstance(value, Int8):
        normalised = float32(float32(rows - mean) / scale)
        widest = np.abs(normalised).max(axis=1)
        wide = np.maximum(float32(widest / np.float32(127)), np.float32(max(value.step, 2.0**-14))).astype(np.float16)
        codes = np.rint(float32(normalised / wide.astype(np.float32)[:, None]))
        return [np.clip(codes, -127, 127).astype(np.int8), wide]
    if isinstance(value, BFloat16):
        bits = float32(rows - mean).view(np.uint32).astype(np.uint64)
        return [((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)]
    return [rows.astype(np.float16) if isinstance(value, Float16) else rows]


@pytest.mark.parametrize("codec_text", [*CODECS, "int8:step=0", "int8:step=0.01"])
def test_a_codec_is_a_row_of_rounded_operations(codec_text: str) -> None:
    """No product with a reciprocal, no fused operation: NumPy, which does one thing after the other, gets the bits."""
    value = codec(codec_text)
    rows = torch.cat([heavy_rows(3000, 33, massive=0), torch.randn(3000, 33).exp()])
    columns = calibrate(rows[:2000])
    encoded = value.encode(rows, columns)
    expected = by_ieee_operations(value, rows.numpy(), columns)
    for found, wanted in zip([part for part in encoded if part is not None], expected, strict=True):
        np.testing.assert_array_equal(to_numpy(found), wanted)


class DividesByNumbers(TorchDispatchMode):
    """Notes divisions of tensors by numbers of the host, which CUDA takes for products with a rounded reciprocal."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("div") and not (isinstance(args[1], Tensor) and args[1].dim()):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@every_codec
def test_nothing_is_divided_by_a_number(codec_text: str) -> None:
    rows = heavy_rows(64, 7)
    columns = calibrate(rows)
    with DividesByNumbers() as noted:
        torch.ones(2) / 3
        codec(codec_text).encode(rows, columns)
        norms_of(rows)
    assert noted.seen == ["div"]


@pytest.mark.parametrize("d", [1, 2, 3, 7, 64, 769])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_sums_in_one_order(d: int, dtype: torch.dtype) -> None:
    rows = heavy_rows(300, d).to(dtype)
    before = rows.clone()
    sums = np.square(rows.double().numpy())
    while sums.shape[1] > 1:
        half, left = sums.shape[1] // 2, sums.shape[1] - sums.shape[1] // 2
        sums = np.concatenate([sums[:, :half] + sums[:, left:], sums[:, half:left]], axis=1)
    expected = torch.from_numpy(np.sqrt(sums[:, 0]).astype(np.float32)).bfloat16().float()
    assert torch.equal(norms_of(rows), expected) and torch.equal(rows, before)
    assert torch.equal(norms_of(rows.view(3, 100, d)), expected.view(3, 100))
    torch.testing.assert_close(expected, torch.linalg.vector_norm(rows.float(), dim=1), rtol=2.0**-8, atol=0)


# --- what waits -----------------------------------------------------------------------------------------------------


@every_codec
def test_rows_are_added_without_waiting(tmp_path: Path, codec_text: str, card: Card) -> None:
    rows = heavy_rows(2 * CHUNK, 7, massive=0)
    store = write_activations(tmp_path, rows[:CHUNK], codec_text)
    with ActivationWriter(tmp_path, store.slug, store.recipe) as writer:
        buffer = writer.window(CHUNK)
        buffer.add(rows[:5], np.arange(5))  # columns come to the device once
        seen = watched(lambda: buffer.add(rows[5:25], np.arange(5, 25)))
        assert seen.waited == [] and seen.launched


def test_no_more_is_under_way_than_there_is_room_for() -> None:
    card, landed = Card(), []
    card.going.clear()

    def send(number: int) -> Future[None]:
        return card.landing.send([torch.full((3,), number)], lambda copies: landed.append(int(copies[0].sum())))

    under_way = [send(number) for number in range(AHEAD)]
    last = threading.Thread(target=lambda: under_way.append(send(AHEAD)))
    last.start()
    last.join(0.05)
    assert last.is_alive() and card.sent == AHEAD and not landed
    card.going.set()
    last.join(60)
    for one in under_way:
        one.result()
    assert landed == [3 * number for number in range(AHEAD + 1)]


def test_what_cannot_be_sent_or_taken_leaves_its_room() -> None:
    def refused(tensors: Sequence[Tensor]) -> Copies:
        if tensors:
            raise RuntimeError("out of memory")
        return [], lambda: None

    def untaken(copies: list[Tensor]) -> None:
        raise SaeError("cannot be taken")

    landing = Landing(refused)
    for _ in range(AHEAD + 1):
        with pytest.raises(RuntimeError, match="out of memory"):
            landing.send([torch.ones(1)], untaken)
    for _ in range(AHEAD + 1):
        with pytest.raises(SaeError, match="cannot be taken"):
            landing.send([], untaken).result()


def landed_of_lagging(seed: int, sendings: int) -> list[int]:
    """What lands of tensors that a GPU which lags behind still has to compute; each is kept until it is copied."""
    fake, found, kept, empty = FakeCuda(seed), list[int](), list[object](), torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        for name in ("Stream", "Event", "stream", "current_stream"):
            patch.setattr(torch.cuda, name, getattr(fake, name))
        patch.setattr(torch, "empty_like", lambda x, **_: empty(x).fill_(-1))  # there is nothing to pin memory with
        patch.setattr(Tensor, "record_stream", lambda x, stream: kept.append(stream))
        card = landing.__wrapped__(torch.device("cuda"))
        assert card is not None
        under_way = []
        with fake.stream(fake.streams[0]):
            for number in range(sendings):
                computed = [torch.zeros(3), torch.zeros(2)]
                for one in computed:
                    one.copy_(torch.full_like(one, number))
                under_way.append(card.send(computed, lambda copies: found.extend(int(one.sum()) for one in copies)))
        for one in under_way:
            one.result()
    assert kept == [fake.streams[1]] * 2 * sendings
    return found


def test_what_lands_is_what_the_card_had_still_to_compute() -> None:
    for seed in range(5):
        assert landed_of_lagging(seed, 6) == [size * number for number in range(6) for size in (3, 2)]


def test_copies_may_not_begin_before_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above would notice."""
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    assert any(landed_of_lagging(seed, 6)[-1] != 10 for seed in range(10))


# --- what is refused ------------------------------------------------------------------------------------------------

NO_NUMBERS = r"^synthetic 1\.mlp_out: activations hold NaN or infinity, or are too large for a norm in float32$"
REFUSED: list[tuple[str, float, str]] = [
    *((name, value, NO_NUMBERS) for name in CODECS for value in (float("nan"), float("inf"), -float("inf"))),
    ("int8", 1e30, r"^codec = int8: .* 8 million standard deviations"),
    ("float16", 7e4, r"^codec = float16: .* beyond 65,504"),
    ("float32", 3.4e38, NO_NUMBERS),  # whose norm no store could say
]


@pytest.mark.parametrize(("codec_text", "value", "message"), REFUSED)
@pytest.mark.parametrize("window", [0, 1])
def test_what_cannot_be_stored_is_refused_when_it_has_come(
    tmp_path: Path, card: Card, window: int, codec_text: str, value: float, message: str
) -> None:
    rows = heavy_rows(2 * CHUNK, 7, massive=0)
    rows[window * CHUNK + 20, 3] = value
    card.going.clear()
    threading.Timer(0.01, card.going.set).start()
    with pytest.raises(SaeError, match=message):
        write_activations(tmp_path, rows, codec_text)


def test_what_is_refused_is_said_by_whatever_comes_next(tmp_path: Path, card: Card) -> None:
    """As long as the window is asked for: whoever keeps rows of an unfinished one goes on without."""
    rows, store = heavy_rows(2 * CHUNK, 7), write_activations(tmp_path, heavy_rows(CHUNK, 7))
    rows[3, 3] = float("nan")
    buffer = window_buffer.WindowBuffer(store, 1, CHUNK, store.columns)
    card.going.clear()
    buffer.add(rows[:5], np.arange(5))
    card.going.set()
    for _ in range(2):
        with pytest.raises(SaeError, match=NO_NUMBERS):
            buffer.made(0, 5)
    with pytest.raises(SaeError, match=NO_NUMBERS):
        buffer.add(rows[5:CHUNK], np.arange(5, CHUNK))
    with pytest.raises(SaeError, match=NO_NUMBERS):
        buffer.arrays()


# --- on a card ------------------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_codec
def test_a_card_stores_the_bytes_of_the_cpu(tmp_path: Path, codec_text: str, dtype: torch.dtype) -> None:
    rows = heavy_rows(N, 769, massive=0).to(dtype)
    found: dict[str, Callable[[Tensor], Tensor]] = {"cpu": Tensor.cpu, "cuda": Tensor.cuda}
    stores = [write_activations(tmp_path / name, to(rows), codec_text, ended=True) for name, to in found.items()]
    assert files(stores[0].path) == files(stores[1].path)


@on_a_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@every_codec
def test_the_driver_sees_no_wait(tmp_path: Path, codec_text: str) -> None:
    rows = heavy_rows(2 * CHUNK, 769, massive=0)
    store = write_activations(tmp_path, rows[:CHUNK], codec_text)
    buffer, there = window_buffer.WindowBuffer(store, 1, CHUNK, store.columns), rows[CHUNK:].cuda()
    for start in range(0, CHUNK, 8):
        torch.cuda.set_sync_debug_mode("error" if start > 8 else "default")  # columns and pinned memory are there
        try:
            buffer.add(there[start : start + 8], np.arange(start, start + 8))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(buffer.arrays()["rows"]) == CHUNK
