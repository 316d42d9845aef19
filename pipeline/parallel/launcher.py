"""Processes of this machine that train together: start them, pass on Ctrl-C, and see to it that all end when one does.

Each child has a pipe to its parent. The parent writes to the pipe to request a stop; if the pipe closes, the parent has
died and the child exits. An exception of a child comes back through the pipe and is raised in the parent, which shows
all errors: children print nothing but rank 0's progress. They ignore Ctrl-C, which reaches every process of a terminal.

They meet at a file in a temporary folder and talk over the loopback device, so no name of the network is asked for.
Given up: the seconds each needs to import torch.
"""

import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sae.cache.errors import SaeError
from sae.pipeline.parallel.torch_distributed import LostRank, ProcessInfo, assign_devices, together
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.interrupts import Interrupted, interruptible, interrupts_withheld

PAUSE = 0.2  # seconds between two looks at whether Ctrl-C came
GRACE = 5.0  # seconds for a child to go by itself, and for the reason why another was lost
DONE = "done"


class Child:
    """One of the processes. `failure` is what it raised, once it has ended so; `ended` whether it has."""

    def __init__(
        self, seat: ProcessInfo, share: tuple[int, bool], work: Callable[..., None], args: Sequence[Any]
    ) -> None:
        spawning = get_context("spawn")
        self.seat = seat
        self.link, theirs = spawning.Pipe()
        self.process: BaseProcess = spawning.Process(target=_child, args=(seat, share, theirs, work, args), daemon=True)
        self.process.start()
        theirs.close()
        self.ended = False
        self.failure: BaseException | None = None

    def stop(self) -> None:
        """Ask it to stop after the step in progress."""
        with suppress(OSError):  # it has ended
            self.link.send("stop")

    def listen(self) -> None:
        """Take what it has to say, which is its last word."""
        self.ended = True
        try:
            said = self.link.recv()
            if said != DONE:
                self.failure = self._raised(said)
        except (EOFError, OSError):
            self.process.join()
            self.failure = SaeError(
                f"process {self.seat.rank + 1} of {self.seat.world} (pid {self.process.pid}) {self._how()}; "
                "continue from the last checkpoint with `resume`"
            )

    def _raised(self, text: str) -> BaseException:
        """Return the error that it raised, as it was raised where it can be built again."""
        try:
            error = self.link.recv()
        except Exception as lost:  # noqa: BLE001 - whatever building it raises, the text is there
            error = RuntimeError(f"process {self.seat.rank + 1} of {self.seat.world} failed ({lost!r})")
        assert isinstance(error, BaseException)
        error.add_note(text)
        return error

    def _how(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended without a word (exit code {code})"
        return f"was killed by {signal.Signals(-code).name}{' (out of memory?)' if -code == signal.SIGKILL else ''}"

    def end(self) -> None:
        """Give it the time to go by itself where it has said its last word; else, and after that, kill it."""
        self.process.join(GRACE if self.ended else 0)
        self.process.kill()
        self.process.join()
        self.link.close()


def launch(processes: int, device: str, work: Callable[..., None], *args: Any) -> None:
    """Run work(ranks, device, *args) in so many processes of this machine; `work` and `args` go there by pickle.

    Raises what one of them raised, Interrupted where they stopped because they were told to, SaeError where one was
    killed or there are too few devices. None is left over, whatever happens.
    """
    seated, share = assign_devices(processes, device), devices.threads_of_each(processes)
    children: list[Child] = []
    with tempfile.TemporaryDirectory(prefix="sae-") as folder, interruptible() as stopping:
        try:
            with interrupts_withheld():
                for rank, its in enumerate(seated):
                    children.append(Child(ProcessInfo(rank, processes, its, Path(folder)), share, work, args))
            _watch(children, stopping)
        finally:
            for child in children:
                child.end()


def _watch(children: Sequence[Child], stopping: Sequence[int]) -> None:
    """Until all have ended. Raises what ended them, as soon as one has failed."""
    asked, deadline = False, float("inf")
    while waiting := [child for child in children if not child.ended]:
        ready = connection.wait([child.link for child in waiting], PAUSE)
        for child in waiting:
            if child.link in ready:
                child.listen()
        failures = [child.failure for child in children if child.failure is not None]
        causes = [failure for failure in failures if not isinstance(failure, LostRank | Interrupted)]
        if causes:
            raise causes[0]
        if any(isinstance(failure, LostRank) for failure in failures):
            deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            break
        if stopping and not asked:
            asked = True
            for child in children:
                child.stop()
    for failure in failures:
        raise Interrupted(stopping[0], failure.safe) if isinstance(failure, Interrupted) and stopping else failure


def _child(
    seat: ProcessInfo,
    share: tuple[int, bool],
    link: connection.Connection,
    work: Callable[..., None],
    args: Sequence[Any],
) -> None:
    """Do a child's part: take its seat, work, and say how it went."""
    stop = threading.Event()
    threading.Thread(target=_obey, args=(link, stop), daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    devices.take_share(share)
    try:
        with together(seat, stop) as ranks:
            work(ranks, seat.device, *args)
    except BaseException as error:  # noqa: BLE001 - it is raised again by the parent
        link.send(traceback.format_exc())
        try:
            link.send(error)
        except Exception:  # noqa: BLE001 - of no kind that can be sent: its text was
            link.send(RuntimeError(str(error)))
    else:
        link.send(DONE)


def _obey(link: connection.Connection, stop: threading.Event) -> None:
    """A thread of a child: hear what the parent asks for, and end with it."""
    while True:
        try:
            link.recv()
        except (EOFError, OSError):
            os._exit(1)
        stop.set()


def _loopback() -> str:
    """The name of the loopback device: lo, or lo0."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
