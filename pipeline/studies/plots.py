"""The plots of studies are panels of curves side by side in one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import TYPE_CHECKING, Any

from sae.pipeline.report.plots import calm, plain_numbers, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: named curves of (x, y), points without a y left out.

    `dashed` curves are for reference; points that are `scattered` are not joined: the line that fits them is drawn. Nor
    are those that are not `joined`.
    """

    title: str
    x: str
    curves: Mapping[str, Curve]
    dashed: frozenset[str] = frozenset()
    log_x: bool = False
    marks: bool = True
    scattered: bool = False
    joined: bool = True
    ticks: Sequence[float] | None = None

    @property
    def there(self) -> bool:
        """Return whether there is anything to see: a point, or, where points have no marks, a line between two."""
        least = 1 if self.marks or self.scattered else 2
        return any(sum(y is not None for _, y in curve) >= least for curve in self.curves.values())


@dataclass(frozen=True)
class Heat:
    """A table of numbers as colours: [rows, columns], with what its rows and its columns are and the colours say."""

    title: str
    x: str
    values: Sequence[Sequence[float]]
    colours: str

    @property
    def there(self) -> bool:
        """Return whether there is anything to see."""
        return bool(self.values) and bool(self.values[0])


COLUMNS = 3


def draw(panels: Sequence[Panel | Heat], path: Path) -> None:
    """Write the panels that have something to show, three in a row, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if panel.there]
    columns = max(1, min(COLUMNS, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for panel, axis in zip(shown, axes, strict=False):
        if isinstance(panel, Heat):
            drawn = axis.imshow(panel.values, aspect="auto", interpolation="nearest", cmap="viridis")
            axis.set(xlabel=panel.x, ylabel=panel.title)
            figure.colorbar(drawn, ax=axis, label=panel.colours)
        else:
            _fill(axis, panel)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    save(figure, path)


def dots(rows: Sequence[Mapping[str, Any]], label: str, titles: Mapping[str, str], path: Path) -> None:
    """Write a panel for each figure that is there: a line for each row, with its deviation where there is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [str(row[label]) for row in rows]
    shown = {name: title for name, title in titles.items() if any(row[name] is not None for row in rows)}
    figure = Figure(figsize=(1.4 + 3.4 * len(shown), 1.2 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, title) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for place, row in enumerate(rows):
            if row[name] is not None:
                axis.errorbar(row[name], place, xerr=row.get(f"{name}_sd"), fmt="o", color=f"C{place % 10}", capsize=3)
        axis.set(xlabel=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axis.grid(alpha=0.25)
    save(figure, path)


def fitted(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the ends of the line of least squares through points, or nothing where they have no two abscissas."""
    xs = [x for x, _ in points]
    if len(set(xs)) < 2:
        return []
    slope, start = linear_regression(xs, [y for _, y in points])
    return [(x, start + slope * x) for x in (min(xs), max(xs))]


def _fill(axis: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import NullLocator

    for index, (name, curve) in enumerate(panel.curves.items()):
        points = [(x, y) for x, y in curve if y is not None]
        style = "--" if name in panel.dashed else "o-" if panel.marks else "-"
        style = style if panel.joined and not panel.scattered else "."
        axis.plot([x for x, _ in points], [y for _, y in points], style, color=f"C{index % 10}", label=name)
        if panel.scattered and (ends := fitted(points)):
            axis.plot(*zip(*ends, strict=True), "-", color=f"C{index % 10}", linewidth=1)
    axis.set(xlabel=panel.x, ylabel=panel.title)
    calm(axis)
    if panel.log_x:
        axis.set_xscale("log")
        plain_numbers(axis)
    if panel.ticks is not None:
        axis.set_xticks(list(panel.ticks), [f"{tick:g}" for tick in panel.ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25)
    if len(panel.curves) > 1 or panel.scattered:
        axis.legend(frameon=False, fontsize="small")
