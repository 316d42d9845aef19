"""How many latents fire in a row, by several thresholds, and how often each of them does."""

from typing import ClassVar

import torch

from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, distribution, numbers, quantiles, register
from sae.pipeline.metrics.sparsity import DENSE, Sparsity
from sae.pipeline.studies.plots import Panel

THRESHOLDS = (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.3, 0.5)  # shares of a row's largest latent


@register
class FeatureSparsity(Analysis):
    """How many latents fire in a row, by several thresholds, and how often each latent does.

    A dictionary without exact zeros fires everywhere; what it amounts to is seen at a threshold.
    """

    name = "sparsity"
    meanings: ClassVar[dict[str, str]] = {
        "l0_above_tiny": "latents above 1e-8 in a row",
        "zeros": "share of activations that are zero: 1 - L0 / latents",
        "dead": "latents that fired in none of the rows",
        "rare": "latents that fired, but in fewer than a millionth of the rows",
        "dense": "latents that fired in more than a tenth of the rows",
    }

    def find(self, subject: Analysed) -> Finding:
        metric, counts = Sparsity(subject.sae.d_sae), []
        above = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
        for batch in subject.batches():
            metric.count(batch.latents)
            counts.append(batch.latents.l0().cpu())
            sizes = batch.latents.dense().abs()
            largest = sizes.amax(1, keepdim=True)
            above += torch.stack([(sizes > share * largest).sum() for share in THRESHOLDS]).double().cpu()
        scores, density, l0 = metric.scores(), metric.density(), torch.cat(counts)
        by_threshold = (above / scores.rows).tolist()
        living = density[density > 0]
        return Finding(
            {
                "l0": scores.l0, "l0_above_tiny": scores.l0_above_tiny, "l0_relative": scores.l0_relative,
                "l1": scores.l1, "zeros": scores.zeros, "dead": scores.dead, "rare": scores.rare,
                "dense": scores.dense, "rows": scores.rows,
            },
            {
                "l0_by_threshold": {f"{share:g}": value for share, value in zip(THRESHOLDS, by_threshold, strict=True)},
                "l0_quantiles": quantiles(l0), "density_quantiles": quantiles(living), "dense_from": DENSE,
                "density": numbers(density),
            },
            [
                distribution("log10 of the share of rows", living.log10()),
                Panel(
                    "L0", "share of the row's largest",
                    {"": [*zip(THRESHOLDS, by_threshold, strict=True)]},
                ),
                distribution("active latents", l0, "rows"),
            ],
        )  # fmt: skip
