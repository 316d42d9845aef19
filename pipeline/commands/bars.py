"""Progress of a command, on stderr: a live bar on a terminal, a line now and then elsewhere.

Where values come with the progress (loss, FVU, L0 of a training), their courses are drawn below the bar, a line each.
"""

import math
import time
from collections.abc import Callable, Iterable

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from sae.cache.printable import printable
from sae.pipeline.commands import console
from sae.pipeline.commands.console import BYTES, note, quantity, short, size
from sae.pipeline.runtime.sparks import sparkline, thinned

TITLE = 24  # letters of a bar's title
REST_OF_BAR = 38  # columns of everything in a bar but its title, amount, unit and the values beside it
COURSE, LEAST_COURSE = 60, 8  # letters of a course of values, and those below which none is drawn
KEPT = 1024  # values of a course that are kept
REDRAWN = 4  # times a second: each costs a few milliseconds of the work that it tells of
QUIET_SECONDS = 15.0  # between two progress lines where there is no terminal to draw a bar on


class Told(ProgressColumn):
    """A column that says what `Bars` knows, whenever rich draws it."""

    def __init__(self, says: Callable[[], str], style: str = "") -> None:
        super().__init__()
        self._says, self._style = says, style

    def render(self, task: Task) -> Text:
        return Text(self._says(), style=self._style)


class Course:
    """A value over time: evenly spaced samples of all that were told, and the last one."""

    def __init__(self) -> None:
        self.last: float = 0.0
        self._samples: list[float] = []
        self._every, self._told = 1, 0

    def tell(self, value: float) -> None:
        self.last = value
        if self._told % self._every == 0:
            self._samples.append(value)
            if len(self._samples) == KEPT:
                self._samples, self._every = self._samples[::2], 2 * self._every
        self._told += 1

    def drawn(self, width: int, *, plain: bool) -> str:
        """The course in at most `width` letters. plain: in ASCII."""
        return sparkline(thinned([*self._samples, self.last], width), plain=plain)


class Live(Progress):
    """A bar, with lines below it."""

    below: Callable[[], str] = staticmethod(lambda: "")

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if text := self.below():
            yield Text(text, style="dim", no_wrap=True)


class Bars:
    """A `pipeline.runtime.progress.Progress` on stderr: a live bar on a terminal, a line now and then elsewhere.

    Rate and time left are those since the task began, so that steps of any length have them. Values beside the bar are
    the last ones told. `worked` tells whether anything was counted at all, in this task or an earlier one.
    """

    def __init__(self) -> None:
        self._bar: Live | None = None
        self._task: TaskID | None = None
        self._title, self._unit = "", ""
        self._total: int | None = None
        self._done = self._begun_at = 0
        self._begun = self._counted = self._said = 0.0
        self._beside: dict[str, str] = {}
        self._courses: dict[str, Course] = {}
        self.worked = False

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self._title, self._unit, self._total = printable(title), unit, total
        self._done = self._begun_at = done
        self._begun = self._counted = self._said = time.monotonic()
        self._beside, self._courses = {}, {}
        if not console.err.is_terminal:
            return
        self._bar = Live(
            SpinnerColumn("line" if console.err.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(12),
            TextColumn("{task.fields[amount]}", markup=False),
            Told(lambda: f"{self._rate()}/s" if self._new else ""),
            Told(self._clock, "progress.remaining"),
            TextColumn("{task.fields[extra]}", style="dim", markup=False),
            console=console.err,
            transient=True,
            refresh_per_second=REDRAWN,
        )
        name = self._title if len(self._title) <= TITLE else f"{self._title[: TITLE - 1]}…"
        self._task = self._bar.add_task(name, total=total, completed=done, unit=unit, amount="", extra="")
        self._bar.below = self._drawn
        self._bar.start()

    def advance(self, n: int, **fields: float | int | str) -> None:
        self._done += n
        self._counted = time.monotonic()
        self.worked = self.worked or n > 0
        self._beside |= {name: printable(f"{name} {short(value)}") for name, value in fields.items()}
        if self._bar is not None and self._task is not None:
            for name, value in fields.items():
                if isinstance(value, float) and math.isfinite(value):
                    self._courses.setdefault(name, Course()).tell(value)
            extra = [text for name, text in self._beside.items() if name not in self._courses or not self._room]
            figure = size if self._unit == BYTES else short
            amount = figure(self._done) + (f"/{figure(self._total)}" if self._total else "")
            taken = len(self._bar.tasks[0].description) + len(amount) + len(self._unit) + REST_OF_BAR
            self._bar.update(self._task, advance=n, amount=amount, extra=_fitting(extra, console.err.width - taken))
        elif self._counted - self._said > QUIET_SECONDS:
            self._said = self._counted
            left = [] if self._left is None else [f"{self._left:,.0f} s left"]
            shown = ["  ".join(self._beside.values())] if self._beside else []
            self.note(f"{self._title}: {', '.join([self._amount(), f'{self._rate()}/s', *left, *shown])}")

    @property
    def _room(self) -> int:
        """Letters that a course may take below the bar; 0 where the terminal is too narrow for any."""
        columns = [(len(printable(name)), len(short(one.last))) for name, one in self._courses.items()]
        room = console.err.width - sum(max(column) for column in zip(*columns, strict=True)) - 5
        return min(COURSE, room) if room >= LEAST_COURSE else 0

    def _drawn(self) -> str:
        """A line for each value: its name, what it is now, and its course."""
        if not self._courses or not (room := self._room):
            return ""
        told = [(printable(name), short(one.last), one) for name, one in self._courses.items()]
        name_width, value_width = max(len(name) for name, _, _ in told), max(len(value) for _, value, _ in told)
        plain = console.err.options.ascii_only
        return "\n".join(
            f"  {name:<{name_width}} {value:>{value_width}} {one.drawn(room, plain=plain)}" for name, value, one in told
        )

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
        note(line)

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
