"""One writer a store: a lock file held by a living process.

The lock is the kernel's (flock), so it dies with its holder whatever kills it; the file's text says who holds it.
On network file systems without flock, writers must not meet: use one harvester a store there.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cache.durable import explained, make_folder, unreadable
from cache.errors import Busy

LOCK = "lock"
TRIES = 3  # `held` takes the lock for an instant; a writer keeps it
PAUSE = 0.1  # seconds between tries


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
            while (handle := self._acquired()) is None:
                pass
        except OSError as error:
            raise explained(error, self.path) from error
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

    def erase(self) -> None:
        """Remove the folder whose lock this is, the lock last: nobody begins in it before all else is gone."""
        for path in self.path.parent.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.path:
                path.unlink()
        self.path.unlink()
        with suppress(OSError):  # somebody has begun anew in it
            self.path.parent.rmdir()

    def _acquired(self) -> int | None:
        """The lock file, open and locked; None where it was removed, with its folder, while we waited for it."""
        make_folder(self.path.parent)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        tries = 0
        try:
            while not _taken(handle):
                tries += 1
                if tries == TRIES and not self.wait:
                    raise Busy(f"{self.path.parent}: {_holder(handle)} is writing here; wait for it or end it")
                time.sleep(PAUSE)
            if self.path.exists() and os.path.samestat(os.fstat(handle), os.stat(self.path)):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None


def held(folder: Path) -> bool:
    """Whether a living process is writing in a folder right now."""
    path = folder / LOCK
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
