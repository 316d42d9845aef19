"""Writes that are either whole or absent after a crash, and the checksum that tells.

A file is written under a temporary name, flushed to the disk, renamed, and its folder flushed: after a power cut
the name leads to all of the new bytes or to none of them. A log is only ever appended to, one flushed line at a time.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

import google_crc32c

from cache.errors import SaeError

PARTIAL = ".partial"


def checksum(data: bytes | bytearray | memoryview) -> str:
    """crc32c of the bytes as eight hex digits."""
    return f"{google_crc32c.value(bytes(data)):08x}"


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


def append_line(path: Path, line: str) -> None:
    """Add one line to a log so that it survives a crash. A torn last line of an earlier crash is cut off first."""
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


def whole_lines_end(data: bytes) -> int:
    """Where the last complete line ends."""
    return data.rfind(b"\n") + 1


def explained(error: OSError, path: Path) -> SaeError:
    """The one-line version of a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SaeError(f"{path.parent}: no space left on the disk; what was committed is safe, free some and repeat")
    if error.errno == errno.EFBIG:
        return SaeError(
            f"{path}: files may not grow that large here, see `ulimit -f`; what was committed is safe: {error.strerror}"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return SaeError(f"{path.parent}: cannot write here ({error.strerror}); choose another folder")
    return SaeError(f"{path}: {error.strerror or error}")


def unreadable(error: OSError, path: Path) -> SaeError:
    """The one-line version of a failed read."""
    return SaeError(f"{path}: cannot be read ({error.strerror or error})")
