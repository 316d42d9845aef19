"""Stores in the hands of others: dask, xarray, tensorstore and zarr dequantise them to exactly what we read."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.array
import google_crc32c
import numpy as np
import pytest
import zarr
from support.small_stores import (
    CHUNK,
    CONTEXT,
    heavy_rows,
    shrunk,
    token_recipe,
    window_arrays,
    write_activations,
    write_tokens,
)

from sae.cache.activations import ActivationStore
from sae.cache.tokens import TokenStore

N = 5 * CHUNK + 3  # four windows, the last one short
CODECS = ("int8", "int8:step=0,zstd=none", "bfloat16", "float16", "float32:zstd=1")
Open = Callable[[Path, str], np.ndarray]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


def by_dask(store: Path, array: str) -> np.ndarray:
    lazy = dask.array.from_zarr(str(store / array))
    return np.asarray(lazy.compute(scheduler="synchronous"))


@contextmanager
def xarray_dataset(store: Path) -> Iterator[Any]:
    """A store as it is: xarray would take a fill value for missing data and make floats of it."""
    xarray = pytest.importorskip("xarray")
    with warnings.catch_warnings():
        # zarr lists the group's folder, and says of our other files that they are not its own
        warnings.filterwarnings("ignore", "Object at .* is not recognized as a component", zarr.errors.ZarrUserWarning)
        with xarray.open_zarr(str(store), consolidated=False, mask_and_scale=False, chunks=None) as dataset:
            yield dataset


def by_xarray(store: Path, array: str) -> np.ndarray:
    with xarray_dataset(store) as dataset:
        return np.asarray(dataset[array].values)


def by_tensorstore(store: Path, array: str) -> np.ndarray:
    tensorstore = pytest.importorskip("tensorstore")
    kvstore = {"driver": "file", "path": f"{store / array}/"}
    return np.asarray(tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result().read().result())


def by_zarr(store: Path, array: str) -> np.ndarray:
    group: Any = zarr.open_group(str(store), mode="r", zarr_format=3, use_consolidated=False)
    return np.asarray(group[array][:])


READERS = {"dask": by_dask, "xarray": by_xarray, "tensorstore": by_tensorstore, "zarr": by_zarr}
readers = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


def dequantised(codec: dict[str, Any], store: Path, read: Open) -> np.ndarray:
    """float32 rows by the table of docs/cache-format.md, in NumPy."""
    rows = read(store, "rows")
    if codec["name"] == "int8":
        scaled = rows.astype(np.float32) * read(store, "row_scale").astype(np.float32)[:, None]
        return scaled * read(store, "col_scale") + read(store, "col_mean")
    if codec["name"] == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32) + read(store, "col_mean")
    return rows.astype(np.float32)


@readers
@pytest.mark.parametrize("codec", CODECS)
def test_rows(tmp_path: Path, read: Open, codec: str) -> None:
    store = write_activations(tmp_path, heavy_rows(N, 7), codec, ended=True)
    found = dequantised(store.recipe["codec"], store.path, read)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, store.rows(0, N).numpy())
    np.testing.assert_array_equal(read(store.path, "position"), store.positions(0, N))


@readers
def test_tokens(tmp_path: Path, read: Open) -> None:
    store = write_tokens(tmp_path, N, ended=True)
    for name, values in window_arrays(store.recipe, 0, N).items():
        np.testing.assert_array_equal(read(store.path, name), values)


def test_dask_reads_a_chunk_at_a_time(tmp_path: Path) -> None:
    """Its blocks are our chunks, so that a slice opens no other file."""
    store = write_activations(tmp_path, heavy_rows(N, 7))
    rows = dask.array.from_zarr(str(store.path / "rows"))
    assert rows.chunks == ((CHUNK,) * 5 + (3,), (7,))
    for path in (store.path / "rows/c").glob("[!1]/0"):
        path.write_bytes(b"not to be read")
    found = rows[CHUNK : CHUNK + 5].compute(scheduler="synchronous")
    np.testing.assert_array_equal(found, store.read("rows", CHUNK, CHUNK + 5))


def test_xarray_knows_the_dimensions(tmp_path: Path) -> None:
    rows, tokens = write_activations(tmp_path, heavy_rows(N, 7), "bfloat16"), write_tokens(tmp_path, N)
    with xarray_dataset(rows.path) as dataset:
        assert dict(dataset.sizes) == {"row": N, "dim": 7}
        assert dataset.attrs["kind"] == "activations" and dataset.attrs["recipe"] == rows.recipe
        assert dataset["rows"].attrs["logical_dtype"] == "bfloat16"
    with xarray_dataset(tokens.path) as dataset:
        assert dict(dataset.sizes) == {"context": N, "position": CONTEXT}


# --- a whole reader: nothing but NumPy, zarr, JSON and what docs/cache-format.md says --------------------------------


class Foreign:
    """A store, opened by the page: its identity, its manifest and every file checked, its arrays, its order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        head = json.loads((folder / "recipe.json").read_text())
        self.recipe, self.kind = head["recipe"], head["kind"]
        assert head["format"] == 2
        assert folder.name.endswith(hashlib.sha256(compact(self.recipe).encode()).hexdigest()[:8])
        self.windows: list[tuple[int, int]] = []
        self.closed = False
        for line in (folder / "manifest.jsonl").read_bytes().split(b"\n")[:-1]:  # a line without its end does not count
            self.take(line)
        self.rows = self.windows[-1][1] if self.windows else 0

    def take(self, line: bytes) -> None:
        sealed = json.loads(line)
        body = sealed["line"]
        assert line.decode("ascii") == compact(sealed) and sealed["crc"] == crc(compact(body).encode())
        assert not self.closed
        if "end" in body:
            assert body["end"] == self.windows[-1][1]
            self.closed = True
            return
        start, stop = body["rows"]
        assert body["window"] == len(self.windows) and start == (self.windows[-1][1] if self.windows else 0)
        self.windows.append((start, stop))
        for name, (size, expected) in body["files"].items():
            data = (self.folder / name).read_bytes()
            assert len(data) == size and crc(data) == expected, name

    def __getitem__(self, name: str) -> np.ndarray:
        array: Any = zarr.open_array(str(self.folder / name), mode="r", zarr_format=3)
        assert name.startswith("col_") or array.shape[0] == self.rows
        return np.asarray(array[:])

    def order(self) -> np.ndarray:
        """Where each row came in token order: one permutation a window, of the token recipe and the window alone."""
        parts = []
        for window, (start, stop) in enumerate(self.windows):
            seed = hashlib.sha256(f"{compact(self.recipe['tokens'])}#{window}".encode()).digest()[:16]
            bits = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(stop - start)
            parts.append(start + np.argsort(bits, kind="stable"))
        return np.concatenate(parts)


def largest_error(store: Foreign, rows: np.ndarray) -> np.ndarray:
    """What the page says a codec may be off by, for rows [n, d] in stored order."""
    match store.recipe["codec"]["name"]:
        case "int8":
            return store["row_scale"].astype(np.float32)[:, None] * store["col_scale"] / 2
        case "bfloat16":
            return np.abs(rows - store["col_mean"]) * 2.0**-8
        case "float16":
            return np.abs(rows) * 2.0**-11
        case _:
            return np.zeros_like(rows)


def compact(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def crc(data: bytes) -> str:
    return f"{google_crc32c.value(data):08x}"


def test_a_foreign_reader_reads_tokens(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, N, ended=True)
    foreign = Foreign(store.path)
    assert (foreign.kind, foreign.rows, foreign.closed) == ("tokens", N, True)
    assert foreign.windows == [(0, 32), (32, 64), (64, 128), (128, N)]
    np.testing.assert_array_equal(foreign["tokens"], store.contexts(0, N))
    np.testing.assert_array_equal(foreign["document"], store.document_ids(0, N))
    np.testing.assert_array_equal(foreign["length"], store.lengths(0, N))


@pytest.mark.parametrize("codec", CODECS)
def test_a_foreign_reader_reads_activations_in_token_order(tmp_path: Path, codec: str) -> None:
    """From the page alone: every row where it was before it was shuffled, and the token it came from."""
    rows = heavy_rows(N, 7, massive=0)
    tokens, store = write_tokens(tmp_path, N), write_activations(tmp_path, rows, codec)
    foreign, text = Foreign(store.path), Foreign(tokens.path)
    assert not foreign.closed and foreign.recipe["tokens"] == text.recipe == token_recipe()
    order = foreign.order()
    np.testing.assert_array_equal(foreign["position"], order)  # the rows of this store came from tokens 0, 1, 2, ...
    unshuffled = np.empty((N, 7), np.float32)
    unshuffled[order] = dequantised(foreign.recipe["codec"], store.path, lambda folder, name: foreign[name])
    off = np.abs(unshuffled - rows.numpy())[order]
    assert (off <= largest_error(foreign, rows.numpy()[order]) * (1 + 1e-3) + 1e-4).all()
    ids = text["tokens"].reshape(-1)[foreign["position"]]
    np.testing.assert_array_equal(ids, tokens.contexts(0, N).reshape(-1)[order])


def test_a_foreign_reader_meets_a_torn_line_and_a_damaged_one(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(N, 7), ended=True)
    manifest = store.path / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole + b'{"crc":"0000')
    assert Foreign(store.path).rows == ActivationStore(store.path).n_rows == N
    manifest.write_bytes(whole.replace(b'"window":1', b'"window":2', 1))
    with pytest.raises(AssertionError):
        Foreign(store.path)
    manifest.write_bytes(whole)
    chunk = store.path / "row_scale/c/1"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(AssertionError, match="row_scale/c/1"):
        Foreign(store.path)


def test_a_foreign_reader_of_an_empty_manifest(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, CHUNK)
    (store.path / "manifest.jsonl").write_bytes(b"")
    assert Foreign(store.path).rows == 0
    for path in store.path.glob("*/zarr.json"):
        path.unlink()
    assert TokenStore(store.path).n_rows == 0
