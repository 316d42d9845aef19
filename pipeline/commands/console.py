"""Everything a person sees in a terminal: bars and notes on stderr, tables and JSON on stdout."""

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from sae.cache.printable import printable
from sae.pipeline.metrics.figures import evaluation_table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

TITLE = 24  # letters of a bar's title
REST_OF_BAR = 38  # columns of everything in a bar but its title, amount, unit and the values beside it
BYTES = "bytes"  # the unit that is said as kB, MB, GB
GAP = "  "  # between the columns of a plain table
LEAST_PROSE = 24  # columns that folded text gets at least
QUIET_SECONDS = 15.0  # between two progress lines where there is no terminal to draw a bar on


class Told(ProgressColumn):
    """A column that says what `Bars` knows, whenever rich draws it."""

    def __init__(self, says: Callable[[], str], style: str = "") -> None:
        super().__init__()
        self._says, self._style = says, style

    def render(self, task: Task) -> Text:
        return Text(self._says(), style=self._style)


class Bars:
    """A `pipeline.runtime.progress.Progress` on stderr: a live bar on a terminal, a line now and then elsewhere.

    Rate and time left are those since the task began, so that steps of any length have them. Values beside the bar are
    the last ones told. `worked` tells whether anything was counted at all, in this task or an earlier one.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title, self._unit = "", ""
        self._total: int | None = None
        self._done = self._begun_at = 0
        self._begun = self._counted = self._said = 0.0
        self._beside: dict[str, str] = {}
        self.worked = False

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self._title, self._unit, self._total = printable(title), unit, total
        self._done = self._begun_at = done
        self._begun = self._counted = self._said = time.monotonic()
        self._beside = {}
        if not err.is_terminal:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(12),
            TextColumn("{task.fields[amount]}", markup=False),
            Told(lambda: f"{self._rate()}/s" if self._new else ""),
            Told(self._clock, "progress.remaining"),
            TextColumn("{task.fields[extra]}", style="dim", markup=False),
            console=err,
            transient=True,
        )
        name = self._title if len(self._title) <= TITLE else f"{self._title[: TITLE - 1]}…"
        self._task = self._bar.add_task(name, total=total, completed=done, unit=unit, amount="", extra="")
        self._bar.start()

    def advance(self, n: int, **fields: float | int | str) -> None:
        self._done += n
        self._counted = time.monotonic()
        self.worked = self.worked or n > 0
        self._beside |= {name: printable(f"{name} {short(value)}") for name, value in fields.items()}
        extra = list(self._beside.values())
        if self._bar is not None and self._task is not None:
            figure = size if self._unit == BYTES else short
            amount = figure(self._done) + (f"/{figure(self._total)}" if self._total else "")
            taken = len(self._bar.tasks[0].description) + len(amount) + len(self._unit) + REST_OF_BAR
            self._bar.update(self._task, advance=n, amount=amount, extra=_fitting(extra, err.width - taken))
        elif self._counted - self._said > QUIET_SECONDS:
            self._said = self._counted
            left = [] if self._left is None else [f"{self._left:,.0f} s left"]
            shown = ["  ".join(extra)] if extra else []
            self.note(f"{self._title}: {', '.join([self._amount(), f'{self._rate()}/s', *left, *shown])}")

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        if not self._new:
            return  # nothing to do, or an error before the first step, which says enough by itself
        self._counted = time.monotonic()
        took = self._counted - self._begun
        self.note(f"{self._title}: {self._amount()} in {took:,.1f} s ({self._rate()}/s)")

    def note(self, line: str) -> None:
        err.print(Text(printable(line)), soft_wrap=True)

    @property
    def _new(self) -> int:
        return self._done - self._begun_at

    def _amount(self) -> str:
        unfinished = self._total and self._done < self._total
        if self._unit == BYTES:
            return size(self._done) + (f" of {size(self._total)}" if self._total and unfinished else "")
        return f"{self._done:,}" + (f" of {self._total:,}" if unfinished else "") + f" {self._unit}"

    def _rate(self) -> str:
        """Units a second, from the beginning of the task to the last time something was counted."""
        return quantity(self._new / max(self._counted - self._begun, 1e-9), self._unit)

    @property
    def _left(self) -> float | None:
        """Seconds to the end; None where the end is not known, or nothing yet that would tell."""
        if not self._total or not self._new:
            return None
        left = (self._counted - self._begun) / self._new * (self._total - self._done)
        return max(0.0, left - (time.monotonic() - self._counted))

    def _clock(self) -> str:
        """The time left as h:mm:ss."""
        if self._left is None:
            return "-:--:--"
        minutes, seconds = divmod(round(self._left), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _fitting(parts: list[str], room: int) -> str:
    """As many of the parts as there is room for: rich would shorten every column alike, the time left included."""
    line = ""
    for part in parts:
        if len(line) + len(part) + 2 > room:
            break
        line += f"{part}  "
    return line


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


def quantity(n: float, unit: str) -> str:
    """An amount with its unit: 1.2M rows, 34.5 MB."""
    return size(n) if unit == BYTES else f"{short(n)} {unit}"


def ago(seconds: float) -> str:
    """A length of time in the largest unit that leaves at least one: 45 s, 3 h, 12 d."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, prose: bool = False) -> None:
    """Print a table on stdout, no wider than the terminal (80 columns where there is none).

    A column of numbers is right-aligned. Names are never cut or folded, so that they can be copied: where the columns
    do not fit side by side, the rows are numbered, and the columns follow in as many blocks as it takes. With `prose`
    the last column is folded between its words instead.
    """
    columns = [printable(column) for column in columns]
    cells = [[printable(_said(cell)) for cell in row] for row in rows]
    numbers = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    grid = Table(
        title=Text(printable(title)), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column, right in zip(columns, numbers, strict=True):
        grid.add_column(Text(column), justify="right" if right else "left", no_wrap=True)
    for row in cells:
        grid.add_row(*map(Text, row))
    fits = out.measure(grid, options=out.options.update(width=100_000)).maximum <= out.width
    if out.is_terminal and fits:
        out.print(grid)
        return
    say(title)
    lines = [list(columns), *cells]
    if prose:
        lines = list(_folded(lines, out.width))
    if prose or _width(lines) <= out.width:  # a word of prose that is wider than the terminal stays whole
        _plain(lines, numbers)
        return
    index = [["#", *map(str, range(1, len(rows) + 1))]]
    named = [[number, line[0]] for number, line in zip(index[0], lines, strict=True)]
    _plain(named, [True, numbers[0]])
    for block in _blocks(lines, out.width - _width(list(zip(*index, strict=True))) - len(GAP)):
        picked = [[number, *(line[i] for i in block)] for number, line in zip(index[0], lines, strict=True)]
        _plain(picked, [True, *(numbers[i] for i in block)])


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that aligned lines take."""
    return sum(max(map(len, column)) + len(GAP) for column in zip(*lines, strict=True)) - len(GAP)


def _plain(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """Print lines of cells aligned under each other, to the right where told."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        say(GAP.join(padded).rstrip())


def _folded(lines: Sequence[Sequence[str]], width: int) -> Iterator[list[str]]:
    """The lines with their last cell folded to what the others leave of `width`, in further lines where it takes so."""
    room = width - _width([[*line[:-1], ""] for line in lines])
    for *first, last in lines:
        parts = textwrap.wrap(last, max(room, LEAST_PROSE), break_long_words=False, break_on_hyphens=False) or [""]
        yield [*first, parts[0]]
        yield from ([*("" for _ in first), part] for part in parts[1:])


def _blocks(lines: Sequence[Sequence[str]], width: int) -> Iterator[list[int]]:
    """The columns but for the first, as many at a time as fit side by side."""
    block: list[int] = []
    for i in range(1, len(lines[0])):
        if block and _width([[line[j] for j in (*block, i)] for line in lines]) > width:
            yield block
            block = []
        block.append(i)
    if block:
        yield block


def _said(cell: Any) -> str:
    """A cell as text."""
    if isinstance(cell, list | tuple | dict):
        return json.dumps(cell)
    return cell if isinstance(cell, str) else short(cell)


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def size(n: float) -> str:
    """Bytes in the largest unit that leaves at least one."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def as_json(result: Any) -> None:
    """One JSON value on stdout and nothing else. What is not a finite number has no JSON: it becomes null."""
    sys.stdout.write(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()  # a reader that has gone is noticed here, not when Python ends


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(line: str) -> None:
    """One line of result on stdout."""
    out.print(Text(printable(line)), soft_wrap=True)


def agreed(question: str) -> bool:
    """Whether the answer on stdin is yes. Asked on stderr; no answer is a no."""
    err.print(Text(f"{printable(question)} [y/N] "), end="", soft_wrap=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # nobody ended the line
        err.print()
    return answer.strip().lower() in ("y", "yes")


def complain(line: str) -> None:
    """The one line an error is."""
    text = printable(" ".join(f"sae: error: {line}".splitlines()))
    err.print(Text(text, style="bold red" if err.is_terminal else ""), soft_wrap=True)


def outline(value: dict[str, Any], indent: str = "") -> None:
    """Print nested settings on stdout, a line each, what is inside indented under its name."""
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            say(f"{indent}{name}:")
            outline(inner, indent + "  ")
        else:
            parts = inner if isinstance(inner, list) else [inner]
            say(f"{indent}{name}: " + ", ".join(p if isinstance(p, str) else json.dumps(p) for p in parts))


def evaluation(result: dict[str, Any], title: str) -> None:
    """The figures of an evaluation, each with what it means; beside them those over the rows that training kept."""
    kept = result.get("kept")
    sides = [result] if kept is None else [result, kept]
    rows = [
        [figure.key, *(short(side[figure.key]) if figure.key in side else "" for side in sides), figure.meaning]
        for figure in evaluation_table()
        if figure.key in result
    ]
    columns = ["figure", *["value", "kept"][: len(sides)], "what it is"]
    table(title, columns, rows, prose=True)
    if kept is not None:
        say(f"kept: over rows of a norm up to {short(kept['largest_norm'])}, above which training left them out")
