"""Removing stores from a cache: what a name means, what is refused, and what the last command could not complete."""

import re
from contextlib import suppress
from pathlib import Path

from sae.cache import catalogue
from sae.cache.disk import removal
from sae.cache.disk.durable import expect_no_link, explained, read
from sae.cache.disk.identity import digest
from sae.cache.disk.locks import Lock, held
from sae.cache.disk.paths import is_remote, parse_path
from sae.cache.errors import Busy, NotFound, SaeError
from sae.cache.store.contents import group_recipe, is_own
from sae.cache.store.head import RECIPE, read_head
from sae.cache.store.manifest import MANIFEST, read_line
from sae.cache.tokens import SPLITS, TokenStore, sibling


def finish(root: Path) -> list[str]:
    """Complete the removals of stores that were cut short; their keys."""
    parents = [root / kind for kind in catalogue.kinds()]
    return [
        key for parent in parents
        if is_remote(root) or not parent.is_symlink()
        for key in removal.finish(parent, is_own)
    ]  # fmt: skip


def removable(root: Path, name: str) -> Path:
    """Return the path that `sae cache rm` would remove: a folder of the cache, damaged or not, or a link where a store
    could be.

    A beginning means all training stores that begin so: one that is not finished is as good an answer as one that is.
    Raises SaeError for a path that leads elsewhere.
    """
    if not name:
        raise SaeError("the name of a store is empty; `stores()` lists the keys")
    parents = [root / kind for kind in catalogue.kinds()]
    every = {path for parent in parents for file in (RECIPE, MANIFEST) for path in catalogue.holding(parent, file)}
    every |= {path for parent in parents if not is_remote(root) for path in parent.glob("*") if path.is_symlink()}
    known = sorted(every)
    begun = [path for path in known if path.name.startswith(name)]
    matches = [path for path in known if path.name == name] or catalogue.training_of(begun)
    if len(matches) > 1:
        raise SaeError(f"{name}: ambiguous; matches {catalogue.listed(matches)}")
    if matches:
        return matches[0]
    path = catalogue.as_named(parse_path(name))
    if not (path.exists() or path.is_symlink()):
        raise NotFound(f"{name}: no such store in {root}; there is {catalogue.listed(known) or 'nothing yet'}")
    for parent in parents:
        if is_remote(path) == is_remote(root) and path.parent == catalogue.as_named(parent / "x").parent:
            return parent / path.name
    raise SaeError(f"{name}: is not a store of the cache {root}, so it is left alone; for another say `cache`")


def remove(root: Path, path: Path) -> int:
    """Delete the store in a folder of the cache, readable or not, or a link in its place; returns the bytes freed.

    Raises SaeError where it is not a store or holds what no store does, Busy while a living process writes or reads it.
    """
    expect_no_link(path.parent)
    if not is_remote(path) and path.is_symlink():
        try:
            path.unlink()
        except OSError as error:
            raise explained(error, path) from error
        return 0
    if not _is_store(path):
        raise SaeError(
            f"{path}: is not a store, or too damaged to tell (neither {RECIPE} nor {MANIFEST} nor zarr.json is that of "
            "such a store), so it is left alone; remove it yourself"
        )
    if user := _harvest_reading(root, path):
        raise Busy(f"{path}: a living process is writing {user.name} from it; wait for it or end it")
    freed = removal.size(path)
    with Lock(path) as lock:
        removal.remove(path, is_own, lock)
    return freed


def _is_store(path: Path) -> bool:
    """Return True if a folder is a store by more than names: its head is right or, where that is damaged, another part
    is."""
    try:
        read_head(path)
    except SaeError:
        lines = (read(path / MANIFEST) or b"").splitlines()
        named = re.search(r"(^|-)[0-9a-f]{8}$", path.name) is not None
        return named and (any(read_line(line) is not None for line in lines) or group_recipe(path) is not None)
    return True


def _harvest_reading(root: Path, path: Path) -> Path | None:
    """A store that a living process is writing from the tokens in `path`, or is about to: it harvests both splits."""
    if path.parent.name != TokenStore.kind:
        return None
    for folder in catalogue.folders(root, "activations"):
        if held(folder):
            with suppress(SaeError):  # damaged: nobody can go on writing it
                recipe = read_head(folder).recipe
                if "tokens" in recipe and path.name.endswith(
                    tuple(digest(sibling(recipe["tokens"], split)) for split in SPLITS)
                ):
                    return folder
    return None
