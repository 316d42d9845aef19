"""Garbage is the part of a cache that nothing needs; it is found and removed.

Three kinds, each listed with its reason before anything is removed:

- what a crash left inside a store: temporary files, chunks no manifest line lists;
- what a crash or a deletion cut short left of a store: a folder without its recipe;
- stores that no run was trained on, that no last command made, on which no kept store is built, and that are old or
  were never completed.

A store whose lock is held is left alone, and so is every file that no writer of ours would have made. Given up: telling
when a store was last read. Files know when they were last written; a run folder says which stores it needs.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sae.cache import catalogue
from sae.cache.disk import removal
from sae.cache.disk.durable import expect_no_link
from sae.cache.disk.identity import Recipe, digest
from sae.cache.disk.locks import Lock, held
from sae.cache.disk.paths import filesystem, filesystem_path, is_remote, listing
from sae.cache.errors import DamagedStore, NotFound
from sae.cache.runs import Run
from sae.cache.store.contents import is_chunk, is_own, is_temporary
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.store import Store
from sae.cache.tokens import sibling
from sae.cache.upkeep import removing

DAY = 86_400.0
PATIENCE = DAY  # an interrupted command is usually repeated within the day


@dataclass(frozen=True)
class Garbage:
    """Something nothing needs: some files of a folder, or (`files` None) the folder whole.

    `remove` removes it and returns the bytes freed. It raises Busy where somebody has come since: then all is left.
    """

    path: Path
    why: str
    bytes: int
    remove: Callable[[], int] = field(repr=False, compare=False)
    files: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        files = None if self.files is None else list(self.files)
        return {"path": str(self.path), "why": self.why, "bytes": self.bytes, "files": files}


def survey(root: Path, runs: Sequence[Run] | None, older_than: float) -> list[Garbage]:
    """Everything in the cache `root` that nothing needs, in the order of the folders.

    `runs` are the runs whose stores are needed; None where nobody knows, and then no store that can be read is garbage.
    A complete store is garbage `older_than` seconds after its last window, an incomplete one after a day (or
    `older_than`, where that is less).
    """
    found: list[Garbage] = []
    readable: list[Store] = []
    for _, folder in folders(root):
        if held(folder):
            continue
        if _is_left_over(folder):
            size, files = catalogue.bytes_in(folder), tuple(listing(folder))
            found.append(Garbage(folder, "remains of a store", size, partial(_remove_remains, folder), files))
            continue
        try:
            store = catalogue.opened(folder)
        except (DamagedStore, NotFound):
            continue  # no store, or one of which is not known what it lists: `sae cache verify` is for these
        readable.append(store)
        if left := remains(store):
            size = sum(left.values())
            found.append(Garbage(folder, "left by a crash", size, partial(_remove_remains, folder), tuple(left)))
    if runs is None:
        return found
    unused = {garbage.path: garbage for garbage in _unused(root, readable, runs, older_than)}
    return sorted(
        [*unused.values(), *(garbage for garbage in found if garbage.path not in unused)],
        key=lambda garbage: garbage.path,
    )


def _remove_remains(folder: Path) -> int:
    """Remove what a crash left of a store, or in it."""
    size = catalogue.bytes_in(folder)
    with Lock(folder) as lock:  # all is asked again: a writer may have been here
        if _is_left_over(folder):
            removal.remove(folder, is_own, lock)
            return size
        left = remains(catalogue.opened(folder))
        for name in left:
            expect_no_link(folder, name)
            (folder / name).unlink(missing_ok=True)
        return sum(left.values())


def remains(store: Store) -> dict[str, int]:
    """Files of a store's folder that a crash left, with their sizes: temporary ones, chunks no manifest line lists."""
    listed = set(store.committed_files())
    return {
        name: size
        for name, size in listing(store.path).items()
        if is_temporary(name) or (is_chunk(name) and name not in listed)
    }


def written(store: Store) -> float | None:
    """When the last window of a store was committed, in seconds since 1970; None where none was."""
    return _changed(store.path / MANIFEST)


def folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Every folder where stores are, and the kind of store it should be. Links lead to what is not the cache's."""
    for kind in catalogue.kinds():
        parent = root / kind
        if not parent.is_dir() or _is_link(parent):
            continue
        gone = removal.removed(parent)
        for path in sorted(parent.iterdir()):
            if path.is_dir() and not (_is_link(path) or path.name in gone or removal.TRASH.fullmatch(path.name)):
                yield kind, path


def _is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def _is_left_over(folder: Path) -> bool:
    """Return True if a folder without a recipe is what is left of a store: by its name, and by all that is in it.

    One that lacks its recipe alone can be repaired.
    """
    if (folder / RECIPE).exists() or ((folder / MANIFEST).exists() and any(folder.glob("*/zarr.json"))):
        return False
    return re.search(r"(^|-)[0-9a-f]{8}$", folder.name) is not None and not removal.strangers(folder, is_own)


def _unused(root: Path, stores: Sequence[Store], runs: Iterable[Run], older_than: float) -> Iterator[Garbage]:
    """The stores nothing needs. A kept store keeps what it was made from, and the one of the other documents."""
    last = {key for keys in catalogue.latest(root).values() for key in keys}
    needed = {name for run in runs for recipe in _recipes(run.config) for name in _family(recipe)}
    patience = {store.key: older_than if store.complete else min(older_than, PATIENCE) for store in stores}
    for store in stores:
        if store.key in last or _age(store) < patience[store.key]:
            needed |= _family(store.recipe)
    # activations that are needed need the tokens they were made from, whoever made those
    needed |= {name for store in stores if digest(store.recipe) in needed for name in _family(store.recipe)}
    for store in stores:
        if digest(store.recipe) not in needed:
            state = "used by no run" if store.complete else "never completed, used by no run"
            why = f"{state}, last written {_age(store) / DAY:.0f} days ago"
            folder = root / store.kind / store.key
            yield Garbage(folder, why, catalogue.bytes_in(folder), partial(removing.remove, root, folder))


def _age(store: Store) -> float:
    """Seconds since a store was last written (since it was begun, where it has no window)."""
    return time.time() - (written(store) or _changed(store.path / RECIPE) or time.time())


def _changed(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None where there is none."""
    if not path.exists():
        return None
    return (
        float(filesystem(path).modified(filesystem_path(path)).timestamp()) if is_remote(path) else path.stat().st_mtime
    )


def _recipes(content: Any) -> Iterator[Recipe]:
    """Every recipe that a run's configuration holds."""
    if isinstance(content, dict):
        for name, inner in content.items():
            if name == "recipe" and isinstance(inner, dict):
                yield inner
            else:
                yield from _recipes(inner)
    elif isinstance(content, list):
        for inner in content:
            yield from _recipes(inner)


def _family(recipe: Recipe) -> set[str]:
    """Hashes of the stores that belong together: the recipe's, that of the other documents, and their tokens."""
    tokens = recipe.get("tokens")
    if "split" not in recipe and not (isinstance(tokens, dict) and "split" in tokens):
        return {digest(recipe)}
    both = [sibling(recipe, split) for split in ("train", "validation")]
    return {digest(one) for whole in both for one in (whole, whole.get("tokens", whole))} | {digest(recipe)}
