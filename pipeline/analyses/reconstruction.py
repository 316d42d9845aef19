"""How well rows come back, row by row and feature by feature."""

from typing import ClassVar

import torch

from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, distribution, numbers, quantiles, register
from sae.pipeline.metrics.reconstruction import Reconstruction
from sae.pipeline.studies.plots import Panel


@register
class ReconstructionQuality(Analysis):
    """How well rows come back: over all, row by row, and feature by feature."""

    name = "reconstruction"
    meanings: ClassVar[dict[str, str]] = {"row_error_median": "median over rows of squared error / squared norm"}

    def find(self, subject: Analysed) -> Finding:
        metric, errors = Reconstruction(), []
        for batch in subject.batches():
            metric.count(batch.y, batch.y_hat)
            norms = batch.y.square().sum(1)
            shares = (batch.y - batch.y_hat).square().sum(1) / norms
            errors.append(torch.where(norms > 0, shares, torch.nan).cpu())
        scores, by_feature = metric.scores(), metric.explained_variance_per_feature().cpu()
        by_row, known = torch.cat(errors), by_feature[by_feature.isfinite()].sort(descending=True).values
        there = by_row[by_row.isfinite()]
        places = torch.linspace(0, len(known) - 1, min(len(known), 200)).long() if len(known) else torch.arange(0)
        curve = [(place / len(known), known[place].item()) for place in places.tolist()]
        return Finding(
            {
                "fvu": scores.fvu, "explained_variance": scores.explained_variance, "mse": scores.mse_per_feature,
                "cosine": scores.cosine, "l2_ratio": scores.l2_ratio, "relative_bias": scores.relative_bias,
                "row_error_median": there.median().item() if len(there) else None, "rows": scores.rows,
            },
            {
                "row_error_quantiles": quantiles(there), "explained_variance_quantiles": quantiles(known),
                "explained_variance_by_feature": numbers(by_feature),
            },
            [
                distribution("log10 of the squared error over the squared norm", there[there > 0].log10(), "rows"),
                Panel("explained variance", "share of features", {"": curve}, marks=False),
            ],
        )  # fmt: skip
