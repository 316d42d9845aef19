"""Dictionaries of several seeds are pulled towards each other, with several weights, and compared.

For every weight (and what it acts on) dictionaries of several seeds are trained as one group; weight 0 measures the
same without pulling. Where the true features are known, each latent's best cosine with the other dictionaries is set
against its best cosine with the truth: what others found as well should be true. Agreement is no end in itself: read it
beside the FVU it costs, and beside what random directions would score.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.cache.runs import Run
from sae.pipeline.formats import trained
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.similarity import best, chance, correlation, mutual
from sae.pipeline.report.compare import Row
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.study import Setup, Study, expect_dictionary, register
from sae.pipeline.studies.tables import Result
from sae.pipeline.train.alignment import AlignConfig, By
from sae.pipeline.train.sweep import fill_in_align_seeds

TRUTH = "agreement_truth_r"
DRAWN = ("agreement", "fvu", "true_to_learned", "ce_degradation", TRUTH)
TITLES = {"agreement": "agreement of decoders (MMCS)", TRUTH: "r of agreement and truth"}  # of what is measured here
SMALLEST = 0.1  # of the smallest weight: where none stands on a logarithmic axis


@register
class SeedAlignment(Study):
    """Dictionaries of several seeds pulled towards each other: how far they agree, what it costs, whether it is true.

    Three dictionaries for every weight, unless `--seeds` says otherwise.
    On rows of `sae synthesize` the true features are known, and each latent's agreement is set against its truth.

    Examples:

        sae study alignment --rows 50M --weights 0,0.1
        sae study alignment --preset synthetic --by dec,hid --seeds 5
    """

    name = "alignment"
    labels = ("by", "weight")
    shown = ("agreement", "agreement_chance", "fvu", "l0", "dead_fraction")
    decides = ("align.by", "align.weight", "align.seeds")
    usual_seeds = 3

    by: tuple[By, ...] = Field(
        ("dec",),
        min_length=1,
        description="what is to agree: dec (decoder rows), hid (activations), x_hat (reconstructions), or several",
    )
    weights: tuple[NonNegativeFloat, ...] = Field(
        (0.0, 0.01, 0.1, 1.0), min_length=1, description="weights of the pull; 0 is none"
    )

    def trials(self, setup: Setup) -> list[Trial]:
        """Return a group of dictionaries for every weight and everything it acts on; one group for weight 0.

        Settings of alignment the base has (matching, warm-up) are kept.
        """
        align = setup.base.align or AlignConfig()
        acted_on = [what for what in get_args(By) if what in self.by]
        # what a weight of 0 acts on makes no difference
        pairs = dict.fromkeys((what if weight else acted_on[0], weight) for what in acted_on for weight in self.weights)
        trials = []
        for what, weight in pairs:
            config = setup.base.model_copy(update={"align": align.model_copy(update={"by": what, "weight": weight})})
            seeds = range(config.seed, config.seed + (setup.seeds or self.usual_seeds))
            group = [config.model_copy(update={"seed": seed}) for seed in seeds]
            trials += [setup.trial({"by": what, "weight": weight}, one) for one in fill_in_align_seeds(group)]
        return trials

    def run(self, setup: Setup) -> Result:
        expect_dictionary(setup.base)
        rows = setup.lab.rows(self.trials(setup))
        latents = compare(rows, setup.lab.place.runs, setup.dataset.truth)
        d_sae = setup.base.sae.latents
        by_chance = chance(d_sae, d_sae, setup.dataset.d_out)
        for row in rows:
            row["agreement_chance"] = by_chance

        def draw(table: Sequence[Row], path: Path) -> None:
            draw_panels(panels(table, latents), path)

        return self.result(rows, TRUTH, draw=draw, extra={"latents": latents})


def compare(rows: Sequence[Row], runs: Path, truth: Tensor | None) -> list[dict[str, Any]]:
    """Add each run's agreement with the others of its group; of every group's first run, the latents' best cosines.

    With the truth known a run's `agreement_truth_r` is Pearson's r over its latents of their best cosine with the
    others' and with a true feature.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SeedAlignment.labels), []).append(row)
    latents = []
    for labels, group in groups.items():
        decoders = [trained.load_run(Run(runs / row["run"])).W_dec.detach() for row in group]
        for i, (row, agreement) in enumerate(zip(group, mutual(decoders), strict=True)):
            row |= {"agreement": agreement, "agreement_truth_r": None}
            if truth is None:
                continue
            mine, others = decoders[i], torch.cat([other for j, other in enumerate(decoders) if j != i])
            agreed, true = nearest(mine, others), nearest(mine, truth.to(mine.device))
            row["agreement_truth_r"] = correlation(agreed, true)
            if i == 0:
                found = {"agreement": agreed.tolist(), "truth": true.tolist(), "r": row["agreement_truth_r"]}
                latents.append({**dict(zip(SeedAlignment.labels, labels, strict=True)), **found})
    return latents


def nearest(a: Tensor, b: Tensor) -> Tensor:
    """Return, for each row of a [n, d], its largest cosine with a row of b [m, d]: float [n]."""
    return cosine_similarity(a, b[best(a, b)])


def panels(rows: Sequence[Row], latents: Sequence[dict[str, Any]]) -> list[Panel]:
    """Return the panels: each figure against the weight, a curve for what it acts on; and agreement against truth."""
    every = list(dict.fromkeys(row["by"] for row in rows))
    above = [row["weight"] for row in rows if row["weight"]]
    free = SMALLEST * min(above, default=1.0)

    def curve(name: str, what: str) -> list[tuple[float, float | None]]:
        return [(row["weight"] or free, row[name]) for row in rows if row["by"] == what or not row["weight"]]

    shown = [
        Panel(title, f"weight ({free:g}: none)", {what: curve(name, what) for what in every}, log_x=True)
        for name in DRAWN
        for title in [TITLES.get(name) or label(name)]
    ]
    points = {}
    for one in latents:
        told = "" if one["r"] is None else f": r = {one['r']:.2f}"
        points[f"{one['by']}, weight {one['weight']:g}{told}"] = list(zip(one["agreement"], one["truth"], strict=True))
    return [*shown, Panel("latents: best true feature", "best latent of the others", points, scattered=True)]
