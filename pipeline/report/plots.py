"""Plots as files (PNG, SVG or PDF by the ending of the name), drawn without a display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae.cache.disk.durable import write_atomic
from sae.cache.errors import SaeError
from sae.cache.printable import printable
from sae.pipeline.metrics.figures import Better, better, compared, judged_on, label, title
from sae.pipeline.report.compare import Row, front, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOM = 15  # ratio of the ends of a logarithmic axis up to which the labels between powers of ten do not overlap
LEAST_RANGE = 0.1  # of a y axis, as a share of its values
MOST_LETTERS, MOST_LINE = 40, 400  # of a label, of a line below
FORMATS = (".png", ".svg", ".pdf")
DRAWN = ("fvu", "ce_degradation")  # a panel each
COSTS = ("l0", "active_parameters", "bits")  # what they are set against, of which less is better


class PanelAxes(NamedTuple):
    """Axes of a panel: y and x, their labels, which amounts both were judged on, which end of y is better."""

    y: str
    x: str
    title: str
    x_title: str
    amounts: tuple[str, ...]
    better: Better


TRAINED = PanelAxes("train_fvu", "train_l0", "FVU, last training batch", "L0", (), "low")


def expect_plot(path: Path) -> None:
    """Raise SaeError for a name whose ending is no format."""
    if path.suffix not in FORMATS:
        raise SaeError(f"plot = {path}: the ending says the format; use {', '.join(FORMATS)}")


def expect_drawn(keys: Sequence[str], x: str = "l0") -> None:
    """Raise SaeError for what is no figure of a comparison, or nothing that they are set against."""
    if x not in COSTS:
        raise SaeError(f"x = {x}: figures are set against {', '.join(COSTS)}")
    known = [one.key for one in compared() if one.key not in ("l0", x)]
    if unknown := [key for key in keys if key not in known]:
        raise SaeError(f"y = {','.join(unknown)}: the figures are {', '.join(known)}")


def pareto(rows: Sequence[Row], path: Path, drawn: Sequence[str] | None = None, x: str = "l0") -> None:
    """FVU and the cross-entropy added, or what is `drawn`, against a cost; a colour an architecture, its best joined.

    Joined are those judged on the most; what was judged on less is hollow, and the legend says on how much. Panels
    without two figures a run are left out; without held-out figures the last training batch's are shown. Runs without
    a place in the plot are named below it. Raises SaeError for a name whose ending is no format, and where there is
    nothing to plot, or none of what was asked for.
    """
    expect_plot(path)
    panels = panels_of(rows, drawn, x)
    if not panels:
        raise SaeError(f"plot = {path}: no run has both {axes_of('fvu', x).x_title} and a figure to set against it")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    rows = [{**row, "sae.arch": kind} for row, kind in zip(rows, kinds_of(rows), strict=True)]
    kinds = list(dict.fromkeys(row["sae.arch"] for row in rows))
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _fill(axis, panel, rows, kinds)
    if below := absent(rows, panels):
        figure.supxlabel("\n".join(plain_text(line, MOST_LINE) for line in below.split("\n")), fontsize="small")
    save(figure, path)


def kinds_of(rows: Sequence[Row]) -> list[str]:
    """What each row is in the legend: its architecture, and whether that is a transcoder where some of it are not."""
    across = [" -> " in str(row.get("activations")) for row in rows]
    plain = {row["sae.arch"] for row, two in zip(rows, across, strict=True) if not two}
    named = zip((row["sae.arch"] for row in rows), across, strict=True)
    return [f"{arch} transcoder" if two and arch in plain else str(arch) for arch, two in named]


def panels_of(rows: Sequence[Row], drawn: Sequence[str] | None = None, x: str = "l0") -> list[PanelAxes]:
    """The panels that a plot of rows has. Raises SaeError where one that was asked for by name has no point."""
    panels = [axes for axes in (axes_of(key, x) for key in drawn or DRAWN) if any(_point(row, axes) for row in rows)]
    if drawn and len(panels) < len(drawn):
        lacks, against = {*drawn} - {panel.y for panel in panels}, axes_of(drawn[0], x).x_title
        raise SaeError(
            f"y = {','.join(drawn)}: no run has both {against} and {' or '.join(sorted(lacks))}; see `evaluate()`"
        )
    return panels or [TRAINED] * (x == "l0" and any(_point(row, TRAINED) for row in rows))


def axes_of(key: str, x: str = "l0") -> PanelAxes:
    """The panel of a figure over a cost."""
    return PanelAxes(key, x, label(key), title(x), judged_on(key), better(key))


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as the ending of the path says, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, dpi=150, format=path.suffix.removeprefix("."))
    write_atomic(path, data.getvalue())


def _fill(axis: "Axes", panel: PanelAxes, rows: Sequence[Row], kinds: list[str]) -> None:
    points: dict[tuple[tuple[int, ...], str], list[tuple[float, float]]] = {}
    for row in rows:
        if (point := _point(row, panel)) is not None:
            amount = tuple(row.get(name) or 0 for name in panel.amounts)
            points.setdefault((amount, str(row["sae.arch"])), []).append(point)
    most = max(amount for amount, _ in points)
    alike = all(amount == most for amount, _ in points)
    for (amount, kind), group in sorted(points.items(), key=lambda one: (kinds.index(one[0][1]), one[0][0])):
        colour, full = f"C{kinds.index(kind) % 10}", amount == most
        on = " and ".join(f"{n:,} {name}" for n, name in zip(amount, panel.amounts, strict=True))
        axis.plot(
            *zip(*group, strict=True), "o", color=colour, alpha=0.75, fillstyle="full" if full else "none",
            label=plain_text(kind) if alike else f"{plain_text(kind)}, on {on}",
        )  # fmt: skip
        if full:
            axis.plot(*zip(*front(group, panel.better), strict=True), "-", color=colour, linewidth=1.2)
    axis.set(xlabel=panel.x_title, ylabel=panel.title, xscale="log")
    calm(axis)
    plain_numbers(axis)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)


def plain_text(said: str, most: int = MOST_LETTERS) -> str:
    """A label that stays as it is: no formula, nothing hidden, of a length there is room for."""
    return printable(said)[:most].replace("\\", "/").replace("$", r"\$")


def absent(rows: Sequence[Row], panels: Sequence[PanelAxes]) -> str:
    """Say which runs have no point in a panel that is drawn, and why; empty where all have."""
    held_out = any(panel.amounts for panel in panels)
    said: dict[str, list[str]] = {}
    for row in rows:
        if "run" not in row:  # a mean over several
            continue
        unjudged = held_out and row["rows"] is None
        lacks = ["not judged"] if unjudged else [_lack(row, panel) for panel in panels if not _point(row, panel)]
        for why in dict.fromkeys(lacks):
            said.setdefault(why, []).append(str(row["run"]))
    return "; ".join(f"{why}: {named(names)}" for why, names in said.items())


def _lack(row: Row, panel: PanelAxes) -> str:
    """Why a row has no point in a panel."""
    if row[panel.x] is None:
        return f"no {panel.x_title}"
    return f"{panel.x_title} of 0" if row[panel.x] <= 0 else f"no {panel.title}"


def calm(axis: "Axes") -> None:
    """Give a linear y axis a range of at least a tenth of its values, so that no noise fills it, and no offset."""
    axis.ticklabel_format(axis="y", useOffset=False)
    low, high = axis.get_ylim()
    least = LEAST_RANGE * max(abs(low), abs(high))
    if high - low < least:
        middle = (low + high) / 2
        axis.set_ylim(middle - least / 2, middle + least / 2)


def plain_numbers(axis: "Axes") -> None:
    """Label a logarithmic x axis with numbers as people write them, those between powers of ten where there is room."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = axis.get_xlim()
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_major_formatter(plain)
    axis.xaxis.set_minor_formatter(plain if high < ROOM * low else NullFormatter())


def _point(row: Row, axes: PanelAxes) -> tuple[float, float] | None:
    """(cost, figure) of a row, or None where one of them is missing or the cost has no place on a logarithmic axis."""
    x, y = row[axes.x], row[axes.y]
    return (x, y) if x is not None and y is not None and x > 0 else None
