"""What of a cache nothing needs, and its removal.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import catalogue
from cache.durable import PARTIAL
from cache.errors import DamagedStore, NotFound
from cache.head import RECIPE
from cache.identity import Recipe, digest
from cache.locks import LOCK, Lock, held
from cache.manifest import MANIFEST
from cache.places import filesystem, filesystem_path, is_remote, listing
from cache.runs import Run
from cache.store import HINTS, REQUEST, Store
from cache.tokens import VOCABULARY, sibling

DAY = 86_400.0
PATIENCE = DAY  # an interrupted command is usually repeated within the day


@dataclass(frozen=True)
class Garbage:
    """Something nothing needs: some files of a folder, or (`files` None) the folder whole."""

    path: Path
    why: str
    bytes: int
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
            files = listing(folder)
            found.append(Garbage(folder, "remains of a store", sum(files.values()), tuple(files)))
            continue
        try:
            store = catalogue.opened(folder)
        except (DamagedStore, NotFound):
            continue  # no store, or one of which is not known what it lists: `sae cache verify` is for these
        readable.append(store)
        if left := remains(store):
            found.append(Garbage(folder, "left by a crash", sum(left.values()), tuple(left)))
    if runs is None:
        return found
    unused = {garbage.path: garbage for garbage in _unused(root, readable, runs, older_than)}
    return sorted(
        [*unused.values(), *(garbage for garbage in found if garbage.path not in unused)],
        key=lambda garbage: garbage.path,
    )


def remove(garbage: Garbage) -> int:
    """Remove it; returns the bytes freed. Raises Busy where a writer has come since: then nothing is removed."""
    if garbage.files is None:
        catalogue.remove_folder(garbage.path)
        return garbage.bytes
    with Lock(garbage.path) as lock:  # all is asked again: a writer may have been here
        if _is_left_over(garbage.path):
            lock.erase()
            return garbage.bytes
        left = remains(catalogue.opened(garbage.path))
        for name in left:
            (garbage.path / name).unlink()
        return sum(left.values())


def remains(store: Store) -> dict[str, int]:
    """Files of a store's folder that a crash left, with their sizes: temporary ones, chunks no manifest line lists."""
    listed = set(store.committed_files())
    return {
        name: size
        for name, size in listing(store.path).items()
        if name.endswith(PARTIAL) or (_is_chunk(name) and name not in listed)
    }


def written(store: Store) -> float | None:
    """When the last window of a store was committed, in seconds since 1970; None where none was."""
    return _changed(store.path / MANIFEST)


def folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Every folder where stores are, and the kind of store it should be."""
    for kind in catalogue.kinds():
        if (root / kind).is_dir():
            yield from ((kind, path) for path in sorted((root / kind).iterdir()) if path.is_dir())


def _is_chunk(name: str) -> bool:
    return re.fullmatch(r"\w+/c/\d+(/0)*", name) is not None


def _is_left_over(folder: Path) -> bool:
    """Whether a folder without a recipe is what is left of a store: by its name, and by all that is in it.

    One that lacks its recipe alone can be repaired; a removal takes what describes the arrays next.
    """
    if (folder / RECIPE).exists() or ((folder / MANIFEST).exists() and any(folder.glob("*/zarr.json"))):
        return False
    own = {MANIFEST, REQUEST, HINTS, LOCK, VOCABULARY, "zarr.json"}
    return re.search(r"(^|-)[0-9a-f]{8}$", folder.name) is not None and all(
        name in own or name.endswith((PARTIAL, "/zarr.json")) or _is_chunk(name) for name in listing(folder)
    )


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
            yield Garbage(store.path, why, catalogue.bytes_in(store.path))


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
    if "split" not in recipe and "tokens" not in recipe:
        return {digest(recipe)}
    both = [sibling(recipe, split) for split in ("train", "validation")]
    return {digest(one) for whole in both for one in (whole, whole.get("tokens", whole))} | {digest(recipe)}
