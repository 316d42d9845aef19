"""A damaged store -> the same store, whole: exactly the windows with damage are made again, from what made them.

What is made again has the committed checksum wherever the bytes are a function of the recipe alone, and then only the
damaged files are written. Where they differ:

- activations of another kind of machine differ in rounding. The whole window is replaced, its line in the manifest too,
  and it is said; that the rows still align with those of other sites is checked (`position` must be as committed).
- tokens never differ: their text is another one. That is an error, and nothing is changed.

The lock is held throughout. Everything of a window is computed before the first of its files is replaced, each file is
replaced whole, and the manifest last: a repair cut short leaves the store no more damaged than it was, and repeating it
continues. recipe.json, which says what a store is, comes back from the attributes of the Zarr group, which say it too.
Given up: telling which of two such copies is right where the folder's name fits neither.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import checksum, expect_no_link, read, write_in
from sae.cache.disk.identity import digest
from sae.cache.disk.locks import Lock
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.contents import group_recipe
from sae.cache.store.head import RECIPE, head_bytes
from sae.cache.store.manifest import MANIFEST, Manifest, Window
from sae.cache.store.notes import note_bytes
from sae.cache.store.store import HINTS, REQUEST, Store
from sae.cache.store.writer import Arrays, encoders
from sae.cache.upkeep.damage import DamagedStoreView, Finding, inspect_damage


class RebuiltWindow(NamedTuple):
    """A window made again: its arrays, and the notes of its line."""

    arrays: Arrays
    notes: dict[str, Any]


class WindowRebuilder(Protocol):
    """A maker of the parts of one store. Each method raises SaeError where something it needs is not there any more."""

    def window(self, before: Store, window: Window, *, lost: bool) -> RebuiltWindow:
        """A window of a store that is whole `before` it. Of a lost one only the bounds are known: the rows may end."""

    def file(self, name: str) -> bytes:
        """A file of the store that belongs to no array."""


@dataclass(frozen=True)
class Repaired:
    """The result of a repair: the files it wrote, and the windows whose bytes are new ones."""

    key: str
    files: tuple[str, ...]
    replaced: tuple[int, ...]

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.replaced))
        new = f"; window {numbers} has other bytes than before, equal up to rounding" if self.replaced else ""
        return f"{self.key}: {len(self.files)} file{'s' if len(self.files) != 1 else ''} written again{new}"

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "files": list(self.files), "replaced_windows": list(self.replaced)}


def repair(folder: Path, damaged: Collection[str], maker: Callable[[Store], WindowRebuilder]) -> Repaired:
    """Make the `damaged` files of the store in a folder again, and what its manifest and its metadata have lost.

    `maker` is asked once, and only where something has to be made again. Raises Busy while a writer holds the store,
    SaeError where what it was made from is not there any more, DamagedStore where nothing says what it is.
    """
    with Lock(folder):
        return _Repair(inspect_damage(folder), maker).run(damaged)


def repair_all(
    found: Sequence[DamagedStoreView], findings: Sequence[Finding], maker: Callable[[Store], WindowRebuilder]
) -> tuple[list[Repaired], list[SaeError]]:
    """Repair the stores that have damage, one after the other: what was done, and what could not be."""
    done: list[Repaired] = []
    problems: list[SaeError] = []
    for one in found:
        damaged = [finding.name for finding in findings if finding.store is one.store]
        if not damaged and not one.lines:
            continue
        try:
            if one.link is not None:
                expect_no_link(one.link)
            done.append(repair(one.store.path, damaged, maker))
        except SaeError as error:
            problems.append(error)
    return done, problems


def restore_recipe(folder: Path) -> Repaired | None:
    """Write a damaged recipe.json anew from the attributes of the Zarr group; None where those do not say it."""
    found = group_recipe(folder)
    try:
        kind, recipe = found or ("", {})
        catalogue.kinds()[kind].expect(recipe)
    except (ValueError, KeyError):
        return None
    slug = re.sub(f"-?{digest(recipe)}$", "", folder.name)
    with Lock(folder):
        write_in(folder, RECIPE, head_bytes(kind, slug, recipe))
    return Repaired(folder.name, (RECIPE,), ())


@dataclass
class _Repair:
    """One repair, under the lock."""

    found: DamagedStoreView
    new_maker: Callable[[Store], WindowRebuilder]
    written: list[str] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    _maker: WindowRebuilder | None = None

    def run(self, damaged: Collection[str]) -> Repaired:
        store = self.found.store
        listed = set(store.committed_files())
        bad = {name for name in damaged if name in listed and store.damage(name) is not None}
        windows: list[Window] = []
        for window in store.manifest.windows:
            again = bad & window.files.keys()
            windows.append(self._window(windows, window, again) if again or self._lost(window) else window)
        short = bool(windows) and windows[-1].stop < store.windows.start(len(windows))
        manifest = Manifest(tuple(windows), store.manifest.closed or short)
        self._write(MANIFEST, manifest.text())
        for name, data in type(store)(store.path, manifest).metadata().items():
            self._write(name, data)
        for name, content in ((REQUEST, {"rows": manifest.rows}), (HINTS, {})):  # what they said is lost
            if name in damaged and store.damage(name) is not None:
                self._write(name, note_bytes(content))
        return Repaired(store.key, tuple(self.written), tuple(self.replaced))

    def _lost(self, window: Window) -> bool:
        return window.index in self.found.lost

    def _window(self, before: Sequence[Window], window: Window, bad: Collection[str]) -> Window:
        """Make a window again and write what of it is damaged; its line, which is the old one wherever it can be."""
        store, lost = self.found.store, self._lost(window)
        maker = self._maker = self._maker or self.new_maker(store)
        made = {name: maker.file(name) for name in bad if "/" not in name}
        if any(_sealed(data) != window.files[name] for name, data in made.items()):
            raise self._changed(window)
        if lost or len(made) < len(bad):
            known = before if lost else [*before, window]
            arrays, notes = maker.window(type(store)(store.path, Manifest(tuple(known))), window, lost=lost)
            encode = encoders(store, window.index, arrays)
            made |= {name: encode[name]() for name in bad if name in encode}
            if lost or any(_sealed(data) != window.files[name] for name, data in made.items()):
                made |= {name: maker.file(name) for name in store.beside if lost and window.index == 0}
                made |= {name: encode[name]() for name in encode if name not in made}
                stop = window.start + next(len(rows) for name, rows in arrays.items() if store.arrays[name].grows)
                files = {name: _sealed(data) for name, data in made.items()}
                window = self._replacement(window, Window(window.index, window.start, stop, files, notes))
        for name, data in sorted(made.items()):
            self._write(name, data)
        return window

    def _replacement(self, window: Window, made: Window) -> Window:
        """`made`, where it may take the place of `window`. Raises SaeError where it may not."""
        store = self.found.store
        if self._lost(window):
            last = window.index == len(store.manifest.windows) - 1
            if made.stop != window.stop and not (last and self.found.open_end):
                raise self._changed(window)
            return made
        places = [name for name in made.files if name.startswith("position/")]
        if not isinstance(store, ActivationStore) or any(made.files[name] != window.files[name] for name in places):
            raise self._changed(window)
        self.replaced.append(window.index)
        return made

    def _changed(self, window: Window) -> SaeError:
        return SaeError(
            f"{self.found.store.path}: window {window.index} made again is another one than was committed, so what it "
            "was made from has changed; nothing of it was replaced. Find what it was made from, or remove the store "
            "(`remove()`) and make it again"
        )

    def _write(self, name: str, data: bytes) -> None:
        """Write a file where it is not as it should be."""
        path = self.found.store.path
        if _or_none(path / name) != data:
            write_in(path, name, data)
            self.written.append(name)


def _or_none(path: Path) -> bytes | None:
    """The bytes of a file; None where there is none, or something else in its place."""
    try:
        return read(path)
    except DamagedStore:
        return None


def _sealed(data: bytes) -> tuple[int, str]:
    return len(data), checksum(data)
