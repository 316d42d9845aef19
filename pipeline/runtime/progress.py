"""Progress: a stage tells the world where it is, without knowing who listens. Library code never prints."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

PATIENCE = 1.0  # seconds that something may take without a word


@runtime_checkable
class Progress(Protocol):
    """One long task at a time: start, advance until done, finish. Notes may come at any moment."""

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        """Begin a task of `total` units, `done` of them already there (a resumed run); None when unknown."""

    def advance(self, n: int, **fields: float | int | str) -> None:
        """Count `n` more units; `fields` are current values worth seeing beside the bar."""

    def finish(self) -> None:
        """The task is over."""

    def note(self, line: str) -> None:
        """One line the user should see."""


class Silent:
    """A `Progress` nobody watches."""

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None: ...

    def advance(self, n: int, **fields: float | int | str) -> None: ...

    def finish(self) -> None: ...

    def note(self, line: str) -> None: ...


@contextmanager
def said_if_slow(progress: Progress, what: str) -> Iterator[None]:
    """Say what is being done, once, where it takes longer than a second: what has no steps to count."""
    timer = threading.Timer(PATIENCE, progress.note, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
