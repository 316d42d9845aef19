"""Exports: plain arrays that equal the store's rows, in either order, whole or absent."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import CHUNK, CONTEXT, few, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.upkeep import export as writing
from sae.cache.upkeep.export import export

N = 5 * CHUNK + 3  # four windows, the last one short
D = 7


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    return write_activations(tmp_path_factory.mktemp("store"), heavy_rows(N, D, massive=0), ended=True)


def nothing(n: int) -> None:
    assert n > 0


def arrays(path: Path) -> dict[str, np.ndarray]:
    group: Any = zarr.open_group(str(path), mode="r", zarr_format=3)
    return {name: array[:] for name, array in group.arrays()}


def in_token_order(store: ActivationStore) -> tuple[np.ndarray, np.ndarray]:
    """All rows and positions, sorted by the slow obvious way."""
    positions = store.positions(0, store.n_rows)
    place = sorted(range(store.n_rows), key=lambda i: int(positions[i]))
    return store.rows(0, store.n_rows).numpy()[place], positions[place]


@pytest.mark.parametrize("codec", ["int8", "bfloat16", "float16", "float32"])
def test_stored_order(tmp_path: Path, codec: str) -> None:
    store = write_activations(tmp_path, heavy_rows(N, D), codec)
    counted: list[int] = []
    made = export(store, tmp_path / "out.zarr", counted.append)
    found = arrays(made.path)
    assert sorted(found) == ["position", "rows"] and found["rows"].dtype == np.float32
    np.testing.assert_array_equal(found["rows"], store.rows(0, N).numpy())
    np.testing.assert_array_equal(found["position"], store.positions(0, N))
    assert sum(counted) == made.rows == N
    assert made.bytes == sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    group: Any = zarr.open_group(str(made.path), mode="r")
    assert group.attrs["recipe"] == store.recipe and group.attrs["store"] == store.key
    assert (group.attrs["order"], group.attrs["rows"], group.attrs["dtype"]) == ("stored", N, "float32")
    assert group["rows"].metadata.dimension_names == ("row", "dim") and group["rows"].chunks == (CHUNK, D)


@few
@given(rows=st.integers(1, N), order=st.sampled_from(writing.ORDERS))
def test_a_beginning_in_either_order(
    store: ActivationStore, tmp_path_factory: pytest.TempPathFactory, rows: int, order: str
) -> None:
    found = arrays(export(store, tmp_path_factory.mktemp("out") / "z", nothing, rows=rows, order=order).path)
    every, positions = in_token_order(store)
    if order == "stored":
        every, positions = store.rows(0, N).numpy(), store.positions(0, N)
    np.testing.assert_array_equal(found["rows"], every[:rows])
    np.testing.assert_array_equal(found["position"], positions[:rows])


def test_more_rows_than_there_are(store: ActivationStore, tmp_path: Path) -> None:
    assert export(store, tmp_path / "z", nothing, rows=10**9).rows == N


def test_halves(store: ActivationStore, tmp_path: Path) -> None:
    rows = store.rows(0, N)
    half = arrays(export(store, tmp_path / "half", nothing, dtype="float16").path)["rows"]
    np.testing.assert_array_equal(half, rows.numpy().astype(np.float16))
    brain: Any = zarr.open_array(str(export(store, tmp_path / "brain", nothing, dtype="bfloat16").path / "rows"))
    assert brain.dtype == np.uint16 and brain.attrs["logical_dtype"] == "bfloat16"
    np.testing.assert_array_equal(
        (brain[:].astype(np.uint32) << 16).view(np.float32), rows.to(torch.bfloat16).float().numpy()
    )


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    rows = heavy_rows(N, D)
    rows[40, 3] = 1e5
    store = write_activations(tmp_path, rows, "float32")
    with pytest.raises(SaeError, match=r"dtype = float16: a value of 1e\+05 is beyond it; take float32 or bfloat16"):
        export(store, tmp_path / "out" / "z", nothing, dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


def test_with_tokens(store: ActivationStore, tmp_path: Path) -> None:
    """The contexts that positions count in, and no more than are needed."""
    tokens = write_tokens(tmp_path, 40)
    found = arrays(export(store, tmp_path / "z", nothing, rows=50, order="token", tokens=tokens).path)
    contexts = -(-50 // CONTEXT)
    np.testing.assert_array_equal(found["tokens"], tokens.contexts(0, contexts))
    np.testing.assert_array_equal(
        found["tokens"].reshape(-1)[found["position"]], tokens.contexts(0, 40).reshape(-1)[:50]
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dtype": "int4"}, "dtype = int4: rows are exported as float32, float16, bfloat16"),
        ({"rows": 0}, "rows = 0: an export has at least one"),
        ({"order": "any"}, "order = any: rows come in stored or in token order"),
    ],
)
def test_what_is_refused(store: ActivationStore, tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(SaeError, match=says):
        export(store, tmp_path / "z", nothing, **given)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_there_is_left_alone(store: ActivationStore, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "z")
    with pytest.raises(SaeError, match="z: exists; remove it or name another"):
        export(store, tmp_path / "z", nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["z"]


def test_a_damaged_store_is_not_exported(tmp_path: Path) -> None:
    store = write_activations(tmp_path, heavy_rows(N, D))
    (store.path / "rows/c/4/0").unlink()
    with pytest.raises(DamagedStore, match="rows/c/4/0: missing"):
        export(store, tmp_path / "out" / "z", nothing)
    assert list((tmp_path / "out").iterdir()) == []


def test_it_appears_when_it_is_whole(store: ActivationStore, tmp_path: Path) -> None:
    """Until then there is one folder with another name, and after Ctrl-C none."""

    def interrupt(_: int) -> None:
        (left,) = tmp_path.iterdir()
        assert left.name.startswith("z.") and left.name.endswith(".partial")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, tmp_path / "z", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_full(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(SaeError, match="no space left on the disk"):
        export(store, tmp_path / "z", nothing)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a window is read at once in token order, and a chunk in stored order."""
    store = write_activations(tmp_path, heavy_rows(20 * CHUNK, D))
    most, read = {"stored": CHUNK, "token": 4 * CHUNK}, ActivationStore.read
    for order, limit in most.items():
        asked: list[int] = []

        def noted(self: ActivationStore, array: str, start: int, stop: int, asked: list[int] = asked) -> np.ndarray:
            asked.append(stop - start)
            return read(self, array, start, stop)

        with monkeypatch.context() as patch:
            patch.setattr(ActivationStore, "read", noted)
            export(store, tmp_path / order, nothing, order=order)
        assert max(asked) == limit
