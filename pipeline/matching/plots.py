"""The plot of dictionaries that were compared: how alike latents are to their best matches, pairs, and the matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from sae.pipeline.matching.pairs import SHARES, Matched
from sae.pipeline.report.plots import plain_text, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 50
FEW = 12  # dictionaries whose matrix has numbers in it


def draw(
    names: Sequence[str], found: Mapping[tuple[int, int], Matched], matrix: Sequence[Sequence[float | None]],
    least: Mapping[str, Sequence[float]], likeness: str, path: Path,
) -> None:  # fmt: skip
    """Of two dictionaries: best matches both ways, and the pairs one to one. Of more: the worst of each latent's best
    matches, and the matrix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2 if len(names) == 2 else 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if len(names) == 2:
        one = found[0, 1]
        first, second = (plain_text(name) for name in names)
        _histogram(
            left, {f"{first} in {second}": one.ab, f"{second} in {first}": one.ba}, f"{likeness} with the best match"
        )
        _pairs(right, one, likeness)
    else:
        _histogram(
            left, {plain_text(name): values for name, values in least.items()}, f"least {likeness} with a best match"
        )
        _matrix(right, [plain_text(name, 16) for name in names], matrix, "MMCS" if likeness == "cosine" else likeness)
    save(figure, path)


def _histogram(axis: Axes, every: Mapping[str, Tensor | Sequence[float]], title: str) -> None:
    values = {name: np.asarray(one, np.float64) for name, one in every.items()}
    low = min(0.0, *(float(one.min()) for one in values.values()))
    edges = np.linspace(low, 1, BINS + 1)
    for name, one in values.items():
        axis.hist(np.clip(one, low, 1), edges.tolist(), histtype="step", label=name)
    for least in SHARES.values():
        axis.axvline(least, color="0.7", linewidth=1, linestyle=":")
    axis.set(xlabel=title, ylabel="latents", xlim=(low, 1))
    axis.legend(frameon=False, fontsize="small", loc="upper left")


def _pairs(axis: Axes, one: Matched, likeness: str) -> None:
    if one.likeness is None:
        axis.set_axis_off()
        return
    ordered = np.sort(one.likeness.numpy())[::-1]
    axis.plot(np.arange(1, len(ordered) + 1), ordered)
    for least in SHARES.values():
        axis.axhline(least, color="0.7", linewidth=1, linestyle=":")
    axis.set(xlabel="pairs, the most alike first", ylabel=f"{likeness} of the pair", ylim=(min(0, ordered[-1]), 1.02))
    axis.grid(alpha=0.25)


def _matrix(axis: Axes, names: Sequence[str], matrix: Sequence[Sequence[float | None]], title: str) -> None:
    table = np.array([[np.nan if value is None else value for value in row] for row in matrix])
    axis.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set(title=title, xticks=range(len(names)), yticks=range(len(names)))
    axis.set_xticklabels(names, rotation=45, ha="right", fontsize="small")
    axis.set_yticklabels(names, fontsize="small")
    for i, row in enumerate(table if len(names) <= FEW else ()):
        for j, value in enumerate(row):
            if np.isnan(value):
                continue
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color="w" if value < 0.6 else "k"
            )
