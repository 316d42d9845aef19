"""Charts as SVG text, to stand inside an HTML page whose style sheet gives the colours (classes `s0` ... `s5`, `bar`).

Coordinates are in the units of the viewBox, about a CSS pixel. The same numbers give the same bytes. What a page's
script may want to show on hovering is in `data-hover`: [x, text] pairs.
"""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from sae.pipeline.report.escaping import escape

MOST_POINTS = 240  # a line has no more: longer ones show the mean of each stretch in a band from its least to its most
LARGEST = 1e30  # a value beyond it is drawn there; the inverse of it is drawn as zero
LOG_RATIO = 6.0  # a chart of positive values is logarithmic from this ratio of largest to smallest on
LEFT, TOP, RIGHT, BOTTOM = 54.0, 12.0, 14.0, 30.0


class Series(NamedTuple):
    """One line: its name and its finite points (x, y), x ascending."""

    name: str
    points: list[tuple[float, float]]


class Scale(NamedTuple):
    """Values [low, high] onto pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, v = (math.log(n) for n in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.stop - self.start) * (v - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Round values inside the range, about `most` of them."""
        if not self.log:
            return _round_steps(self.low, self.high, most)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(found) <= most:
                break
        else:
            found = found[:: -(-len(found) // most)]
        return found if len(found) > 1 else _round_steps(self.low, self.high, most)


def _round_steps(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float, digits: int = 4) -> str:
    """A number as a person writes it: 12,345 or 0.0123 or 1.2M or 3e-7."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e9:.{digits}g}G" if size >= 1e9 else f"{value / 1e6:.{digits}g}M"
    if size >= 10 ** (digits - 1) or (value == int(value) and size >= 1):
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    return f"{value:.{digits}g}" if size >= 1e-4 else f"{value:.{min(digits, 2)}g}".replace("e-0", "e-")


def steady(value: float) -> str:
    """A number with three digits always, so that a column of them reads as one."""
    return f"{value:#.3g}".removesuffix(".") if 1e-3 <= abs(value) < 999.5 else number(value, 3)


def percent(share: float) -> str:
    """A share as a percentage with three digits."""
    return f"{steady(100 * share)} %"


def framed(title: str, drawn: str, size: str = "", keys: str = "") -> str:
    """A chart as a figure of the page: `size` is "wide", "full" or nothing, `keys` the HTML of its legend."""
    hover = "<output></output>" if "data-hover" in drawn else ""
    caption = f"<figcaption><b>{escape(title)}</b>{keys}{hover}</figcaption>"
    return f'<figure class="chart {size}">{caption}{drawn}</figure>'


def line_chart(
    series: Sequence[Series], *, label: str, x_label: str, ratios: bool = False, width: int = 540, height: int = 240
) -> str:
    """Lines over a shared x axis. With `ratios`, logarithmic where the values are positive and span a wide range."""
    series = [Series(s.name, [(_drawn(x), _drawn(y)) for x, y in s.points]) for s in series]
    thinned = [Series(s.name, _thin(s.points)) for s in series]
    values = [y for s in series for _, y in s.points]
    positive = [y for y in values if y > 0]
    # zeros (a term that was off at first) are gaps on a logarithmic axis, so there may be only few
    log = ratios and min(values) >= 0 and len(positive) > 0.5 * len(values)
    log = log and max(positive) / min(positive) > LOG_RATIO
    xs = [x for s in series for x, _ in s.points]
    x = Scale(min(xs), _above(min(xs), max(xs)), LEFT, width - RIGHT, False)
    y = _y_scale(positive if log else values, height, log)
    body = _axes(x, y, x_label, width, height)
    for i, s in enumerate(series):
        body += _band(s.points, x, y, i)
        body += _path(thinned[i].points, x, y, i)
    hover = _hover(thinned, x, x_label)
    scale = ", logarithmic scale" if log else ""
    first_last = "; ".join(f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    return _svg(body, f"{label}{scale}: {first_last}", width, height, hover)


def histogram(
    bins: Sequence[tuple[float, float, int]], *, label: str, apart: tuple[str, int] | None = None,
    width: int = 760, height: int = 240,
) -> str:  # fmt: skip
    """Bars over a logarithmic x axis: (low, high, count), positive edges. `apart` is one more bar left of the axis."""
    most = max([count for *_, count in bins] + [apart[1] if apart else 0, 1])
    y = Scale(0, most * 1.06, height - BOTTOM, TOP, False)
    gap = 90.0 if apart else 0.0
    left = min(low for low, _, _ in bins) if bins else 1e-4
    x = Scale(left, max([high for _, high, _ in bins] + [left * 10]), LEFT + gap, width - RIGHT, True)
    body = _grid(y, width)
    for low, high, count in bins:
        body += _bar(
            x(low) + 0.5, x(high) - 0.5, y, count, "bar", f"{count:,} between {number(low)} and {number(high)}"
        )
    for power in range(math.ceil(math.log10(x.low) - 1e-9), math.floor(math.log10(x.high) + 1e-9) + 1):
        body += _text(x(10.0**power), height - 10, f"10{superscript(power)}" if power else "1", "middle")
    if apart:
        name, count = apart
        body += _bar(LEFT + 14, LEFT + gap - 34, y, count, "bar apart", f"{count:,} {name}")
        body += _text(LEFT + gap / 2 - 10, height - 10, name, "middle")
    return _svg(body, label, width, height)


def sparkline(counts: Sequence[int], label: str, width: int = 168, height: int = 34) -> str:
    """Bars without axes."""
    most = max([*counts, 1])
    step = width / max(len(counts), 1)
    y = Scale(0, most, height, 0, False)
    bars = "".join(_bar(i * step + 0.5, (i + 1) * step - 0.5, y, n, "bar", "") for i, n in enumerate(counts))
    return _svg(bars, label, width, height)


def ladder(
    rungs: Sequence[tuple[str, float, str]], *, label: str, reference: tuple[str, float] | None = None, width: int = 640
) -> str:
    """Horizontal bars from 0: (name, value, remark), and a dashed line at a reference value."""
    rungs = [(name, _drawn(value), remark) for name, value, remark in rungs]
    high = _above(0.0, max([value for _, value, _ in rungs] + ([reference[1]] if reference else [])) * 1.02)
    x = Scale(0, high, 112, width - 130, False)
    height = 34 * len(rungs) + (26 if reference else 4)
    body = ""
    if reference:
        name, value = reference
        body += _line(x(value), 0, x(value), height - 18, "reference")
        body += _text(x(value), height - 4, f"{name} {value:.3f}", "middle")
    for i, (name, value, remark) in enumerate(rungs):
        top = 34 * i + 4
        body += _text(104, top + 18, name, "end", "name")
        body += f'<rect class="bar rung{i}" x="112" y="{top}" width="{_n(x(value) - 112)}" height="26" rx="2"></rect>'
        body += _text(x(value) + 8, top + 18, f"{value:.3f}", "start", "value")
        body += _text(x(value) + 18 + 8 * len(f"{value:.3f}"), top + 18, remark, "start")
    described = ", ".join(f"{name} {value:.3f}" for name, value, _ in rungs)
    return _svg(body, f"{label}: {described}", width, height, kind="ladder")


def superscript(power: int) -> str:
    """An exponent in raised digits."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _y_scale(values: Sequence[float], height: float, log: bool) -> Scale:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if log:
        return Scale(low / 1.1, high * 1.1, height - BOTTOM, TOP, True)
    low = min(low, 0.0)  # counts and shares are read against zero
    return Scale(low, high + 0.06 * (high - low) if high > low else _above(low, low), height - BOTTOM, TOP, False)


def _drawn(value: float) -> float:
    """A value where a chart has a place for it: of a size that one can reckon with, or zero."""
    return 0.0 if abs(value) < 1 / LARGEST else min(max(value, -LARGEST), LARGEST)


def _above(low: float, high: float) -> float:
    """The end of an axis from `low` to `high`, where it has a length."""
    return max(high, low + max(1.0, 1e-3 * abs(low)))


def _stretches(points: Sequence[tuple[float, float]]) -> list[Sequence[tuple[float, float]]]:
    size = -(-len(points) // MOST_POINTS)
    return [points[i : i + size] for i in range(0, len(points), size)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean of each stretch of points, at its last x; the points themselves where they are few."""
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in _stretches(points)]


def _band(points: list[tuple[float, float]], x: Scale, y: Scale, index: int) -> str:
    if len(points) <= MOST_POINTS:
        return ""
    parts = [(part[-1][0], [v for _, v in part if v > 0 or not y.log]) for part in _stretches(points)]
    parts = [(at, inside) for at, inside in parts if inside]
    upper = [f"{_n(x(at))},{_n(y(max(inside)))}" for at, inside in parts]
    lower = [f"{_n(x(at))},{_n(y(min(inside)))}" for at, inside in reversed(parts)]
    return f'<polygon class="spread s{index}" points="{" ".join(upper + lower)}"></polygon>'


def _path(points: list[tuple[float, float]], x: Scale, y: Scale, index: int) -> str:
    """One polyline per run of values that have a place on the axis, a dot where a run is a single point."""
    runs: list[list[str]] = [[]]
    for at, value in points:
        if value <= 0 and y.log:
            runs.append([])
        else:
            runs[-1].append(f"{_n(x(at))},{_n(y(value))}")
    body = ""
    for run in filter(None, runs):
        if len(run) == 1:
            cx, cy = run[0].split(",")
            body += f'<circle class="dot s{index}" cx="{cx}" cy="{cy}" r="2.5"></circle>'
        else:
            body += f'<polyline class="line s{index}" points="{" ".join(run)}"></polyline>'
    return body


def _hover(series: Sequence[Series], x: Scale, x_label: str) -> str:
    """[[pixel, text], ...] as JSON."""
    told: dict[float, list[str]] = {}
    for s in series:
        for at, value in s.points:
            told.setdefault(at, []).append(f"{s.name} {number(value)}")
    return json.dumps([[round(x(at), 1), " · ".join([f"{x_label} {at:,.0f}", *told[at]])] for at in sorted(told)])


def _axes(x: Scale, y: Scale, x_label: str, width: float, height: float) -> str:
    ticks = x.ticks(5)
    marks = "".join(_text(x(t), height - 10, number(t), "middle") for t in ticks if x(t) < width - 60)
    return _grid(y, width) + marks + _text(width - RIGHT, height - 10, x_label, "end", "unit")


def _grid(y: Scale, width: float) -> str:
    lines = "".join(_line(LEFT, y(t), width - RIGHT, y(t), "grid") for t in y.ticks(5))
    return lines + "".join(_text(LEFT - 8, y(t) + 4, number(t), "end") for t in y.ticks(5))


def _bar(left: float, right: float, y: Scale, count: int, kind: str, title: str) -> str:
    if not count:
        return ""
    top = min(y(count), y(0) - 1)
    told = f"<title>{escape(title)}</title>" if title else ""
    box = f'x="{_n(left)}" y="{_n(top)}" width="{_n(right - left)}" height="{_n(y(0) - top)}"'
    return f'<rect class="{kind}" {box}>{told}</rect>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"></line>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(body: str, label: str, width: float, height: float, hover: str | None = None, kind: str = "") -> str:
    data = f' data-hover="{escape(hover)}"' if hover else ""
    data += f' class="{kind}"' if kind else ""
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"{data}>{body}</svg>'


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
