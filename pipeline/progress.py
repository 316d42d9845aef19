"""How a stage tells the world where it is, without knowing who listens. Library code never prints."""

from typing import Protocol


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
