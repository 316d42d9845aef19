"""One writer a store: a lock file held by a living process.

On this machine the lock is the kernel's (flock), so it dies with its holder whatever kills it; the file's text says who
holds it. On network file systems without flock, writers must not meet: use one harvester a store there.

On a remote filesystem the lock is an object that only one process can create (for S3 a conditional PUT) and that its
holder deletes. It does not die with its holder: one left by a dead process of this machine is taken over, about one of
another machine only a person can know. Without exclusive creation the lock is advisory only.

Who reads a store of this machine for long holds its folder, shared (`reading`), and who removes it wants it alone.
Remotely nobody knows of readers.
"""

import fcntl
import hashlib
import json
import os
import secrets
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from sae.cache.disk.durable import (
    expect_no_link,
    explained,
    make_folder,
    opened,
    opened_to_change,
    read,
    unreadable,
    write_atomic,
)
from sae.cache.disk.paths import failures, filesystem, filesystem_path, is_remote
from sae.cache.disk.processes import is_gone, space
from sae.cache.errors import Busy, SaeError

LOCK = "lock"
LONGEST = 4096  # bytes of what a lock says, at most
BEGINS = b'{"pid": '  # every lock of ours
TRIES = 3  # `held` takes the lock for an instant; a writer keeps it


class Lock:
    """Exclusive use of a folder for writing, as a context manager.

    Raises Busy when a living process holds it and `wait` is False. `stale` holds a notice when it was left by a
    process that died.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.path = folder / LOCK
        self.wait = wait
        self.stale: str | None = None
        self._backend: _LockBackend = _ObjectBackend(self.path) if is_remote(folder) else _FileBackend(self.path)

    def __enter__(self) -> "Lock":
        tries = 0
        try:
            while not self._backend.acquire():
                tries += 1
                if tries >= TRIES and not self.wait:
                    raise Busy(self._backend.busy())
                time.sleep(self._backend.pause)
        except failures() as error:
            raise explained(error, self.path) from error
        left = self._backend.stale_owner
        self.stale = f"{self.path.parent}: took over the lock that {_name(left)} left behind" if left else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._backend.release()

    def confirm(self) -> None:
        """Raise Busy where the lock is not ours any more: somebody deleted it, and another process may be writing."""
        if not self._backend.is_held():
            raise Busy(
                f"{self.path.parent}: its lock was taken away while this process was writing; repeat the command"
            )

    def erase(self) -> None:
        """Remove the lock, and its folder where nothing else is in it: somebody may have begun anew."""
        if self._backend.is_held():
            self.path.unlink()
            with suppress(OSError):
                self.path.parent.rmdir()


class _LockBackend(ABC):
    """A way to hold a lock. `stale_owner` is what a dead holder wrote into it, empty where it had been released."""

    pause: ClassVar[float]  # seconds between tries

    def __init__(self, path: Path) -> None:
        self.path, self.stale_owner = path, b""

    @abstractmethod
    def acquire(self) -> bool:
        """Try once."""

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def is_held(self) -> bool:
        """Return True if it is still ours."""

    def busy(self) -> str:
        return f"{self.path.parent}: {_name(read(self.path))} is writing here; wait for it or end it"


class _FileBackend(_LockBackend):
    """The kernel's lock on an open file."""

    pause = 0.1
    _handle: int | None = None

    def acquire(self) -> bool:
        make_folder(self.path.parent)
        expect_no_link(self.path.parent)
        handle = opened_to_change(self.path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_at_path(handle):
                self.stale_owner = self._own_text(handle)
                if os.fstat(handle).st_nlink == 1:
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _me(), 0)
                    self._handle = handle
                    return True
                self.path.unlink()  # its other name (in a backup of hard links) keeps what it has
        except BlockingIOError:  # somebody else has it
            os.close(handle)
            return False
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed before we had it, by us or with its folder
        return self.acquire()

    def release(self) -> None:
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None

    def is_held(self) -> bool:
        return self._handle is not None and self._is_at_path(self._handle)

    def _is_at_path(self, handle: int) -> bool:
        """Return True if it is our file that lies at the path, and not another that was put there."""
        try:
            return os.path.samestat(os.fstat(handle), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _own_text(self, handle: int) -> bytes:
        """Return the file's text. Raises SaeError where no lock of ours would hold it: it is somebody's, and is
        kept.
        """
        text = os.pread(handle, LONGEST + 1, 0)
        if len(text) > LONGEST or not (text.startswith(BEGINS) or not text.strip(b"\0")):
            raise SaeError(f"{self.path}: is not a lock, but lies where the lock has to be; move it away and repeat")
        return text.strip(b"\0")  # zeros: its power was cut


class _ObjectBackend(_LockBackend):
    """An object that only one process can create."""

    pause = 0.5
    _mine = b""

    def acquire(self) -> bool:
        self._mine = _me()
        try:
            filesystem(self.path).pipe_file(filesystem_path(self.path), self._mine, mode="create")
        except FileExistsError:
            there = read(self.path)
            # ours already where the answer to a first request was lost and it was sent again
            return there == self._mine or (there is not None and _is_dead(there) and self._taken_over(there))
        return True

    def _taken_over(self, dead: bytes) -> bool:
        """Put our name in the place of a dead process of this machine. Whoever could do so is here, too: take turns."""
        turn = Path(tempfile.gettempdir()) / f"sae-lock-{hashlib.sha256(str(self.path).encode()).hexdigest()[:16]}"
        with Lock(turn, wait=True) as turns:
            unchanged = read(self.path) == dead
            if unchanged:
                write_atomic(self.path, self._mine)
                self.stale_owner = dead
            turns.erase()
        return unchanged

    def release(self) -> None:
        if self.is_held():
            self.path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        return read(self.path) == self._mine

    def busy(self) -> str:
        there = read(self.path)
        who = f"{self.path.parent}: {_name(there)} is writing here{_since(there)}"
        return f"{who}; wait for it, or if that process is gone delete {self.path}"


def held(folder: Path) -> bool:
    """Return True if a living process is writing in a folder right now (remote: or may be, on another machine)."""
    path = folder / LOCK
    if is_remote(path):
        there = read(path)
        return there is not None and not _is_dead(there)
    try:
        handle = opened(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unreadable(error, path) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Hold a store's folder for reading, so that nobody removes it meanwhile. Raises Busy where one is doing so."""
    with _folder_held(folder, fcntl.LOCK_SH, "is being removed; make it again, or name another store"):
        yield


@contextmanager
def unread(folder: Path) -> Iterator[None]:
    """Hold a store's folder alone, to remove it. Raises Busy while another process reads it."""
    with _folder_held(folder, fcntl.LOCK_EX, "another process is reading it; wait for it or end it"):
        yield


@contextmanager
def _folder_held(folder: Path, how: int, busy: str) -> Iterator[None]:
    if is_remote(folder):
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(error, folder) from error
    try:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{folder}: {busy}") from error
        except OSError:  # a network file system that locks no folders: there, readers are not known either
            pass
        yield
    finally:
        os.close(handle)


def _me() -> bytes:
    """Return the text by which this process holds a lock; no two are alike."""
    since, one = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), secrets.token_hex(8)
    who = {"pid": os.getpid(), "host": socket.gethostname(), "space": space(), "since": since, "id": one}
    return json.dumps(who).encode()


def _parsed(text: bytes | None) -> dict[str, object]:
    try:
        who = json.loads(text or b"")
    except ValueError:
        return {}
    return who if isinstance(who, dict) else {}


def _name(text: bytes | None) -> str:
    who = _parsed(text)
    return f"process {who['pid']} on {who['host']}" if {"pid", "host"} <= who.keys() else "another process"


def _since(text: bytes | None) -> str:
    return f" since {since}" if (since := _parsed(text).get("since")) else ""


def _is_dead(text: bytes) -> bool:
    """Return True if the process of a lock was one of this machine and is gone."""
    who = _parsed(text)
    pid = who.get("pid")
    if (who.get("host"), who.get("space")) != (socket.gethostname(), space()) or not isinstance(pid, int) or pid < 1:
        return False
    return is_gone(pid)
