"""Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) end what is under way in order, and say what is safe.

The command line lets each raise Interrupted at once (`interrupts_raised`). Work that is worth ending in order notes the
first one and goes on until it can end (`interruptible`); a second one acts as it would have outside. Signals that are
ignored (of a process in the background, or under nohup) stay so.
"""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT = "repeat the command"
SHELL = 128  # to which a shell adds the number of the signal that ended a command


class Interrupted(KeyboardInterrupt):
    """Signal `number` ended the command. `safe` says what is kept, where the work can tell; `remedy` what goes on."""

    def __init__(self, number: int, safe: str = "", remedy: str = REPEAT) -> None:
        super().__init__(number, safe, remedy)
        self.number, self.safe, self.remedy = signal.Signals(number), safe, remedy

    def __str__(self) -> str:
        which = "" if self.number == signal.SIGINT else f" ({self.number.name})"
        return "; ".join(filter(None, [f"interrupted{which}", self.safe, self.remedy]))

    @property
    def exit_code(self) -> int:
        """As a shell counts it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return SHELL + self.number


@contextmanager
def interrupts_raised() -> Iterator[list[int]]:
    """Let each of the signals raise Interrupted at once, wherever the main thread is. A list of those that have."""
    raised: list[int] = []

    def end(number: int, frame: object) -> None:
        _let_go_of_lost_terminal()
        raised.append(number)
        raise Interrupted(number)

    with _handled(end):
        yield raised


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that fills when a signal arrives, so that the step in progress can end first.

    After the first, whichever it is, all of them act as they would have outside. Outside the main thread all do always.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        _let_go_of_lost_terminal()
        received.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    with _handled(note) as before:
        yield received


@contextmanager
def telling(safe: Callable[[], str]) -> Iterator[None]:
    """Let an Interrupted that leaves what is inside say what is safe, unless something further inside has."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.number, stop.safe or safe(), stop.remedy) from None


@contextmanager
def remedied(remedy: str) -> Iterator[None]:
    """Let an Interrupted that leaves what is inside name what continues it."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(stop.number, stop.safe, remedy) from None


@contextmanager
def interrupts_withheld() -> Iterator[None]:
    """Keep Ctrl-C and SIGHUP from processes begun meanwhile: they reach all of a terminal, but only one is to answer.

    One that arrives here meanwhile is answered afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[dict[signal.Signals, Any]]:
    """Answer the signals by `handler`, but for ignored ones; what answered each before."""
    before: dict[signal.Signals, Any] = {}
    try:
        for wanted in SIGNALS:
            if signal.getsignal(wanted) is not signal.SIG_IGN:
                before[wanted] = signal.signal(wanted, handler)
    except ValueError:  # not the main thread: nobody sends us signals
        before.clear()
    try:
        yield before
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def _let_go_of_lost_terminal() -> None:
    """Let what is written to a terminal that is gone vanish: every write would be an error."""
    for output in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(output).st_mode) and not os.isatty(output):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, output)
                os.close(nowhere)
        except OSError:  # it was closed from the start
            continue
