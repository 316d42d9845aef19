"""Whatever changes a committed byte is noticed, and the file is named."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_stores import CHUNK, N, closed_store, files, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.locks import Lock
from sae.cache.disk.paths import listing
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.loader import Loader
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.notes import write_note
from sae.cache.store.store import HINTS, REQUEST, Store
from sae.cache.tokens import TokenStore


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


@pytest.fixture(params=["tokens", "activations"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return closed_store(request.param, tmp_path)


def read_all(store: Store) -> None:
    for name in store.committed_files():
        store.stored(name)


def committed(store: Store) -> list[str]:
    names = list(store.committed_files())
    assert len(names) == sum(1 for name in files(store.path) if "/c/" in name or name == "vocabulary.json")
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
    with pytest.raises(DamagedStore, match=r"rows/c/2/0: missing, though it was committed; `verify\("):
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
    for content in ("", "[]", "{}", '{"format": 2}'):
        path.write_text(content)
        with pytest.raises(
            DamagedStore, match=r"is not readable as a recipe \(.*\); remove the store and make it again"
        ):
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


# --- any change of any file ------------------------------------------------------------------------------------------

KINDS = ("tokens", "activations/int8", "activations/float32")  # the loader reads the last a few rows at a time
NOTES = {REQUEST: {"rows": 163}, HINTS: {"model": "/models/mine"}}  # not missed where they are gone


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: None) -> dict[str, Store]:
    """A store of each kind with all the files a store can have."""
    stores: dict[str, Store] = {}
    for kind in KINDS:
        store = stores[kind] = closed_store(kind, tmp_path_factory.mktemp("whole"))
        for name, content in NOTES.items():
            write_note(store.path / name, content)
    return stores


@st.composite
def changes(draw: st.DrawFn, files: dict[str, bytes]) -> tuple[str, bytes | None]:
    """A file and what becomes of it: one bit flipped, its end cut off, gone. Every kind of file is as likely."""
    kinds = sorted({re.sub(r"\d+", "0", name) for name in files})
    kind = draw(st.sampled_from(kinds))
    name = draw(st.sampled_from([name for name in files if re.sub(r"\d+", "0", name) == kind]))
    data, how = files[name], draw(st.sampled_from(["flip", "flip", "flip", "cut", "line", "gone"]))
    if how == "gone" or not data:
        return name, None
    if how == "line":  # whole lines, or all
        return name, data[: data.rfind(b"\n", 0, draw(st.integers(0, len(data) - 1))) + 1]
    place = draw(st.integers(0, len(data) - 1))
    if how == "cut":
        return name, data[:place]
    return name, data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]


def verified(root: Path) -> str:
    """All that is found wrong in a cache."""
    stores, lines = catalogue.readable(root)
    for one in stores:
        lines += filter(None, map(one.damage, [*one.metadata(), *one.committed_files(), *NOTES]))
    return "\n".join(lines)


def questions_to(path: Path, kind: type[Store]) -> dict[str, Callable[[Store], object]]:
    """Everything a reader can ask of a store."""
    asked: dict[str, Callable[[Store], object]] = {
        "rows": lambda store: store.n_rows,
        "closed": lambda store: store.closed,
        "recipe": lambda store: (store.recipe, store.slug, store.kind),
    }
    for spec in kind.specs(kind(path).recipe):
        if spec.grows:
            asked[spec.name] = lambda store, name=spec.name: store.read(name, 0, store.n_rows).tobytes()
        else:
            asked[spec.name] = lambda store, name=spec.name: store.chunk(name, 0).tobytes()
    if kind is TokenStore:
        asked["vocabulary"] = lambda store: cast(TokenStore, store).vocabulary()
    else:
        asked["loader"] = lambda store: [b.tolist() for b in Loader(cast(ActivationStore, store), 16, epochs=1)]
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_any_change_of_any_file(whole: dict[str, Store], kind: str) -> None:
    """It is found by a verification, which names the file; and no reader is ever told anything that is not so."""
    store = whole[kind]
    files = {name: (store.path / name).read_bytes() for name in listing(store.path)}
    questions = questions_to(store.path, type(store))
    right = {name: ask(store) for name, ask in questions.items()}
    assert verified(store.path.parents[1]) == ""

    def check(change: tuple[str, bytes | None]) -> None:
        name, data = change
        path = store.path / name
        path.unlink() if data is None else path.write_bytes(data)
        try:
            found = verified(store.path.parents[1])
            harmless = name == "lock" or (name in NOTES and data is None)
            assert str(path) in found or harmless or data == files[name], (name, found)
            try:
                changed = type(store)(store.path)
            except SaeError:
                return
            for question, ask in questions.items():
                with suppress(SaeError):
                    assert ask(changed) == right[question], (name, question)
            with suppress(SaeError):
                assert changed.requested == (0 if (name, data) == (REQUEST, None) else 163)
            with suppress(SaeError):
                assert changed.hints == ({} if (name, data) == (HINTS, None) else NOTES[HINTS])
        finally:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(files[name])

    for name in {re.sub(r"\d+", "0", name): name for name in files}.values():  # those too that are rarely drawn
        check((name, None))
    settings(deadline=None, max_examples=100)(given(changes(files))(check))()


def test_any_change_of_the_note_of_the_last_command(tmp_path: Path) -> None:
    """It leads to the store that was made, or to none."""
    one, other = write_tokens(tmp_path, CHUNK), write_tokens(tmp_path, CHUNK, seed=1)
    catalogue.remember(tmp_path, "tokens", [one.key])
    path = tmp_path / "latest.json"
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with suppress(SaeError):
            assert catalogue.find(tmp_path, TokenStore, None).key == one.key
    assert other.key != one.key


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 5])
def test_lines_cut_off_the_manifest_are_missed(store: Store, lines: int) -> None:
    """And nothing is cleared away because of it: put back, the store is whole."""
    path = store.path / MANIFEST
    before, data = files(store.path), path.read_bytes()
    path.write_bytes(b"".join(data.splitlines(keepends=True)[:-lines]))
    with pytest.raises(DamagedStore, match=re.escape(str(path))):
        type(store)(store.path)
    with pytest.raises(DamagedStore, match=re.escape(str(path))):
        closed_store(store.kind, store.path.parents[1])
    path.write_bytes(data)
    assert files(store.path) == before
    assert files(closed_store(store.kind, store.path.parents[1]).path) == before


def test_a_writer_that_ends_between_two_looks_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed is read first, then the file: meanwhile a store grows, and nobody holds it any more."""
    store = write_tokens(tmp_path, CHUNK)
    plain, rows = type(store).refreshed, [2 * CHUNK]

    def late(one: Store) -> Store:
        found = plain(one)
        if rows:
            write_tokens(tmp_path, rows.pop())
        return found

    monkeypatch.setattr(type(store), "refreshed", late)
    assert store.damage("tokens/zarr.json") is None and not rows
    (store.path / "tokens" / "zarr.json").write_bytes(b"{}")
    assert "not as committed" in str(store.damage("tokens/zarr.json"))
