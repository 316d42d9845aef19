"""The table and the plot of probes: a row a dictionary (or site), probe and k, means over splits; means over sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.probing.probes import FIGURES
from sae.pipeline.report.compare import Row
from sae.pipeline.report.plots import plain_text, save
from sae.pipeline.studies.tables import Result

LATENTS, BEST, RANDOM = "latents", "best latent by AUROC", "random latents"
ACTIVATIONS, MAJORITY = "activations", "majority class"
LABELS = ("dictionary", "set", "probe", "k", "classes", "texts")
STYLES = {LATENTS: "o-", ACTIVATIONS: "o-", RANDOM: "x:"}  # of what is drawn against k
LONGEST = 60  # letters of a name
TITLES = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}


def result_of(rows: list[Row], config: ProbeConfig, chosen: dict[str, Any], notes: list[str]) -> Result:
    """What was found, as studies give it. rows: one for every dictionary, set, probe, k and split."""
    extra: dict[str, Any] = {"settings": config.model_dump(mode="json"), "chosen": chosen}
    result = Result("probing", LABELS, FIGURES, rows, lambda _, path: draw(means(rows), path), notes, extra)
    extra["means"] = means(rows)
    return result


def means(rows: Sequence[Row]) -> list[Row]:
    """The mean over sets of every figure, and its deviation over splits: a row a dictionary, probe and k.

    rows: one for every set and split.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dictionary"], row["probe"], row["k"]), []).append(row)
    told = []
    for (dictionary, probe, k), group in groups.items():
        one: Row = {"dictionary": dictionary, "probe": probe, "k": k, "sets": len({row["set"] for row in group})}
        seeds = sorted({row["seed"] for row in group})
        for name in FIGURES:
            each = [fmean(row[name] for row in group if row["seed"] == seed) for seed in seeds]
            one |= {name: fmean(each), f"{name}_sd": stdev(each) if len(each) > 1 else None}
        told.append(one)
    return told


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot: scores against k, a colour a dictionary or site; what reads all there is as a level line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    names = list(dict.fromkeys(row["dictionary"] for row in rows))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    figure = Figure(figsize=(9, 4.2 + 0.22 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (figure_name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if row["probe"] in STYLES and row["k"] == "all":
                axis.axhline(row[figure_name], color=colours[row["dictionary"]], linestyle="--", linewidth=1)
            elif row["probe"] in STYLES:
                curves.setdefault((row["dictionary"], row["probe"]), []).append((row["k"], row[figure_name]))
        for (name, probe), points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), STYLES[probe], color=colours[name])
        axis.axhline(0.5, color="0.6", linewidth=1)
        ticks = sorted({k for points in curves.values() for k, _ in points})
        axis.set(xlabel="k", ylabel=title, xscale="log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.25)
    shown = [Line2D([], [], color=colours[name], label=plain_text(name, LONGEST)) for name in names]
    styles = {"k of them": "o-", RANDOM: "x:", "all of them": "--", "chance": "-"}
    shown += [
        Line2D([], [], color="0.6", label=what, ls=style.strip("ox"), marker=style[0] if style[0] in "ox" else "")
        for what, style in styles.items()
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    save(figure, path)
