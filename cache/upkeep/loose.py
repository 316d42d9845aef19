"""Remains of killed processes outside of stores: temporary files in and beside run folders and in the cache itself, run
folders that were being begun, and exports half written.

A temporary file's name tells whose it is. It is garbage when that process is gone; where nobody can know (another
machine's, or a name of version 0.1.0) after a day. An export may be anywhere, so a file in the cache says
where one is being written.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from sae.cache.catalogue import LATEST
from sae.cache.disk import removal
from sae.cache.disk.durable import read, write_atomic
from sae.cache.disk.locks import LOCK, Lock, held
from sae.cache.disk.paths import is_remote, listing
from sae.cache.disk.processes import final_name, left_behind, temporary
from sae.cache.errors import SaeError
from sae.cache.metrics_log import METRICS
from sae.cache.run_folder import CONFIG, is_begun
from sae.cache.runs import EVALUATION, FEATURES, LATENTS, SNAPSHOTS, STAGED, STATISTICS, WEIGHTS, WEIGHTS_CONFIG
from sae.cache.upkeep.garbage import PATIENCE, Garbage

EXPORT = "export"  # `export.<whose>.partial` in the cache holds the path of an export being written
MOST_PATH = 4096
WRITTEN = (CONFIG, METRICS, STAGED, WEIGHTS, WEIGHTS_CONFIG, EVALUATION, LATENTS, FEATURES, STATISTICS)
OWN = {Path(name).name for name in WRITTEN}


@contextmanager
def noted(root: Path, half: Path) -> Iterator[None]:
    """While this lasts, a file in the cache says that an export is being written in the folder `half`."""
    note = root / temporary(EXPORT)
    with suppress(SaeError):  # a cache that may only be read cannot note it; nobody will clear up then
        write_atomic(note, os.fsencode(half))
    try:
        yield
    finally:
        with suppress(OSError):
            note.unlink(missing_ok=True)


def survey(root: Path, runs: Path | None) -> Iterator[Garbage]:
    """Find the remains in the cache `root`, of exports from it, and in the folder of runs."""
    names = [name for name in listing(root) if "/" not in name] if is_remote(root) else _files(root)
    for name in names:
        if name.startswith(f"{EXPORT}.") and left_behind(name):
            yield from _export(root / name)
    if not is_remote(root):
        yield from _temporary(root)
    if runs is None:
        return
    yield from _temporary(runs)
    for folder in sorted(path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()):
        if _is_hardly_begun(folder):
            size = removal.size(folder)
            yield Garbage(folder, "a run killed while it was begun", size, partial(_remove_begun, folder, size))
            continue
        yield from _temporary(folder)
        for inside in (folder / "eval", folder / SNAPSHOTS):
            if not inside.is_symlink():
                yield from _temporary(inside)


def _files(folder: Path) -> list[str]:
    """The files that lie in a folder of this machine itself, without links."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))


def _temporary(folder: Path) -> Iterator[Garbage]:
    """The temporary files in a folder whose writers are gone."""
    names = tuple(name for name in _files(folder) if not name.startswith(f"{EXPORT}.") and _is_left(folder / name))
    if names:
        size = sum(os.lstat(folder / name).st_size for name in names)
        yield Garbage(folder, "left by a process that is gone", size, partial(_unlink, folder, names, size), names)


def _is_left(path: Path) -> bool:
    gone = left_behind(path.name)
    if gone is not None:
        return gone
    return final_name(path.name) in {*OWN, LATEST} and time.time() - os.lstat(path).st_mtime > PATIENCE


def _unlink(folder: Path, names: tuple[str, ...], size: int) -> int:
    for name in names:
        (folder / name).unlink(missing_ok=True)
    return size


def _is_hardly_begun(folder: Path) -> bool:
    """Return True if a folder holds no more than what a run has before its first file."""
    if not (folder / LOCK).is_file() or (folder / CONFIG).exists() or held(folder):
        return False
    return not removal.strangers(folder, is_begun)


def _remove_begun(folder: Path, size: int) -> int:
    with Lock(folder) as lock:
        if (folder / CONFIG).exists():  # somebody has begun it since
            return 0
        removal.remove(folder, is_begun, lock)
    return size


def _export(note: Path) -> Iterator[Garbage]:
    """The half of an export that the note of a process that is gone tells of; or the note alone."""
    from sae.cache.exports.base import is_made  # which takes the seconds of torch

    half = Path(os.fsdecode((read(note, MOST_PATH) or b"").replace(b"\0", b"")))
    there = half.is_absolute() and bool(left_behind(half.name)) and half.is_dir() and not half.is_symlink()
    if there and removal.strangers(half, is_made):
        return  # somebody has put something into it
    size = removal.size(half) if there else 0

    def remove() -> int:
        if there:
            removal.delete(half, is_made)
        note.unlink(missing_ok=True)
        return size

    yield Garbage(half if there else note, "half of an export that was killed", size, remove)
