"""Charts as figures of the page: what is on each as JSON, which the page's script draws with uPlot.

The same numbers give the same bytes. A figure says in words, too, what it shows.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from sae.pipeline.report.escaping import escape
from sae.pipeline.report.numbers import number, superscript

MOST_POINTS = 800  # a line has no more: longer ones show the mean of each stretch
LARGEST = 1e30  # a value beyond it is drawn there; the inverse of it is drawn as zero
LOG_RATIO = 6.0  # a chart of positive values is logarithmic from this ratio of largest to smallest on

Point = tuple[float, float]


class Series(NamedTuple):
    """One line: its name and its finite points (x, y), x ascending."""

    name: str
    points: list[Point]


def line_chart(title: str, series: Sequence[Series], *, x_label: str, ratios: bool = False, size: str = "") -> str:
    """Lines over a shared x axis. With `ratios`, logarithmic where the values are positive and span a wide range.

    size: "wide", "full" or nothing. Empty without a point.
    """
    series = [Series(s.name, _thin([(_drawn(x), _drawn(y)) for x, y in s.points])) for s in series if s.points]
    if not series:
        return ""
    values = [y for s in series for _, y in s.points]
    positive = [y for y in values if y > 0]
    # zeros (a term that was off at first) are gaps on a logarithmic axis, so there may be only few
    log = ratios and min(values) >= 0 and len(positive) > 0.5 * len(values)
    log = log and max(positive) / min(positive) > LOG_RATIO
    xs = sorted({x for s in series for x, _ in s.points})
    lines = []
    for s in series:
        at = dict(s.points)
        lines.append({"name": s.name, "y": [None if log and not (at.get(x) or 0) > 0 else at.get(x) for x in xs]})
    ends = "; ".join(f"{s.name} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
    spec = {
        "kind": "lines", "x": xs, "x_label": x_label, "x_log": False, "y_log": bool(log), "series": lines,
    }  # fmt: skip
    described = f"{title}{', logarithmic scale' if log else ''}: {ends}"
    return figure(title, spec, described, size, [s.name for s in series] if len(series) > 1 else ())


def bars(
    title: str, names: Sequence[str], values: Sequence[float], *, size: str = "",
    ticks: Sequence[tuple[float, str]] = (), apart: int = 0, told: Sequence[str] = (),
    references: Sequence[tuple[str, float, str]] = (),
) -> str:  # fmt: skip
    """A bar for each value; `names` are what is told under the pointer, `ticks` (bar, text) what stands below.

    apart: so many of the first bars stand for something else. told: a text above each bar. references: dashed lines,
    (name, value, "x" or "y").
    """
    values = [_drawn(value) for value in values]
    x = [i - 0.8 if i < apart else i for i in range(len(values))]
    series = [{"name": "", "colour": "bar", "y": [None if i < apart else v for i, v in enumerate(values)]}]
    if apart:
        series.append({"name": "", "colour": "apart", "y": [v if i < apart else None for i, v in enumerate(values)]})
    spec = {
        "kind": "bars", "x": x, "names": list(names), "series": series,
        "ticks": [[at - 0.8 if at < apart else at, text] for at, text in ticks],
        "references": [list(one) for one in references],
    } | ({"values": list(told)} if told else {})  # fmt: skip
    described = f"{title}: " + ", ".join(f"{n} {number(v)}" for n, v in zip(names[:40], values, strict=False))
    return figure(title, spec, described, size)


def histogram(
    title: str, counts: Sequence[int], edges: Sequence[float], *, size: str = "", never: int | None = None,
    references: Sequence[tuple[str, float]] = (), log: bool = True,
) -> str:  # fmt: skip
    """Counts between edges [n + 1], on a logarithmic axis or a linear one; `never` is one more bar, left of it.

    references: (name, value on the axis).
    """
    first = 0 if never is None else 1
    names = [f"{number(a, 3)} to {number(b, 3)}" for a, b in pairwise(edges)]
    ticks = _ticks(edges, log)
    place = [(name, _place(value, edges, log) + first - 0.5, "x") for name, value in references]
    return bars(
        title, ["never", *names] if first else names, [never, *counts] if never is not None else counts, size=size,
        ticks=[(0, "never")] * first + [(_place(at, edges, log) + first - 0.5, text) for at, text in ticks],
        apart=first, references=place,
    )  # fmt: skip


def scatter(title: str, points: Sequence[tuple[str, str, float, float]], *, x_label: str, size: str = "wide") -> str:
    """A point for each (name, kind, x, y), a colour a kind; the x axis is logarithmic where that shows more."""
    points = sorted(points, key=lambda one: one[2])
    kinds = list(dict.fromkeys(kind for _, kind, _, _ in points))
    spec = {
        "kind": "scatter", "x": [_drawn(x) for _, _, x, _ in points], "names": [name for name, *_ in points],
        "x_label": x_label, "x_log": bool(points) and points[-1][2] >= LOG_RATIO * points[0][2] > 0,
        "y_log": False,
        "series": [{"name": kind, "y": [_drawn(y) if k == kind else None for _, k, _, y in points]} for kind in kinds],
        "height": 260,
    }  # fmt: skip
    described = f"{title}: " + "; ".join(f"{name} {number(x)}, {number(y)}" for name, _, x, y in points[:40])
    return figure(title, spec, described, size, kinds if len(kinds) > 1 else ())


def figure(title: str, spec: dict[str, Any], described: str, size: str = "", keys: Sequence[str] = ()) -> str:
    """A chart as a figure of the page; `keys` is its legend."""
    legend = "".join(f'<span class="key s{i % 6}">{escape(name)}</span>' for i, name in enumerate(keys))
    data = escape(json.dumps(spec, allow_nan=False, separators=(",", ":")))
    return framed(title, f'<div class="plot" role="img" aria-label="{escape(described)}"></div>', size, legend, data)


def framed(title: str, drawn: str, size: str = "", keys: str = "", data: str = "") -> str:
    """A picture as a figure of the page: `keys` is the HTML of its legend, `data` what a script draws it from."""
    caption = f"<figcaption><b>{escape(title)}</b>{keys}{'<output></output>' if data else ''}</figcaption>"
    attribute = f' data-chart="{data}"' if data else ""
    return f'<figure class="chart {size}"{attribute}>{caption}{drawn}</figure>'


def _ticks(edges: Sequence[float], log: bool) -> list[tuple[float, str]]:
    if not log:
        step = max(1, (len(edges) - 1) // 5)
        return [(edge, number(edge, 2)) for edge in edges[::step]]
    powers = range(math.ceil(math.log10(edges[0]) - 1e-9), math.floor(math.log10(edges[-1]) + 1e-9) + 1)
    return [(10.0**power, f"10{superscript(power)}" if power else "1") for power in powers]


def _place(value: float, edges: Sequence[float], log: bool) -> float:
    """Where a value lies among equally wide bins, in bins from the first edge."""
    low, high, at = (math.log(v) for v in (edges[0], edges[-1], value)) if log else (edges[0], edges[-1], value)
    return (len(edges) - 1) * (at - low) / (high - low)


def _drawn(value: float) -> float:
    """A value where a chart has a place for it: of a size that one can reckon with, or zero."""
    return 0.0 if abs(value) < 1 / LARGEST else min(max(value, -LARGEST), LARGEST)


def _thin(points: list[Point]) -> list[Point]:
    """The mean of each stretch of points, at its last x; the points themselves where they are few."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]
