"""Plots as files (PNG, SVG or PDF by the ending of the name), drawn without a display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae.cache.disk.durable import write_atomic
from sae.cache.errors import SaeError
from sae.cache.printable import printable
from sae.pipeline.metrics.figures import Better, better, compared, judged_on, label
from sae.pipeline.report.compare import Row, front, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOM = 15  # ratio of the ends of a logarithmic axis up to which the labels between powers of ten do not overlap
LEAST_RANGE = 0.1  # of a y axis, as a share of its values
MOST_LETTERS, MOST_LINE = 40, 400  # of a label, of a line below
FORMATS = (".png", ".svg", ".pdf")
DRAWN = ("fvu", "ce_degradation")  # a panel each, over L0


class PanelAxes(NamedTuple):
    """Axes of a panel: y and x, the label of y, which amounts both were judged on, which end of y is better."""

    y: str
    x: str
    title: str
    amounts: tuple[str, ...]
    better: Better


TRAINED = PanelAxes("train_fvu", "train_l0", "FVU, last training batch", (), "low")


def expect_plot(path: Path) -> None:
    """Raise SaeError for a name whose ending is no format."""
    if path.suffix not in FORMATS:
        raise SaeError(f"plot = {path}: the ending says the format; use {', '.join(FORMATS)}")


def expect_drawn(keys: Sequence[str]) -> None:
    """Raise SaeError for what is no figure of a comparison."""
    known = [one.key for one in compared() if one.key != "l0"]  # which is what they are set against
    if unknown := [key for key in keys if key not in known]:
        raise SaeError(f"y = {','.join(unknown)}: the figures are {', '.join(known)}")


def pareto(rows: Sequence[Row], path: Path, drawn: Sequence[str] | None = None) -> None:
    """L0 against FVU and the cross-entropy added, or against `drawn`; a colour an architecture, its best runs joined.

    Joined are those judged on the most; what was judged on less is hollow, and the legend says on how much. Panels
    without two figures a run are left out; without held-out figures the last training batch's are shown. Runs without
    a place in the plot are named below it. Raises SaeError for a name whose ending is no format, and where there is
    nothing to plot, or none of what was asked for.
    """
    expect_plot(path)
    panels = [axes for axes in map(axes_of, drawn or DRAWN) if any(_point(row, axes) for row in rows)]
    if drawn and len(panels) < len(drawn):
        lacks = {*drawn} - {panel.y for panel in panels}
        raise SaeError(f"y = {','.join(drawn)}: no run has both L0 and {' or '.join(sorted(lacks))}; see `evaluate()`")
    panels = panels or [TRAINED] * any(_point(row, TRAINED) for row in rows)
    if not panels:
        raise SaeError(f"plot = {path}: no run has both L0 and a figure to set against it")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = list(dict.fromkeys(str(row["sae.arch"]) for row in rows))
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _fill(axis, panel, rows, kinds)
    if below := absent(rows, panels):
        figure.supxlabel("\n".join(plain_text(line, MOST_LINE) for line in below.split("\n")), fontsize="small")
    save(figure, path)


def axes_of(key: str) -> PanelAxes:
    """The panel of a figure over L0."""
    return PanelAxes(key, "l0", label(key), judged_on(key), better(key))


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
    axis.set(xlabel="L0", ylabel=panel.title, xscale="log")
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
    unjudged, silent = [], []
    for row in rows:
        if "run" not in row:  # a mean over several
            continue
        if held_out and row["rows"] is None:
            unjudged.append(str(row["run"]))
        elif not any(_point(row, panel) for panel in panels):
            silent.append(str(row["run"]))
    said = [("not judged", unjudged), ("L0 of 0", silent)]
    return "; ".join(f"{why}: {named(names)}" for why, names in said if names)


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
    """(L0, figure) of a row, or None where one of them is missing or L0 has no place on a logarithmic axis."""
    x, y = row[axes.x], row[axes.y]
    return (x, y) if x is not None and y is not None and x > 0 else None
