"""The terminal: tables and JSON on stdout, notes and errors on stderr; `bars` has the bars."""

import io
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sae.cache.printable import printable
from sae.pipeline.commands.voice import typed
from sae.pipeline.metrics.figures import evaluation_table, largest_norms

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

BYTES = "bytes"  # the unit that is said as kB, MB, GB
GAP = "  "  # between the columns of a plain table
LEAST_PROSE = 24  # columns that folded text gets at least


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


def spell_what_has_no_letter() -> None:
    """Write what the terminal's encoding has no letter for as \\u2019, where it would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """One line of result on stdout."""
    out.print(Text(printable(line)), soft_wrap=True)


def note(line: str) -> None:
    """One line beside the result, on stderr."""
    err.print(Text(printable(typed(line))), soft_wrap=True)


def agreed(question: str) -> bool:
    """Return True if the answer on stdin is yes. Asked on stderr; no answer is a no."""
    err.print(Text(f"{printable(question)} [y/N] "), end="", soft_wrap=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # nobody ended the line
        err.print()
    return answer.strip().lower() in ("y", "yes")


def complain(line: str) -> None:
    """Format an error as one line."""
    text = printable(" ".join(f"sae: error: {typed(line)}".splitlines()))
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


def figures(title: str, values: Mapping[str, float | int | None], meanings: Mapping[str, str]) -> None:
    """Figures, each with what it means; those that are not defined are left out."""
    rows = [[key, short(value), meanings.get(key, "")] for key, value in values.items() if value is not None]
    table(title, ["figure", "value", "what it is"], rows, prose=True)


def evaluation(result: dict[str, Any], title: str) -> None:
    """The figures of an evaluation, each with what it means; beside them those without rows that lie far out."""
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
        say(f"kept: over rows of a norm up to {' and '.join(map(short, largest_norms(kept)))}; the others lie far out")
