"""One array as files: the same as zarr-python writes, byte for byte."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import few
from zarr.codecs import BytesCodec, ZstdCodec

from sae.cache.store.arrays import NAMES, ArraySpec, group_metadata


def spec_of(dtype: str = "<f4", row: tuple[int, ...] = (3,), zstd: int | None = 1, chunk: int = 4) -> ArraySpec:
    fill: float | int = float("nan") if dtype in ("<f2", "<f4") else int(np.iinfo(dtype).max)
    names = ("row", *(f"dim{i}" for i in range(len(row))))
    return ArraySpec("it", dtype, row, chunk, names, fill, zstd, attributes={"a": "b"})


def zarr_writes(folder: Path, spec: ArraySpec, rows: np.ndarray) -> dict[str, bytes]:
    """The files zarr-python makes for an array of these rows."""
    array = zarr.create_array(
        store=str(folder / spec.name), shape=rows.shape, chunks=spec.chunk_shape, dtype=rows.dtype,
        serializer=BytesCodec(endian="little") if rows.dtype.itemsize > 1 else BytesCodec(endian=None),
        compressors=None if spec.zstd is None else ZstdCodec(level=spec.zstd, checksum=False),
        fill_value=spec.fill, attributes=spec.attributes, dimension_names=spec.dimension_names, zarr_format=3,
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array[...] = rows
    found = (folder / spec.name).rglob("*")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found if path.is_file()}


def we_write(folder: Path, spec: ArraySpec, rows: np.ndarray) -> dict[str, bytes]:
    """Our files for the same, written to `folder` as well."""
    made = {f"{spec.name}/zarr.json": spec.metadata(len(rows))}
    for index in range(-(-len(rows) // spec.chunk_rows)):
        low = index * spec.chunk_rows
        made[spec.chunk_file(index)] = spec.encode(rows[low : low + spec.chunk_rows])
    for name, data in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return made


def some_rows(spec: ArraySpec, n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    shape = (n, *spec.row_shape)
    if spec.dtype in ("<f2", "<f4"):
        return random.standard_normal(shape).astype(spec.dtype)
    return random.integers(0, 100, shape).astype(spec.dtype)


@few
@given(
    st.sampled_from(sorted(NAMES)), st.sampled_from([(), (1,), (3,), (2, 5)]), st.sampled_from([None, 1, 3]),
    st.integers(1, 5), st.integers(1, 11),
)  # fmt: skip
def test_the_bytes_are_those_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, row: tuple[int, ...], zstd: int | None, chunk: int, n: int
) -> None:
    """Every chunk, a padded last one among them, and the metadata; and zarr opens what we wrote."""
    spec = spec_of(dtype, row, zstd, chunk)
    rows = some_rows(spec, n)
    theirs = zarr_writes(tmp_path_factory.mktemp("theirs"), spec, rows)
    folder = tmp_path_factory.mktemp("ours")
    ours = we_write(folder, spec, rows)
    metadata = f"{spec.name}/zarr.json"
    assert {k: v for k, v in ours.items() if k != metadata} == {k: v for k, v in theirs.items() if k != metadata}
    mine, reference = json.loads(ours[metadata]), json.loads(theirs[metadata])
    assert mine == {"storage_transformers": [], **reference}
    opened = zarr.open_array(str(folder / spec.name), mode="r")
    np.testing.assert_array_equal(opened[...], rows)
    assert opened.metadata.dimension_names == spec.dimension_names


@few
@given(st.sampled_from(sorted(NAMES)), st.sampled_from([(), (3,)]), st.sampled_from([None, 1]), st.integers(1, 4))
def test_decode_inverts_encode(dtype: str, row: tuple[int, ...], zstd: int | None, n: int) -> None:
    spec = spec_of(dtype, row, zstd)
    rows = some_rows(spec, n)
    data = spec.encode(rows)
    decoded = spec.decode(data)
    assert (decoded.shape, decoded.dtype) == (spec.chunk_shape, np.dtype(dtype))
    np.testing.assert_array_equal(decoded[:n], rows)
    np.testing.assert_array_equal(decoded[n:], np.full((4 - n, *row), spec.fill, dtype))
    out = np.empty(spec.chunk_shape, dtype)
    assert spec.decode(data, out) is out
    np.testing.assert_array_equal(out, decoded)
    assert spec.chunk_bytes == out.nbytes


def test_an_array_that_does_not_grow_keeps_its_shape() -> None:
    spec = ArraySpec("col_mean", "<f4", (), 6, ("dim",), math.nan, None, grows=False)
    assert json.loads(spec.metadata(1000))["shape"] == [6]
    assert spec.chunk_file(0) == "col_mean/c/0"


def test_too_many_rows_for_a_chunk_are_our_mistake() -> None:
    with pytest.raises(AssertionError):
        spec_of().encode(np.zeros((5, 3), np.float32))
    with pytest.raises(AssertionError):
        spec_of().encode(np.zeros((4, 2), np.float32))


def test_the_group_opens(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_bytes(group_metadata({"kind": "tokens", "recipe": {"a": [1, None]}}))
    spec = spec_of()
    we_write(tmp_path, spec, some_rows(spec, 6))
    group = zarr.open_group(str(tmp_path), mode="r")
    assert dict(group.attrs) == {"kind": "tokens", "recipe": {"a": [1, None]}}
    assert group["it"].shape == (6, 3)
