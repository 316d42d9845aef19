"""How well latents tell how much of each true feature is in a row, and whether it is there.

A feature is read by the latent whose decoder row is nearest to it. Beside it stands what the nearest of as many random
directions tells: such a one is nearer than chance to something, and correlates a little with every feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.metrics.similarity import best, random_directions

KEPT = 1 << 24  # activations that are kept, of every feature's latent: the AUROC needs them all


@register
class Coefficients(Metric):
    """How well the latent nearest to a true feature tells how much of it is in a row."""

    name = "coefficients"
    needs = ("directions", "truth", "coefficients")
    figures = (
        Figure("coefficient_r", "r of coefficients", "mean over the true features of Pearson's r of the coefficient and the nearest latent", "high"),
        Figure("coefficient_auroc", "AUROC of presence", "mean over the true features of how well the nearest latent tells that it is there", "high", "evaluation"),
        Figure("coefficient_r_chance", "r by chance", "coefficient_r of the nearest of as many random directions", None, "evaluation"),
        Figure("coefficient_auroc_chance", "AUROC by chance", "coefficient_auroc of these", None, "evaluation"),
    )  # fmt: skip

    def __init__(self, learned: Tensor, truth: Tensor) -> None:
        """learned: directions [m, d]. truth: features [G, d], those of zeros left out."""
        shown = truth.any(1)
        truth, self._shown = truth[shown], shown.nonzero().view(-1)
        self._latent = best(truth, learned)
        by_chance = random_directions(len(learned), truth.shape[1])
        self._random = by_chance[best(truth, by_chance)]
        self._most = most_rows(len(truth))
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rows = 0

    @classmethod
    def of(cls, subject: Subject) -> Coefficients:
        assert subject.truth is not None
        return cls(subject.dictionary.W_dec.detach().cpu(), subject.truth)

    def compare(self, batch: Encoded, coefficients: Tensor) -> None:
        room = self._most - self.rows
        if room <= 0 or not len(self._latent):
            return
        assert batch.codes is not None
        where = batch.y.device
        self._latent, self._shown, self._random = (each.to(where) for each in (self._latent, self._shown, self._random))
        activations = batch.codes.dense().detach()[:room].float()[:, self._latent]
        projections = batch.y[:room].float() @ self._random.T
        self._kept.append((activations, projections, coefficients[:room, self._shown]))
        self.rows += len(activations)

    def result(self) -> dict[str, Value]:
        if not self.rows:
            return dict.fromkeys(one.key for one in self.figures)
        activations, projections, true = (torch.cat(parts).cpu() for parts in zip(*self._kept, strict=True))
        there = true > 0
        return {
            "coefficient_r": _mean(correlations(activations, true)), "coefficient_auroc": _mean(auroc(activations, there)),
            "coefficient_r_chance": _mean(correlations(projections, true)),
            "coefficient_auroc_chance": _mean(auroc(projections, there)),
        }  # fmt: skip

    def details(self) -> dict[str, Any]:
        return {"coefficients": {"rows": self.rows, "features": len(self._latent)}}


def most_rows(features: int) -> int:
    """How many rows are kept of so many features."""
    return max(1, KEPT // max(1, features))


def correlations(values: Tensor, true: Tensor) -> Tensor:
    """float64 [G]: Pearson's r of each pair of columns of two tables [n, G].

    0 where the values do not vary, NaN where what is true does not.
    """
    values, true = (table.double() - table.double().mean(0) for table in (values, true))
    scale = torch.linalg.vector_norm(values, dim=0) * torch.linalg.vector_norm(true, dim=0)
    found = torch.where(scale > 0, (values * true).sum(0) / scale, 0.0)
    return torch.where(true.any(0), found, torch.nan)


def auroc(values: Tensor, there: Tensor) -> Tensor:
    """float64 [G]: for each column of values [n, G], how likely it is larger in a row of `there` [n, G] than in another.

    Ties count half. NaN where a column of `there` is all true or all false.
    """
    found = torch.full((values.shape[1],), torch.nan, dtype=torch.float64)
    for column in range(values.shape[1]):
        present = there[:, column]
        absent, shown = values[~present, column].sort().values, values[present, column]
        if len(absent) and len(shown):
            below, upto = (torch.searchsorted(absent, shown, right=right) for right in (False, True))
            found[column] = (below + upto).double().mean() / (2 * len(absent))
    return found


def _mean(values: Tensor) -> float | None:
    """The mean of what is defined; None where nothing is."""
    defined = values[~values.isnan()]
    return defined.mean().item() if len(defined) else None
