"""The activation store: aligned rows, windows that never change, and arrays other tools open."""

from collections.abc import Iterator
from pathlib import Path

import dask.array
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import CHUNK, extend, files, heavy_rows, shrunk, some, token_recipe, write_activations

from sae.cache import activations
from sae.cache.activations import CHUNK_BYTES, ActivationStore, ActivationWriter, permutation, rows_per_chunk
from sae.cache.errors import SaeError
from sae.cache.store.codecs import CODECS, calibrate, codec

N = 9 * CHUNK + 5  # four whole windows, a fifth one that is short
REAL_CHUNK_ROWS = activations.CHUNK_ROWS
every_codec = pytest.mark.parametrize("codec_text", [*CODECS, "int8:step=0,zstd=none", "bfloat16:zstd=1"])


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@every_codec
def test_rows_come_back_in_their_window_permuted(tmp_path: Path, codec_text: str) -> None:
    rows = heavy_rows(N, 7)
    store = write_activations(tmp_path, rows, codec_text, ended=True)
    assert (store.n_rows, store.d, store.closed, store.n_chunks) == (N, 7, True, 10)
    positions = store.positions(0, N)
    for start, stop in ((0, 32), (32, 64), (64, 128), (128, 256), (256, N)):
        assert sorted(positions[start:stop]) == list(range(start, stop))
    assert not np.array_equal(positions[128:256], np.arange(128, 256))
    found = store.rows(0, N)
    original = rows[torch.from_numpy(positions)]
    value = codec(codec_text)
    bound = value.error_bound(original, value.encode(original, store.columns), store.columns)
    assert bool(((found - original).abs() <= bound).all())
    for start, stop in ((0, 0), (5, 6), (31, 65), (250, N)):
        assert torch.equal(store.rows(start, stop), found[start:stop])
        np.testing.assert_array_equal(store.positions(start, stop), positions[start:stop])


def test_sites_are_aligned(tmp_path: Path) -> None:
    """Harvested together or apart, at any width or codec: stored row i of every site came from one token."""
    stores = [
        write_activations(tmp_path, heavy_rows(N, 7), "int8", site="mlp_out", ended=True),
        write_activations(tmp_path, heavy_rows(N, 3), "float32", site="resid_post", ended=True),
    ]
    one, other = (store.positions(0, N) for store in stores)
    np.testing.assert_array_equal(one, other)
    elsewhere = write_activations(tmp_path, heavy_rows(N, 7), seed=1)
    assert not np.array_equal(elsewhere.positions(0, N), one)


def test_the_order_is_pinned() -> None:
    """Stores made today must align with those made later, whatever NumPy's version."""
    assert permutation(token_recipe(), 3, 10).tolist() == [9, 5, 6, 4, 3, 1, 8, 2, 0, 7]
    assert not np.array_equal(permutation(token_recipe(), 0, 1000), permutation(token_recipe(), 1, 1000))
    assert sorted(permutation(token_recipe(), 2, 1000)) == list(range(1000))


@every_codec
def test_growth_keeps_every_byte(tmp_path: Path, codec_text: str) -> None:
    rows = heavy_rows(N, 7)
    small = write_activations(tmp_path / "grown", rows[: 4 * CHUNK], codec_text)
    before = files(small.path)
    grown = write_activations(tmp_path / "grown", rows, codec_text, ended=True)
    after = files(grown.path)
    for name, data in before.items():
        assert after[name] == data or name.endswith("zarr.json") or name == "manifest.jsonl", name
    assert after["manifest.jsonl"].startswith(before["manifest.jsonl"])
    whole = write_activations(tmp_path / "whole", rows, codec_text, ended=True)
    assert files(whole.path) == after
    assert small.n_rows == 4 * CHUNK  # a reader keeps what it saw
    assert small.refreshed().n_rows == N


def test_columns_come_from_the_first_window(tmp_path: Path) -> None:
    rows = heavy_rows(4 * CHUNK, 7)
    rows[CHUNK:] *= 50
    store = write_activations(tmp_path, rows)
    expected = calibrate(rows[permutation(store.recipe["tokens"], 0, CHUNK)])
    torch.testing.assert_close(store.columns.mean, expected.mean)
    torch.testing.assert_close(store.columns.scale, expected.scale)


def test_other_tools_open_int8(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(N, 7), ended=True)
    group = zarr.open_group(str(store.path), mode="r")
    assert group.attrs["recipe"] == store.recipe
    rows = group["rows"][...] * group["row_scale"][...].astype(np.float32)[:, None] * group["col_scale"][...]
    np.testing.assert_allclose(rows + group["col_mean"][...], store.rows(0, N).numpy(), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(group["position"][...], store.positions(0, N))
    lazy = dask.array.from_zarr(str(store.path / "rows"))
    assert (lazy.shape, lazy.chunksize) == ((N, 7), (CHUNK, 7))
    np.testing.assert_array_equal(lazy[100:200].compute(scheduler="synchronous"), group["rows"][100:200])


def test_other_tools_open_bfloat16(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(2 * CHUNK, 7), "bfloat16")
    array = zarr.open_array(str(store.path / "rows"), mode="r")
    assert array.attrs["logical_dtype"] == "bfloat16"
    bits = array[...].astype(np.uint32) << 16
    np.testing.assert_array_equal(bits.view(np.float32) + store.columns.mean.numpy(), store.rows(0, 2 * CHUNK).numpy())


def test_stored_chunks_are_what_the_loader_reads(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(2 * CHUNK, 7))
    chunk = store.encoded_chunk(1)
    assert chunk.rows.dtype == torch.int8
    assert torch.equal(store.codec.decode(chunk, store.columns), store.rows(CHUNK, 2 * CHUNK))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_never_enters(tmp_path: Path, value: float) -> None:
    rows = heavy_rows(CHUNK, 7)
    rows[20, 3] = value
    with pytest.raises(SaeError, match=r"synthetic 1\.mlp_out: activations hold NaN or infinity"):
        write_activations(tmp_path, rows)


def test_a_store_without_rows_says_so(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(0, 7))
    assert (store.n_rows, store.n_chunks, store.complete) == (0, 0, False)
    with pytest.raises(SaeError, match=r"holds no rows yet; run `harvest\(\)` again"):
        _ = store.columns


def test_a_buffer_must_be_full(tmp_path: Path) -> None:
    recipe = write_activations(tmp_path, heavy_rows(0, 7)).recipe
    with ActivationWriter(tmp_path, "half", recipe) as writer:
        buffer = writer.window(CHUNK)
        buffer.add(heavy_rows(CHUNK - 1, 7), np.arange(CHUNK - 1))
        with pytest.raises(AssertionError):
            writer.append(buffer.arrays(), {})
        with pytest.raises(AssertionError):
            buffer.add(heavy_rows(2, 7), np.arange(2))


def test_half_precision_rows_are_stored_as_their_float32_values(tmp_path: Path) -> None:
    rows = heavy_rows(2 * CHUNK, 7, massive=0).to(torch.bfloat16)
    store = write_activations(tmp_path, rows, "float32")
    assert torch.equal(store.rows(0, 2 * CHUNK), rows.float()[torch.from_numpy(store.positions(0, 2 * CHUNK))])


@some
@given(st.integers(1, 1 << 26), st.sampled_from([1, 2, 4]))
def test_chunks_stay_below_the_allocators_cliff(d: int, itemsize: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "CHUNK_ROWS", REAL_CHUNK_ROWS)
        rows = rows_per_chunk(d, itemsize)
    assert 1 <= rows <= 16_384
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * d * itemsize <= CHUNK_BYTES
    assert rows == 16_384 or 2 * rows * d * itemsize > CHUNK_BYTES


def test_description(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(4 * CHUNK, 64), "float32")
    description = store.describe()
    assert description["arrays"]["rows"]["bytes"] == 4 * CHUNK * 64 * 4
    assert description["windows"] == 3
    assert 1 <= description["share_of_float32"] < 1.1


def test_the_caller_may_reuse_its_rows(tmp_path: Path) -> None:
    rows = heavy_rows(2 * CHUNK, 7)
    reference = write_activations(tmp_path / "a", rows)
    with ActivationWriter(tmp_path / "b", reference.slug, reference.recipe) as writer:
        for start in (0, CHUNK):
            buffer, given = writer.window(CHUNK), rows[start : start + CHUNK].clone()
            buffer.add(given, np.arange(start, start + CHUNK))
            given.zero_()
            writer.append(buffer.arrays(), {"next": start + CHUNK})
    assert files(writer.path) == files(reference.path)


@pytest.mark.parametrize("batches", [[32], [1] * 32, [31, 1], [5, 0, 27]])
def test_batches_do_not_matter(tmp_path: Path, batches: list[int]) -> None:
    rows = heavy_rows(CHUNK, 7)
    reference = write_activations(tmp_path / "a", rows)
    with ActivationWriter(tmp_path / "b", reference.slug, reference.recipe) as writer:
        buffer, low = writer.window(CHUNK), 0
        for size in batches:
            buffer.add(rows[low : low + size], np.arange(low, low + size))
            low += size
        writer.append(buffer.arrays(), {"next": CHUNK})
        extend(writer, rows)
    assert files(writer.path) == files(reference.path)
    assert isinstance(writer.store, ActivationStore)
