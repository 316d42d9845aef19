"""One writer a store: a lock file held by a living process.

On this machine the lock is the kernel's (flock), so it dies with its holder whatever kills it; the file's text says who
holds it. On network file systems without flock, writers must not meet: use one harvester a store there.

On a remote filesystem the lock is an object that only one process can create (for S3 a conditional PUT) and that its
holder deletes. It does not die with its holder: one left by a dead process of this machine is taken over, about one of
another machine only a person can know. Filesystems without exclusive creation give no more than good manners.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from cache.durable import explained, make_folder, read, unreadable, write_atomic
from cache.errors import Busy
from cache.places import failures, filesystem, filesystem_path, is_remote, listing

LOCK = "lock"
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
        self._grip: _Grip = _ObjectGrip(self.path) if is_remote(folder) else _FileGrip(self.path)

    def __enter__(self) -> "Lock":
        tries = 0
        try:
            while not self._grip.take():
                tries += 1
                if tries >= TRIES and not self.wait:
                    raise Busy(self._grip.busy())
                time.sleep(self._grip.pause)
        except failures() as error:
            raise explained(error, self.path) from error
        left = self._grip.left
        self.stale = f"{self.path.parent}: took over the lock that {_name(left)} left behind" if left else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grip.release()

    def confirm(self) -> None:
        """Raise Busy where the lock is not ours any more: somebody deleted it, and another process may be writing."""
        if not self._grip.kept():
            raise Busy(
                f"{self.path.parent}: its lock was taken away while this process was writing; repeat the command"
            )

    def erase(self) -> None:
        """Remove the folder whose lock this is, the lock last: nobody begins in it before all else is gone."""
        if is_remote(self.path):
            remote, folder = filesystem(self.path), filesystem_path(self.path.parent)
            if others := [f"{folder}/{name}" for name in listing(self.path.parent) if name != LOCK]:
                remote.rm(others)
            self._grip.release()
            return
        for path in self.path.parent.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.path:
                path.unlink()
        self.path.unlink()
        with suppress(OSError):  # somebody has begun anew in it
            self.path.parent.rmdir()


class _Grip(ABC):
    """How a lock is held. `left` is what a dead holder wrote into it, empty where it had been released."""

    pause: ClassVar[float]  # seconds between tries

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, b""

    @abstractmethod
    def take(self) -> bool:
        """Try once."""

    @abstractmethod
    def release(self) -> None: ...

    @abstractmethod
    def kept(self) -> bool:
        """Whether it is still ours."""

    def busy(self) -> str:
        return f"{self.path.parent}: {_name(read(self.path))} is writing here; wait for it or end it"


class _FileGrip(_Grip):
    """The kernel's lock on an open file."""

    pause = 0.1
    _handle: int | None = None

    def take(self) -> bool:
        make_folder(self.path.parent)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists() and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                self.left = os.pread(handle, 4096, 0)
                os.ftruncate(handle, 0)
                os.pwrite(handle, _me(), 0)
                self._handle = handle
                return True
        except BlockingIOError:  # somebody else has it
            os.close(handle)
            return False
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was removed, with its folder, before we had it
        return self.take()

    def release(self) -> None:
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None

    def kept(self) -> bool:
        return self._handle is not None


class _ObjectGrip(_Grip):
    """An object that only one process can create."""

    pause = 0.5
    _mine = b""

    def take(self) -> bool:
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
                self.left = dead
            turns.erase()
        return unchanged

    def release(self) -> None:
        if self.kept():
            self.path.unlink(missing_ok=True)

    def kept(self) -> bool:
        return read(self.path) == self._mine

    def busy(self) -> str:
        there = read(self.path)
        who = f"{self.path.parent}: {_name(there)} is writing here{_since(there)}"
        return f"{who}; wait for it, or if that process is gone delete {self.path}"


def held(folder: Path) -> bool:
    """Whether a living process is writing in a folder right now (remote: or may be, on another machine)."""
    path = folder / LOCK
    if is_remote(path):
        there = read(path)
        return there is not None and not _is_dead(there)
    try:
        handle = os.open(path, os.O_RDONLY)
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


def _me() -> bytes:
    """What this process writes into a lock; no two are alike."""
    since, one = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), secrets.token_hex(8)
    who = {"pid": os.getpid(), "host": socket.gethostname(), "space": _space(), "since": since, "id": one}
    return json.dumps(who).encode()


def _space() -> str:
    """The name space our process numbers are of: containers may share a host's name, but not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


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
    """Whether the process of a lock was one of this machine and is gone."""
    who = _parsed(text)
    pid = who.get("pid")
    if (who.get("host"), who.get("space")) != (socket.gethostname(), _space()) or not isinstance(pid, int) or pid < 1:
        return False
    try:
        with suppress(PermissionError):  # another user's, alive
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
