"""Whatever changes a committed byte is noticed, and the file is named."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small_stores import CHUNK, files, heavy_rows, shrunk, write_activations, write_tokens

from cache.errors import DamagedStore, SaeError
from cache.locks import Lock
from cache.store import RECIPE, Store

N = 5 * CHUNK + 3


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@pytest.fixture(params=["tokens", "activations"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A closed store of four windows, the last one short."""
    if request.param == "tokens":
        return write_tokens(tmp_path, N, ended=True)
    return write_activations(tmp_path, heavy_rows(N, 7), ended=True)


def read_all(store: Store) -> None:
    for name in store.committed_files():
        store.stored(name)


def committed(store: Store) -> list[str]:
    names = list(store.committed_files())
    assert len(names) == sum(1 for name in files(store.path) if "/c/" in name)
    return names


def expect_damage(store: Store, name: str) -> None:
    """The changed file, and only it, is named; no array returns anything of it."""
    fresh = type(store)(store.path)
    with pytest.raises(DamagedStore, match=re.escape(str(store.path / name))):
        fresh.stored(name)
    with pytest.raises(DamagedStore, match=re.escape(str(store.path / name))):
        read_all(fresh)
    assert [other for other in committed_and_metadata(fresh) if fresh.damage(other)] == [name]


def committed_and_metadata(store: Store) -> list[str]:
    return [*store.committed_files(), *store.metadata()]


def test_a_flipped_bit_anywhere_is_noticed(store: Store) -> None:
    random = np.random.default_rng(0)
    for name in committed(store):
        path = store.path / name
        data = path.read_bytes()
        for place in {0, len(data) - 1, *random.integers(0, len(data), 2).tolist()}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(random.integers(8))]) + data[place + 1 :])
            with pytest.raises(DamagedStore, match=re.escape(f"{path}: damaged")):
                store.stored(name)
        path.write_bytes(data)
    read_all(store)


def test_every_bit_of_one_file(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, N)
    name = "length/c/0"
    data = (store.path / name).read_bytes()
    for bit in range(8 * len(data)):
        (store.path / name).write_bytes(
            data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        )
        with pytest.raises(DamagedStore):
            store.lengths(0, 1)


@pytest.mark.parametrize("change", ["missing", "truncated", "empty", "longer", "another chunk"])
def test_a_changed_file_is_named(store: Store, change: str) -> None:
    for name in committed(store)[::3]:
        path = store.path / name
        data = path.read_bytes()
        if change == "missing":
            path.unlink()
        elif change == "another chunk":
            path.write_bytes((store.path / committed(store)[1]).read_bytes())
            if path.read_bytes() == data:
                continue
        else:
            path.write_bytes({"truncated": data[:-1], "empty": b"", "longer": data + b"\0"}[change])
        expect_damage(store, name)
        path.write_bytes(data)
    read_all(store)


def test_missing_rows_are_never_filled_in(tmp_path: Path) -> None:
    """zarr would return -128 here without a word."""
    store = write_activations(tmp_path, heavy_rows(N, 7))
    (store.path / "rows/c/2/0").unlink()
    with pytest.raises(DamagedStore, match=r"rows/c/2/0: missing, though it was committed; `sae cache verify"):
        store.rows(60, 80)
    with pytest.raises(DamagedStore):
        store.encoded_chunk(2)
    assert len(store.rows(0, 64)) == 64


def test_a_changed_recipe_is_noticed(store: Store) -> None:
    path = store.path / RECIPE
    text = path.read_text()
    body = text.index('"recipe"')
    for place in range(body + 10, len(text) - 2, 3):
        changed = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        path.write_text(changed)
        if text[place].isspace() and changed.split() == text.split():
            continue
        with pytest.raises(SaeError):
            type(store)(store.path)
    for content in ("", "[]", "{}", '{"format": 1}'):
        path.write_text(content)
        with pytest.raises(DamagedStore, match="is not readable as a recipe; remove the store and make it again"):
            type(store)(store.path)


def test_metadata_is_verified_but_never_needed(store: Store) -> None:
    for name in store.metadata():
        data = (store.path / name).read_bytes()
        for change in (b"", data.replace(b"3", b"4", 1), None):
            if change is None:
                (store.path / name).unlink()
            else:
                (store.path / name).write_bytes(change)
            assert store.damage(name) == (
                f"{store.path / name}: missing or not as committed; repeat the command that made the store"
            )
            read_all(type(store)(store.path))
        (store.path / name).write_bytes(data)
        assert store.damage(name) is None


def test_a_growing_store_is_not_damaged(tmp_path: Path) -> None:
    """A verification that began before a window was committed, or runs between the commit and the metadata."""
    store = write_tokens(tmp_path, CHUNK)
    grown = write_tokens(tmp_path, 4 * CHUNK)
    assert [store.damage(name) for name in store.metadata()] == [None] * 4
    (grown.path / "tokens/zarr.json").write_bytes(grown.arrays["tokens"].metadata(CHUNK))
    assert grown.damage("tokens/zarr.json") is not None
    with Lock(grown.path):
        assert grown.damage("tokens/zarr.json") is None
