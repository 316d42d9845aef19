"""ReLU, shifted ReLU, JumpReLU, TopK and BatchTopK are trained on the same data, seed and steps, and compared.

Each as its architecture comes, the L0s are its own: a ReLU that leaves a quarter of its latents at zero next to a TopK
that leaves 98 % says little about the functions. With `match_l0` the penalised ones get the coefficient that brings
their L0 to TopK's k (`l0_matching`).

`mse` is in the data's units and the same quantity for all; the total losses hold each variant's own penalties, in its
own scale, so that only their course is shown, as a sparkline.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.geometry import random_cosine
from sae.pipeline.report.compare import Row
from sae.pipeline.studies import l0_matching
from sae.pipeline.studies.lab import Lab, Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.study import Setup, Study, of_equal_rows, register, variant
from sae.pipeline.studies.tables import Result
from sae.pipeline.train.stage import TrainConfig


class Kind(NamedTuple):
    """One activation function: its architecture, and where a search for its coefficient starts (None: k decides)."""

    arch: str
    start: float | None


KINDS = {
    "relu": Kind("l1", 5.0),
    "shifted_relu": Kind("shifted_relu", 5.0),
    "jumprelu": Kind("jumprelu", 1.0),
    "topk": Kind("topk", None),
    "batchtopk": Kind("batchtopk", None),
}
APART = 1.2  # ratio of L0s from which on they are said to differ
SPARKS = "▁▂▃▄▅▆▇█"
PLAIN_SPARKS = "_.-=+*%#"
LENGTH = 24  # letters of a sparkline


@register
class Activations(Study):
    """Activation functions side by side: ReLU, shifted ReLU, JumpReLU, TopK, BatchTopK; same data, seed and steps.

    As they come, their L0s differ, and so little else can be said; `--match-l0` brings them together.

    Examples:

        sae study activations --rows 50M --k 32
        sae study activations --match-l0 --k 32 --seeds 3 --json
    """

    name = "activations"
    labels = ("activation", "coefficient")
    shown = (
        "mse", "fvu", "l0", "sparsity", "dead_fraction", "dense_share", "rate_q25", "rate_median", "rate_q75",
        "orthogonality", "train_loss",
    )  # fmt: skip
    architectures = ("l1", "shifted_relu", "jumprelu", "topk", "batchtopk")
    dictionary = ("k", "d_sae")

    match_l0: bool = Field(
        False, description="give the penalised ones the coefficients with which L0 is k, found by training"
    )

    def trials(self, setup: Setup) -> list[Trial]:
        return trials_of(variants(setup), setup)

    def run(self, setup: Setup) -> Result:
        """Train every variant; with `match_l0`, at an L0 within a tenth of k, or as near as was found."""
        setup = replace(setup, base=of_equal_rows(setup.base, [setup.dataset]))
        configs = variants(setup)
        target = int(getattr(configs["topk"].sae, "k"))  # noqa: B009 - a setting of TopK alone
        notes = _match(configs, target, setup.dataset, setup.lab) if self.match_l0 else []
        rows = self.rows(setup, trials_of(configs, setup))
        first = [row for row in rows if row["seed"] == setup.base.seed]
        history = {row["activation"]: losses(Run(setup.lab.place.runs / row["run"])) for row in first}
        extra = {
            "k": target,
            "matched_l0": self.match_l0,
            "orthogonality_of_random_directions": random_cosine(setup.dataset.d_out),
            "history": history,
        }

        def draw(table: Sequence[Row], path: Path) -> None:
            draw_panels(panels(table, history), path)

        return self.result(rows, draw=draw, notes=[*notes, *apart(rows)], extra=extra)

    def lines(self, result: Result, *, plain: bool = False) -> list[str]:
        return box(result, plain=plain)


def trials_of(configs: dict[str, TrainConfig], setup: Setup) -> list[Trial]:
    """Return a trial for each activation function."""
    return [
        setup.trial({"activation": name, "coefficient": getattr(config.sae, "coefficient", None)}, config)
        for name, config in configs.items()
    ]


def variants(setup: Setup) -> dict[str, TrainConfig]:
    """Return the settings of training for every activation function."""
    size = {name: value for name, value in setup.sae.items() if name != "k"}
    k = setup.sae.get("k", getattr(setup.base.sae, "k", None))
    fixed = size if k is None else {**size, "k": k}
    return {
        name: variant(setup.base, kind.arch, **(fixed if kind.start is None else size)) for name, kind in KINDS.items()
    }


def _match(configs: dict[str, TrainConfig], target: int, dataset: Dataset, lab: Lab) -> list[str]:
    """Give the penalised variants the coefficients that bring their L0 to the target; return notes on misses."""
    starts = {
        name: getattr(configs[name].sae, "coefficient") or kind.start  # noqa: B009 - only penalised ones have it
        for name, kind in KINDS.items()
        if kind.start is not None
    }

    def at(name: str, coefficient: float) -> TrainConfig:
        config = configs[name]
        return config.model_copy(update={"sae": config.sae.model_copy(update={"coefficient": coefficient})})

    def measure(guesses: dict[str, float]) -> dict[str, float]:
        trials = [Trial({"activation": name}, at(name, c), dataset) for name, c in guesses.items()]
        found = {row["activation"]: row["l0"] for row in lab.rows(trials, whole=False)}
        told = ", ".join(f"{name} {guesses[name]:g}: {l0:.3g}" for name, l0 in found.items())
        lab.place.progress.note(f"L0 for coefficients, wanted {target}: {told}")
        return found

    notes = []
    for name, seen in l0_matching.search(starts, target, measure).items():
        coefficient, l0 = l0_matching.best(seen, target)
        configs[name] = at(name, coefficient)
        if not l0_matching.close(l0, target):
            notes.append(f"{name}: L0 {l0:.3g} is the nearest to {target} that {len(seen)} trainings found")
    return notes


def apart(rows: Sequence[Row]) -> list[str]:
    """Return a note where L0s differ by more than a fifth."""
    by_l0 = sorted(rows, key=lambda row: row["l0"])
    low, high = by_l0[0], by_l0[-1]
    if high["l0"] <= APART * low["l0"]:
        return []
    return [
        f"L0 differs, from {low['l0']:.3g} ({low['activation']}) to {high['l0']:.3g} ({high['activation']}): "
        "errors at different L0 do not compare; `match_l0` brings them together"
    ]


def losses(run: Run) -> list[float]:
    """Return the logged losses of a run, thinned to the length of a sparkline; the last one is kept."""
    every = [entry["loss"] for entry in run.metrics() if entry.get("loss") is not None]
    if len(every) <= LENGTH:
        return every
    return [every[round((i + 1) * len(every) / LENGTH) - 1] for i in range(LENGTH)]


def sparkline(values: Sequence[float], *, plain: bool = False) -> str:
    """Draw values as letters, whose heights are those between the smallest and the largest."""
    if not values:
        return ""
    sparks, low, high = PLAIN_SPARKS if plain else SPARKS, min(values), max(values)
    scale = (len(sparks) - 1) / (high - low) if high > low else 0.0
    return "".join(sparks[round((value - low) * scale)] for value in values)


def box(result: Result, *, plain: bool = False) -> list[str]:
    """Draw the results in a frame of lines: loss and sparsity of every variant, and the course of its loss.

    plain: nothing but ASCII.
    """
    cells = [["activation", "loss (mse)", "FVU", "L0", "sparsity", "dead", "loss over training"]]
    for row in result.table:
        course = sparkline(result.extra["history"][row["activation"]], plain=plain)
        fvu = "-" if row["fvu"] is None else f"{row['fvu']:.4f}"
        shares = [f"{100 * row[name]:.2f} %" for name in ("sparsity", "dead_fraction")]
        cells.append([row["activation"], f"{row['mse']:.4g}", fvu, f"{row['l0']:.1f}", *shares, course])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    text = [
        "  ".join(
            cell.rjust(width) if 0 < i < len(line) - 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    across, down, corners = ("-", "|", "++++") if plain else ("─", "│", "┌┐└┘")
    edge = across * (len(text[0]) + 2)
    return [
        f"{corners[0]}{edge}{corners[1]}",
        *(f"{down} {line} {down}" for line in text),
        f"{corners[2]}{edge}{corners[3]}",
    ]


def panels(rows: Sequence[Row], history: dict[str, list[float]]) -> list[Panel]:
    """Return the panels: FVU and cross-entropy against L0, and the loss over training relative to its first value."""

    def points(name: str) -> dict[str, list[tuple[float, float | None]]]:
        return {row["activation"]: [(row["l0"], row[name])] for row in rows if row["l0"] > 0}

    course = {
        name: [((i + 1) / len(values), value / values[0]) for i, value in enumerate(values)]
        for name, values in history.items()
        if values and values[0] > 0
    }
    return [
        Panel(label("fvu"), "L0", points("fvu"), log_x=True),
        Panel(label("ce_degradation"), "L0", points("ce_degradation"), log_x=True),
        Panel("loss over the first logged", "share of the training", course, marks=False),
    ]
