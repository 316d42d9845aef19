"""The picture of a decomposition: how often and how much each component of a matrix is important."""

from __future__ import annotations

from pathlib import Path

from sae.pipeline.decompose.reading import Reading
from sae.pipeline.report.plots import calm, save

FILE = "eval/components.png"
COLUMNS, MOST = 3, 12  # panels in a row, and in all


def draw(reading: Reading, path: Path) -> None:
    """Write a panel for each of the first matrices: its components in the order of their mean importance, and how often
    each is active. Of instances the first is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [*reading.fired.items()][:MOST]
    columns, lines = min(COLUMNS, len(shown)), -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(4.4 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for (name, fired), axis in zip(shown, axes, strict=False):
        rate, importance = (one.reshape(-1, one.shape[-1])[0].cpu() for one in fired)
        order = importance.argsort(descending=True, stable=True)
        axis.plot(importance[order].numpy(), "-", label="mean importance")
        axis.plot(rate[order].numpy(), ".", markersize=3, label="share of rows in which it is active")
        axis.set(title=name, xlabel="component", ylim=(0, None))
        axis.title.set_fontsize("small")
        calm(axis)
        axis.grid(alpha=0.25)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.axes[0].legend(frameon=False, fontsize="small")
    save(figure, path)
