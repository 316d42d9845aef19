"""Writes that are either whole or absent after a crash, and the checksum that tells.

On this machine a file is written under a temporary name, flushed to the disk, renamed, and its folder flushed: after a
power cut the name leads to all of the new bytes or to none of them. A log is only ever appended to, one flushed line at
a time. On a remote filesystem a file is one request that replaces the whole object (for S3 atomic and, once answered,
durable); there are no folders, and a log is written anew with one line more.

Links are read through, since a folder of links to files is a common way to hand out a store; they are never written
through. What is not a regular file (a pipe, a device) is neither read nor written, nor waited for.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import google_crc32c

from sae.cache.disk.paths import failures, fetched, filesystem, filesystem_path, is_remote, reason
from sae.cache.disk.processes import PARTIAL, temporary
from sae.cache.errors import DamagedStore, SaeError

__all__ = [
    "PARTIAL", "append_line", "checksum", "expect_file", "expect_no_link", "explained", "flush_folder", "make_folder",
    "move", "opened", "opened_to_change", "read", "unreadable", "whole_lines_end", "write_atomic", "write_in",
]  # fmt: skip


def checksum(data: bytes | bytearray | memoryview) -> str:
    """crc32c of the bytes as eight hex digits."""
    if isinstance(data, bytes):
        return f"{google_crc32c.value(data):08x}"
    import numpy as np

    # as the library takes it without a copy, which takes longer than the sum
    return f"{google_crc32c.extend(0, np.frombuffer(data, np.uint8)):08x}"


def read(path: Path, most: int | None = None) -> bytes | None:
    """All bytes of a file, or None where there is none. Raises SaeError where it cannot be read.

    most: bytes that are asked for; one more is read where there are more, so that a caller notices.
    """
    try:
        if is_remote(path):
            return fetched(path, None if most is None else most + 1)
        with open(opened(path), "rb") as file:
            return file.read(-1 if most is None else most + 1)
    except FileNotFoundError:
        return None
    except failures() as error:
        raise unreadable(error, path) from error


def opened(path: Path) -> int:
    """Open a file of this machine to read. Raises OSError, and DamagedStore for what is not a regular file."""
    return _regular(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), path)


def opened_to_change(path: Path) -> int:
    """A descriptor of a file of this machine, to read and write, made where it is not there; never through a link.

    Raises OSError (ELOOP for a link), and DamagedStore for what is not a regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return _regular(os.open(path, flags, 0o644), path)


def expect_file(path: Path) -> None:
    """Raise DamagedStore for what is not a regular file, before a reader opens it by its name; nothing there passes."""
    with suppress(OSError):  # said by whoever reads it
        os.close(opened(path))


def expect_no_link(folder: Path, name: str = "") -> None:
    """Raise SaeError where `folder` of this machine, or a folder on the way from it to the file `name`, is a link."""
    if is_remote(folder):
        return
    way = folder
    for part in ("", *name.split("/")[:-1]):
        way = way / part
        if way.is_symlink():
            raise SaeError(f"{way}: is a link, and nothing is written through links; put what it leads to in its place")


def flush_file(path: Path) -> None:
    """Make what was written to a file, and the file itself, survive a power cut."""
    try:
        _flush(path)
        flush_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error


def flush_folder(folder: Path) -> None:
    """Make renames and creations inside a folder survive a power cut."""
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
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


def expect_writable(path: Path) -> None:
    """Raise SaeError unless a file can be put at `path`: asked before the work whose result goes there.

    A file is made and removed again where the folder is, or in the nearest folder above that is there.
    """
    if is_remote(path):
        return
    if path.is_dir():
        raise SaeError(f"{path}: is a folder, and a file is to go there; choose another name")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    probe = folder / f".sae.{os.getpid()}{PARTIAL}"
    try:
        with open(probe, "xb") as file:
            file.write(b"\n")
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise explained(error, folder / path.name) from error


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data`, whole or not at all.

    Raises SaeError when the disk is full or the folder cannot be written.
    """
    if is_remote(path):
        _put(path, data)
        return
    partial = path.with_name(temporary(path.name))
    try:
        make_folder(path.parent)
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # there may be none, or no folder it could be in
            partial.unlink()
        raise explained(error, path) from error


def write_in(folder: Path, name: str, data: bytes | memoryview) -> Path:
    """`write_atomic` for the file `name` of a store or a run, through no link; where it is."""
    expect_no_link(folder, name)
    write_atomic(folder / name, data)
    return folder / name


def move(path: Path, to: Path) -> None:
    """Rename a file of this machine within its folder, replacing what was there, so that it survives a power cut."""
    try:
        os.replace(path, to)
        flush_folder(to.parent)
    except OSError as error:
        raise explained(error, to) from error


def append_line(path: Path, line: str, *, flush: bool = True) -> None:
    """Add one line to a log, with `flush` so that it survives a crash. A torn last line of an earlier one is cut off.

    A log that has a second name (a backup made of hard links) is written anew: the other name keeps what it has.
    """
    if is_remote(path):
        before = read(path) or b""
        _put(path, before[: whole_lines_end(before)] + line.encode() + b"\n")
        return
    try:
        new = not path.exists()
        with open(opened_to_change(path), "rb+") as file:
            status = os.fstat(file.fileno())
            end = status.st_size
            if status.st_nlink > 1 or (end and os.pread(file.fileno(), 1, end - 1) != b"\n"):
                before = file.read()
                end = whole_lines_end(before)
                if status.st_nlink > 1:
                    write_atomic(path, before[:end] + line.encode() + b"\n")
                    return
                file.truncate(end)
            file.seek(end)
            file.write(line.encode() + b"\n")
            file.flush()
            if flush:
                os.fsync(file.fileno())
        if new and flush:
            flush_folder(path.parent)
    except OSError as error:
        raise explained(error, path) from error


def _regular(handle: int, path: Path) -> int:
    """The same descriptor. Raises DamagedStore where it is of no regular file."""
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise DamagedStore(f"{path}: is not a regular file, so not what was written; remove it and repeat the command")


def _put(path: Path, data: bytes | memoryview) -> None:
    try:
        filesystem(path).pipe_file(filesystem_path(path), bytes(data))
    except failures() as error:
        raise explained(error, path) from error


def whole_lines_end(data: bytes) -> int:
    """Return the end of the last complete line."""
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
    if code == errno.ELOOP:
        return SaeError(f"{path}: is a link, and nothing is written through links; remove it and repeat the command")
    if is_remote(path):
        return SaeError(f"{path}: cannot be written ({reason(error)}); what was committed is safe, repeat the command")
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return SaeError(f"{path.parent}: cannot write here ({reason(error)}); choose another folder")
    return SaeError(f"{path}: {reason(error)}")


def unreadable(error: Exception, path: Path) -> SaeError:
    """The one-line version of a failed read."""
    return SaeError(f"{path}: cannot be read ({reason(error)})")
