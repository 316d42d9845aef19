"""Everything a person sees in a terminal: bars and notes on stderr, tables and JSON on stdout."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

QUIET_SECONDS = 15.0  # between two progress lines where there is no terminal to draw a bar on


class RateColumn(ProgressColumn):
    """Units per second since the task began."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{short(speed)} {task.fields['unit']}/s")


class Bars:
    """A `pipeline.progress.Progress` on stderr: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title, self._unit = "", ""
        self._total: int | None = None
        self._done = self._begun_at = 0
        self._begun = self._said = 0.0

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self._title, self._unit, self._total = title, unit, total
        self._done = self._begun_at = done
        self._begun = self._said = time.monotonic()
        if not err.is_terminal:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[extra]}"),
            console=err,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, unit=unit, amount="", extra="")
        self._bar.start()

    def advance(self, n: int, **fields: float | int | str) -> None:
        self._done += n
        extra = "  ".join(f"{name} {short(value)}" for name, value in fields.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n, amount=self._amount(), extra=extra)
        elif time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            err.print(
                f"{self._title}: {self._amount()} {self._unit}, {self._rate()}, {self._left()}{extra}", soft_wrap=True
            )

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        took = time.monotonic() - self._begun
        err.print(f"{self._title}: {self._amount()} {self._unit} in {took:,.1f} s ({self._rate()})", soft_wrap=True)

    def note(self, line: str) -> None:
        err.print(Text(line), soft_wrap=True)

    def _amount(self) -> str:
        return f"{self._done:,}" + (f" of {self._total:,}" if self._total and self._done < self._total else "")

    def _rate(self) -> str:
        return f"{short((self._done - self._begun_at) / max(time.monotonic() - self._begun, 1e-9))} {self._unit}/s"

    def _left(self) -> str:
        new = self._done - self._begun_at
        if not self._total or not new:
            return ""
        return f"{(time.monotonic() - self._begun) / new * (self._total - self._done):,.0f} s left, "


def short(value: float | int | str | None) -> str:
    """A number as a person would write it: 12,345 or 0.0123 or 1.2M."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.2f}G" if size >= 1e9 else f"{value / 1e6:.2f}M"
    if isinstance(value, int) or size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout; every column after the first is right-aligned when its cells are numbers."""
    grid = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        grid.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, str) else short(cell) for cell in row))
    out.print(grid)


def size(n: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def as_json(result: Any) -> None:
    """One JSON object on stdout and nothing else."""
    sys.stdout.write(json.dumps(result, indent=2, allow_nan=False) + "\n")


def say(line: str) -> None:
    """One line of result on stdout."""
    out.print(Text(line), soft_wrap=True)


def complain(line: str) -> None:
    """The one line an error is."""
    err.print(Text(f"sae: error: {line}", style="bold red" if err.is_terminal else ""), soft_wrap=True)


def compact(value: Any) -> str:
    """A value of a description in one cell: nested ones as indented text."""
    if isinstance(value, dict):
        return "\n".join(f"{name}: {compact(inner)}".replace("\n", "\n  ") for name, inner in value.items())
    return ", ".join(map(compact, value)) if isinstance(value, list) else str(value)


MEANING = {
    "fvu": "share of variance left unexplained, against the data set's mean",
    "explained_variance": "1 - FVU",
    "l0": "latents that fire in a row",
    "dead_fraction": "latents that fired in no row looked at",
    "ce_clean": "cross-entropy of the model as it is, nats a token",
    "ce_spliced": "with the reconstruction in place",
    "ce_zero": "with zeros in place",
    "ce_mean": "with the training mean in place",
    "ce_recovered_zero": "share of what zeros cost that the reconstruction recovers",
    "ce_recovered_mean": "the same against the mean",
    "kl": "KL(clean || spliced), nats a token",
    "rows": "held-out rows judged",
    "tokens": "held-out predictions judged",
}


def evaluation(result: dict[str, Any], title: str) -> None:
    """The figures of an evaluation, each with what it means."""
    table(title, ["figure", "value", "what it is"], [[name, short(result[name]), help] for name, help in MEANING.items()])
