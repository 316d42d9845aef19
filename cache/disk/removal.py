"""Removing a folder of ours: whole, by one step that cannot be half done, and nothing in it that is not ours.

On this machine the folder is renamed to `.removed-<name>-<8 hex digits>` beside it: from then on nobody sees it. What
is under such a name is deleted at leisure, and by the next command (`finish`) where this process is killed before it
has. A remote filesystem has no rename: there an object of such a name says that the folder is none any more, and is
deleted last.

What is ours is told by names, relative to the folder. Links are unlinked and never followed. A folder with anything
else in it is refused and left as it is.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from sae.cache.disk.durable import explained, flush_folder, unreadable, write_atomic
from sae.cache.disk.locks import LOCK, Lock, held, unread
from sae.cache.disk.paths import failures, filesystem, filesystem_path, is_remote, listing
from sae.cache.errors import SaeError

Ours = Callable[[str], bool]
TRASH = re.compile(r"\.removed-(.+)-[0-9a-f]{8}")


def remove(folder: Path, ours: Ours, lock: Lock) -> None:
    """Remove a folder whose `lock` this process holds; the lock goes with it.

    Raises SaeError, naming it, where the folder holds what is not ours; Busy where it is another one by now or a
    process reads it; then it is as it was.
    """
    lock.confirm()
    trash = folder.with_name(f".removed-{folder.name}-{secrets.token_hex(4)}")
    try:
        if is_remote(folder):
            _expect_ours(folder, ours)
            write_atomic(trash, b"what this names is removed")
            _finish_remote(folder, trash)
            return
        with unread(folder):
            _expect_ours(folder, ours)
            os.rename(folder, trash)
            if strangers(trash, ours):  # it came just now
                os.rename(trash, folder)
                _expect_ours(folder, ours)
            flush_folder(folder.parent)
        delete(trash, ours)
    except failures() as error:
        raise explained(error, folder) from error


def left(parent: Path, ours: Ours) -> list[Path]:
    """Return the folders that removals cut short have left under another name (remotely, objects)."""
    found = [path for path in sorted(parent.glob(".removed-*")) if TRASH.fullmatch(path.name)]
    return [
        path for path in found
        if is_remote(path) or (path.is_dir() and not path.is_symlink() and _is_whole_ours(path, ours))
    ]  # fmt: skip


def finish(parent: Path, ours: Ours) -> list[str]:
    """Complete the removals in a folder that were cut short, and name what they were of.

    One that cannot be completed now is left to the next command.
    """
    done = []
    for trash in left(parent, ours):
        with suppress(SaeError, *failures()):  # no right to, or a living process is at it
            if is_remote(trash):
                folder = named(trash)
                if not held(folder):
                    with Lock(folder):
                        _finish_remote(folder, trash)
            else:
                delete(trash, ours)
            done.append(named(trash).name)
    return done


def named(trash: Path) -> Path:
    """The folder that a removal cut short was of."""
    found = TRASH.fullmatch(trash.name)
    assert found is not None, trash
    return trash.with_name(found[1])


def removed(parent: Path) -> set[str]:
    """Names of folders that are there no more, though some of their files may be (remotely; else none are)."""
    return {named(path).name for path in left(parent, lambda _: False)} if is_remote(parent) else set()


def strangers(folder: Path, ours: Ours) -> list[str]:
    """Return what lies below a folder and is not ours, by its name relative to it; links count as what they are
    called.
    """
    if is_remote(folder):
        return [name for name in listing(folder) if not ours(name)]
    entries = _entries(folder)
    return [name for name, is_link in entries if not (ours(name) or (is_link and _is_folder_of_ours(name, ours)))]


def size(folder: Path) -> int:
    """Bytes of the files below a folder; what links lead to does not count."""
    if is_remote(folder):
        return sum(listing(folder).values())
    return sum(os.lstat(folder / name).st_size for name, is_link in _entries(folder) if not is_link)


def _expect_ours(folder: Path, ours: Ours) -> None:
    if found := strangers(folder, ours):
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise SaeError(
            f"{folder}: holds {found[0]}{more}, of which this program knows nothing, so nothing was removed; move that "
            "away and repeat the command"
        )


def _is_whole_ours(folder: Path, ours: Ours) -> bool:
    """Return True if all that is below a folder can be read and is ours."""
    try:
        return not strangers(folder, ours)
    except SaeError:
        return False


def _is_folder_of_ours(name: str, ours: Ours) -> bool:
    """Return True if our files would lie below `name`."""
    return any(ours(f"{name}/{inner}") for inner in ("zarr.json", "0", "0/0"))


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Everything below a folder of this machine that is not a folder, and whether it is a link."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # another process is deleting it
            raise unreadable(error, folder) from error

    for base, folders, files in os.walk(folder, onerror=failed):
        for name in [*files, *folders]:
            path = Path(base, name)
            if path.is_symlink() or name in files:
                yield path.relative_to(folder).as_posix(), path.is_symlink()


def delete(trash: Path, ours: Ours) -> None:
    """Delete what is ours in a folder, the folders that this leaves empty, and the folder itself where it is."""
    with suppress(FileNotFoundError):  # another process is at it, too
        for base, folders, files, handle in os.fwalk(trash, topdown=False):
            inside = Path(base).relative_to(trash)
            for name in [*files, *folders]:
                path = (inside / name).as_posix()
                if name in files or Path(base, name).is_symlink():
                    if ours(path) or _is_folder_of_ours(path, ours):
                        os.unlink(name, dir_fd=handle)
                else:
                    _delete_empty(name, handle)
        _delete_empty(str(trash), None)


def _delete_empty(folder: str, handle: int | None) -> None:
    with suppress(OSError):  # something came into it that is not ours
        os.rmdir(folder, dir_fd=handle)


def _finish_remote(folder: Path, trash: Path) -> None:
    """Delete what an object says is removed, all but the lock, which this process holds; then the object."""
    inside = filesystem_path(folder).rstrip("/")
    if names := [name for name in listing(folder) if name != LOCK]:
        filesystem(folder).rm([f"{inside}/{name}" for name in names])
    trash.unlink()
