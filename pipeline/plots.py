"""Plots as files (PNG, SVG or PDF by the ending of the name), drawn without a display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache.durable import write_atomic
from cache.errors import SaeError
from pipeline.compare import Row, front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOM = 15  # ratio of the ends of a logarithmic axis up to which the labels between powers of ten do not overlap
FORMATS = (".png", ".svg", ".pdf")
AXES = (  # a panel each: what is on y, where x is L0
    ("fvu", "l0", "FVU, held-out rows"),
    ("ce_degradation", "l0", "cross-entropy added when spliced in, nats a token"),
    ("train_fvu", "train_l0", "FVU, last training batch"),
)


def pareto(rows: Sequence[Row], path: Path) -> None:
    """L0 against FVU and against cross-entropy degradation, a colour an architecture, its best runs joined.

    Panels without two figures a run are left out; without held-out figures the last training batch's are shown. Raises
    SaeError for a name whose ending is no format, and where there is nothing to plot.
    """
    if path.suffix not in FORMATS:
        raise SaeError(f"--plot {path}: the ending says the format; use {', '.join(FORMATS)}")
    panels = [axes for axes in AXES if any(_point(row, *axes[:2]) for row in rows)]
    panels = panels[:-1] if len(panels) > 1 and panels[-1] == AXES[-1] else panels
    if not panels:
        raise SaeError(f"--plot {path}: no run has both L0 and a figure to set against it")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = list(dict.fromkeys(str(row["sae.arch"]) for row in rows))
    for axis, (y_name, x_name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, kind in enumerate(kinds):
            of_kind = [_point(row, y_name, x_name) for row in rows if row["sae.arch"] == kind]
            points = [point for point in of_kind if point is not None]
            if not points:
                continue
            colour = f"C{index % 10}"
            axis.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.75, label=kind)
            axis.plot(*zip(*front(points), strict=True), "-", color=colour, linewidth=1.2)
        axis.set(xlabel="L0", title=title, xscale="log")
        plain_numbers(axis)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    save(figure, path)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as the ending of the path says, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, dpi=150, format=path.suffix.removeprefix("."))
    write_atomic(path, data.getvalue())


def plain_numbers(axis: "Axes") -> None:
    """Label a logarithmic x axis with numbers as people write them, those between powers of ten where there is room."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = axis.get_xlim()
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_major_formatter(plain)
    axis.xaxis.set_minor_formatter(plain if high < ROOM * low else NullFormatter())


def _point(row: Row, y_name: str, x_name: str) -> tuple[float, float] | None:
    """(L0, figure) of a row, or None where one of them is missing or L0 has no place on a logarithmic axis."""
    x, y = row[x_name], row[y_name]
    return (x, y) if x is not None and y is not None and x > 0 else None
