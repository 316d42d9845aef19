"""Writes that are either whole or absent after a crash, and the checksum that tells.

On this machine a file is written under a temporary name, flushed to the disk, renamed, and its folder flushed: after a
power cut the name leads to all of the new bytes or to none of them. A log is only ever appended to, one flushed line at
a time. On a remote filesystem a file is one request that replaces the whole object (for S3 atomic and, once answered,
durable); there are no folders, and a log is written anew with one line more.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import cast

import google_crc32c

from cache.errors import SaeError
from cache.places import failures, filesystem, filesystem_path, is_remote, reason

PARTIAL = ".partial"


def checksum(data: bytes | bytearray | memoryview) -> str:
    """crc32c of the bytes as eight hex digits."""
    return f"{google_crc32c.value(bytes(data)):08x}"


def read(path: Path, most: int | None = None) -> bytes | None:
    """All bytes of a file, or None where there is none. Raises SaeError where it cannot be read.

    most: bytes that are asked for; one more is read where there are more, so that a caller notices.
    """
    try:
        # remote: one request; `read_bytes` makes two, between which the object may be replaced
        if is_remote(path):
            return cast(bytes, filesystem(path).cat_file(filesystem_path(path)))
        with open(path, "rb") as file:
            return file.read(-1 if most is None else most + 1)
    except FileNotFoundError:
        return None
    except failures() as error:
        raise unreadable(error, path) from error


def flush_folder(folder: Path) -> None:
    """Make renames and creations inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder, and the ones it is in, so that each survives a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data`, whole or not at all.

    Raises SaeError when the disk is full or the folder cannot be written.
    """
    if is_remote(path):
        _put(path, data)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        make_folder(path.parent)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # there may be none, or no folder it could be in
            partial.unlink()
        raise explained(error, path) from error


def move(path: Path, to: Path) -> None:
    """Rename a file of this machine within its folder, replacing what was there, so that it survives a power cut."""
    try:
        os.replace(path, to)
        flush_folder(to.parent)
    except OSError as error:
        raise explained(error, to) from error


def append_line(path: Path, line: str) -> None:
    """Add one line to a log so that it survives a crash. A torn last line of an earlier crash is cut off first."""
    if is_remote(path):
        before = read(path) or b""
        _put(path, before[: whole_lines_end(before)] + line.encode() + b"\n")
        return
    try:
        new = not path.exists()
        with open(path, "ab+") as file:
            file.seek(0)
            file.truncate(whole_lines_end(file.read()))
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error


def _put(path: Path, data: bytes | memoryview) -> None:
    try:
        filesystem(path).pipe_file(filesystem_path(path), bytes(data))
    except failures() as error:
        raise explained(error, path) from error


def whole_lines_end(data: bytes) -> int:
    """Where the last complete line ends."""
    return data.rfind(b"\n") + 1


def explained(error: Exception, path: Path) -> SaeError:
    """The one-line version of a failed write."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return SaeError(f"{path.parent}: no space left on the disk; what was committed is safe, free some and repeat")
    if code == errno.EFBIG:
        return SaeError(
            f"{path}: files may not grow that large here, see `ulimit -f`; what was committed is safe: {reason(error)}"
        )
    if is_remote(path):
        return SaeError(f"{path}: cannot be written ({reason(error)}); what was committed is safe, repeat the command")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return SaeError(f"{path.parent}: cannot write here ({reason(error)}); choose another folder")
    return SaeError(f"{path}: {reason(error)}")


def unreadable(error: Exception, path: Path) -> SaeError:
    """The one-line version of a failed read."""
    return SaeError(f"{path}: cannot be read ({reason(error)})")
