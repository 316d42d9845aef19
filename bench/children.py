"""WindowJob in a forked child that can be killed at a chosen instant, and what it said until then."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable

Say = Callable[[bytes], object]


class Child:
    """A function in a process of its own, which says through a pipe how far it has come.

    The function is given `say`; what it has said outlives it. A fork copies no threads, so there must be none.
    """

    def __init__(self, run: Callable[[Say], object]) -> None:
        self._reading, writing = os.pipe()
        assert threading.active_count() == 1
        self._said = b""
        self.pid = os.fork()
        if self.pid == 0:
            self._run(run, writing)
        os.close(writing)
        os.set_blocking(self._reading, False)

    @staticmethod
    def _run(run: Callable[[Say], object], writing: int) -> None:
        code = 1
        try:
            run(lambda word: os.write(writing, word))
            code = 0
        finally:
            os._exit(code)  # nothing of the parent's is to be closed twice

    def said(self) -> bytes:
        """All it has said so far."""
        while True:
            try:
                more = os.read(self._reading, 1 << 16)
            except BlockingIOError:
                return self._said
            if not more:
                return self._said
            self._said += more

    def killed_after(self, seconds: float, begin: Callable[[bytes], bool] = lambda said: True) -> bool:
        """Kill it so many seconds after what it said satisfies `begin`; False where it was done by then.

        Raises RuntimeError where it failed.
        """
        end: float | None = None
        while end is None or time.monotonic() < end:
            if self._ended(os.WNOHANG):
                return False
            if end is None and begin(self.said()):
                end = time.monotonic() + seconds
            if end is None:
                select.select([self._reading], [], [], 0.001)  # until it says something
            else:
                time.sleep(min(0.001, max(0.0, end - time.monotonic())))
        os.kill(self.pid, signal.SIGKILL)
        return not self._ended(0)

    def close(self) -> None:
        """Give the pipe back, once it has ended."""
        os.close(self._reading)

    def _ended(self, options: int) -> bool:
        pid, status = os.waitpid(self.pid, options)
        if pid and os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError("the child failed; its traceback is above")
        return pid != 0 and os.WIFEXITED(status)
