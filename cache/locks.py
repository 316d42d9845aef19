"""One writer a store: a lock file held by a living process.

The lock is the kernel's (flock), so it dies with its holder whatever kills it; the file's text says who holds it.
On network file systems without flock, writers must not meet: use one harvester a store there.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from cache.durable import explained
from cache.errors import Busy

LOCK = "lock"


class Lock:
    """Exclusive use of a folder for writing, as a context manager.

    Raises Busy when a living process holds it and `wait` is False. `stale` holds a notice when the file was left by a
    process that died.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self.path = folder / LOCK
        self.wait = wait
        self.stale: str | None = None
        self._handle: int | None = None

    def __enter__(self) -> "Lock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise explained(error, self.path) from error
        try:
            while not _taken(handle):
                if not self.wait:
                    raise Busy(f"{self.path.parent}: {_holder(handle)} is writing here; wait for it or end it")
                time.sleep(0.2)
        except BaseException:
            os.close(handle)
            raise
        left = os.pread(handle, 4096, 0)
        self.stale = f"{self.path.parent}: took over the lock that {_holder(handle)} left behind" if left else None
        me = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, me, 0)
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        os.close(self._handle)
        self._handle = None


def held(folder: Path) -> bool:
    """Whether a living process is writing in a folder right now."""
    path = folder / LOCK
    if not path.exists():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(handle: int) -> str:
    text = os.pread(handle, 4096, 0)
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
