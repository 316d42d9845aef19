"""A repository of the hub -> a run folder, or a store of the cache."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sae.cache.catalogue import kinds
from sae.cache.disk.identity import digest
from sae.cache.disk.locks import Lock
from sae.cache.disk.paths import is_remote
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.runs import CONFIG, WEIGHTS_CONFIG, Run
from sae.cache.store.head import RECIPE
from sae.cache.store.space import expect_room
from sae.cache.upkeep.damage import inspect_damage, verify
from sae.pipeline.runtime.network import Kind
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.sharing.push import README
from sae.pipeline.sharing.repository import Remote, Repository, expect_inside


class Pulled(NamedTuple):
    """Where it lies now. bytes: how much it is; 0 where it was here already."""

    path: Path
    kind: str
    bytes: int


def pull(
    repository: str, what: str | None, cache: Path, runs: Path, progress: Progress, *, name: str | None = None,
    offline: bool = False,
) -> Pulled:  # fmt: skip
    """Fetch a run or a store that `push` put there; what was fetched before an interruption is not fetched again.

    what: its folder in the repository, or the last part of it; None where there is one alone. name: of the run folder.
    Raises NotFound where there is none such, DamagedStore where what came is not what was pushed.
    """
    kind, there = _listed(repository, offline)
    path = _chosen(repository, _folders(kind, there), what)
    files = [one for one in there.values() if one.path.startswith(f"{path}/") and one.path != f"{path}/{README}"]
    for one in files:
        expect_inside(one.path, path)
    source = Repository(repository, kind, offline)
    if kind == "model":
        destination = runs / (name or path.rpartition("/")[2])
        if destination.exists():
            raise SaeError(f"{destination}: exists; give the run another `name`")
        return _fetched(source, path, files, destination, "run", progress)
    if is_remote(cache):
        raise SaeError(f"{cache}: stores are pulled into a cache on this machine")
    if name is not None:
        raise SaeError(f"name = {name}: a store is called by its recipe; leave it out")
    destination = cache / path
    if destination.exists():
        progress.note(f"{destination}: is here already; nothing to do")
        return Pulled(destination, path.partition("/")[0], 0)
    return _fetched(source, path, files, destination, path.partition("/")[0], progress)


def _listed(repository: str, offline: bool) -> tuple[Kind, dict[str, Remote]]:
    """What lies in the repository of models of that name, or else in that of data sets."""
    try:
        return "model", Repository(repository, "model", offline).files()
    except NotFound as error:
        try:
            return "dataset", Repository(repository, "dataset", offline).files()
        except NotFound:
            raise error from None


def _folders(kind: Kind, there: dict[str, Remote]) -> list[str]:
    """The folders that hold a run, or a store."""
    mark = f"/{WEIGHTS_CONFIG}" if kind == "model" else f"/{RECIPE}"
    found = [path.removesuffix(mark) for path in there if path.endswith(mark)]
    if kind == "model":
        return [folder for folder in found if f"{folder}/{CONFIG}" in there]
    return [folder for folder in found if folder.count("/") == 1 and folder.partition("/")[0] in kinds()]


def _chosen(repository: str, folders: Sequence[str], what: str | None) -> str:
    named = [folder for folder in folders if what is None or what in (folder, folder.rpartition("/")[2])]
    if len(named) == 1:
        return named[0]
    if not folders:
        raise NotFound(f"{repository}: holds no run and no store of ours; another tool's dictionary is for `adopt()`")
    shown = ", ".join(sorted(folders)[:8]) + (", ..." if len(folders) > 8 else "")
    raise NotFound(f"{repository}: {'holds several' if what is None else f'holds no {what}'}; name one of {shown}")


def _fetched(
    source: Repository, path: str, files: Sequence[Remote], destination: Path, kind: str, progress: Progress
) -> Pulled:
    """Fetch files beside a folder, check them, and put them in its place."""
    size = sum(one.size for one in files)
    destination.parent.mkdir(parents=True, exist_ok=True)
    again = digest({"repository": source.name, "path": path})  # the same when it is tried again
    half = destination.parent / f".pulled-{again}"
    with Lock(half):
        half.mkdir(exist_ok=True)
        expect_room(destination.parent, size, "what is fetched")
        progress.start("pull", size, "B")
        try:
            source.get(files, half, progress.advance)
        finally:
            progress.finish()
        whole = half / path
        if wrong := _damage(whole, kind, destination.name):
            shutil.rmtree(half)
            raise DamagedStore(f"{source.name}/{path}: {wrong}; nothing was kept")
        whole.rename(destination)
        shutil.rmtree(half)
    return Pulled(destination, kind, size)


def _damage(folder: Path, kind: str, name: str) -> str | None:
    """What is wrong with what came; None where every byte is as it was committed."""
    try:
        if kind == "run":
            run = Run(folder)
            if run.foreign:
                return f"its {CONFIG} is another tool's; `adopt()` reads such folders"
            return next(iter(run.check()), None)
        view = inspect_damage(folder)
        if view.store.kind != kind or view.store.key != name:
            return f"is {view.store.key} of {view.store.kind}, by its recipe"
        return next(iter([*view.lines, *(finding.says for finding in verify([view], lambda _: None))]), None)
    except SaeError as error:
        return str(error)
