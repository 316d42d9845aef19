"""ReLU, shifted ReLU, JumpReLU, TopK and BatchTopK are trained on the same data, seed and steps, and compared.

Each as its architecture comes, the L0s are its own: a ReLU that leaves a quarter of its latents at zero next to a TopK
that leaves 98 % says little about the functions. With `match_l0` the penalised ones aim at TopK's k (`target_l0`).

`mse` is in the data's units and the same quantity for all; the total losses hold each variant's own penalties, in its
own scale, so that only their course is shown, as a sparkline.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from sae.cache.runs import Run
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.geometry import random_cosine
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime.sparks import sparkline, thinned
from sae.pipeline.saes.fixed_k import FixedKConfig
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.study import Setup, Study, of_equal_rows, register, variant
from sae.pipeline.studies.tables import Result
from sae.pipeline.train.stage import TrainConfig


class Kind(NamedTuple):
    """One activation function: its architecture, and its coefficient where L0 is as it comes (None: k decides)."""

    arch: str
    coefficient: float | None


KINDS = {
    "relu": Kind("l1", 5.0),
    "shifted_relu": Kind("shifted_relu", 5.0),
    "jumprelu": Kind("jumprelu", 1.0),
    "topk": Kind("topk", None),
    "batchtopk": Kind("batchtopk", None),
}
APART = 1.2  # ratio of L0s from which on they are said to differ
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

    match_l0: bool = Field(False, description="let the penalised ones aim at an L0 of k")

    def trials(self, setup: Setup) -> list[Trial]:
        return trials_of(self.variants(setup), setup)

    def run(self, setup: Setup) -> Result:
        setup = replace(setup, base=of_equal_rows(setup.base, [setup.dataset]))
        configs = self.variants(setup)
        target = int(getattr(configs["topk"].sae, "k"))  # noqa: B009 - a setting of TopK alone
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

        return self.result(rows, draw=draw, notes=apart(rows, matched=self.match_l0), extra=extra)

    def variants(self, setup: Setup) -> dict[str, TrainConfig]:
        """Return the settings of training for every activation function."""
        size = {name: value for name, value in setup.sae.items() if name != "k"}
        asked = setup.sae.get("k", getattr(setup.base.sae, "k", None))
        k = FixedKConfig.model_fields["k"].default if asked is None else asked
        found = {}
        for name, kind in KINDS.items():
            own = getattr(setup.base.sae, "coefficient", None) if setup.base.sae.arch == kind.arch else None
            aim = {"target_l0": float(k)} if self.match_l0 else {}
            penalty = {"coefficient": own or kind.coefficient} | aim
            found[name] = variant(setup.base, kind.arch, **size, **({"k": k} if kind.coefficient is None else penalty))
        return found

    def lines(self, result: Result, *, plain: bool = False) -> list[str]:
        return box(result, plain=plain)


def trials_of(configs: dict[str, TrainConfig], setup: Setup) -> list[Trial]:
    """Return a trial for each activation function."""
    return [
        setup.trial({"activation": name, "coefficient": getattr(config.sae, "coefficient", None)}, config)
        for name, config in configs.items()
    ]


def apart(rows: Sequence[Row], *, matched: bool = False) -> list[str]:
    """Return a note where L0s differ by more than a fifth."""
    by_l0 = sorted(rows, key=lambda row: row["l0"])
    low, high = by_l0[0], by_l0[-1]
    if high["l0"] <= APART * low["l0"]:
        return []
    cure = "trained for longer they come nearer" if matched else "`match_l0` brings them together"
    return [
        f"L0 differs, from {low['l0']:.3g} ({low['activation']}) to {high['l0']:.3g} ({high['activation']}): "
        f"errors at different L0 do not compare; {cure}"
    ]


def losses(run: Run) -> list[float]:
    """Return the logged losses of a run, thinned to the length of a sparkline; the last one is kept."""
    return thinned([entry["loss"] for entry in run.metrics() if entry.get("loss") is not None], LENGTH)


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
