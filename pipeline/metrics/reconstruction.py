"""How well rows are reconstructed: x^ [B, d] against a target x [B, d] (for an autoencoder its own input).

Variance is taken around the mean of all rows seen, and fractions are ratios of sums, not means of ratios: a mean over
batches of 1 - error / variance would depend on the batch size and on which rows met in a batch. Batches are merged by
their own means and squared deviations (Chan, Golub & LeVeque 1983), which loses nothing where the mean is many
standard deviations from zero, as in residual streams.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Value, register


@dataclass(frozen=True)
class ReconstructionScores:
    """Over `rows` rows. None: not defined for these rows (no variance, no row that is not zero)."""

    rows: int
    fvu: float | None  # fraction of variance unexplained: sum ||x - x^||^2 / sum ||x - mean||^2
    explained_variance: float | None  # 1 - fvu
    explained_variance_features: float | None  # mean over the features that vary of 1 - FVU of each
    mse: float  # mean over rows of ||x - x^||^2, summed over the d features
    mse_per_feature: float  # the same divided by d
    cosine: float | None  # mean cosine of x and x^ over rows with x != 0 (0 for a row with x^ = 0)
    l2_ratio: float | None  # mean of ||x^|| / ||x|| over rows with x != 0
    relative_bias: float | None  # E ||x^||^2 / E (x . x^): above 1 too long, below 1 too short
    normalised_mse: float | None  # mean of ||x - x^||^2 / ||x||^2 over rows with x != 0


@register
class Reconstruction(Metric):
    """How well held-out rows are reconstructed. `count` accumulates batches for `scores`."""

    name = "reconstruction"
    needs = ("rows",)
    figures = (
        Figure("fvu", "FVU", "share of variance left unexplained, against the data set's mean", "low"),
        Figure("explained_variance", "explained variance", "1 - FVU", "high", "evaluation", share=True),
        Figure("explained_variance_features", "explained variance of a feature", "mean over the values of a row of 1 - FVU of each by itself", "high", "evaluation", share=True),
        Figure("cosine", "cosine", "mean cosine of a row and its reconstruction", "high", "evaluation"),
        Figure("l2_ratio", "length of reconstructions", "mean over rows of the length of the reconstruction over the row's", None, "evaluation"),
        Figure("relative_bias", "relative bias (gamma)", "E |reconstruction|^2 / E (row . reconstruction): below 1 it is too short (shrinkage)", None, "evaluation"),
        Figure("normalised_mse", "normalised squared error", "mean over rows of squared error / squared norm", "low", "studies"),
        Figure("mse", "squared error", "squared error a feature, in the data's units", "low", "studies"),
        Figure("rows", "held-out rows", "held-out rows judged", amount=True),
    )  # fmt: skip

    def __init__(self) -> None:
        self._totals: _Totals | None = None

    def update(self, batch: Encoded) -> None:
        self.count(batch.y, batch.y_hat)

    def result(self) -> dict[str, Value]:
        found = self.scores()
        return {
            "fvu": found.fvu, "explained_variance": found.explained_variance,
            "explained_variance_features": found.explained_variance_features, "cosine": found.cosine,
            "l2_ratio": found.l2_ratio, "relative_bias": found.relative_bias, "normalised_mse": found.normalised_mse,
            "mse": found.mse_per_feature, "rows": found.rows,
        }  # fmt: skip

    def details(self) -> dict[str, Any]:
        return {"reconstruction": asdict(self.scores()), "explained_variance_by_feature": self._by_feature()}

    def count(self, x: Tensor, x_hat: Tensor) -> None:
        """Count a batch of targets and reconstructions, both [B, d]."""
        assert x.ndim == 2 and x.shape == x_hat.shape, (x.shape, x_hat.shape)
        if len(x):
            batch = _Totals.of(in_float64(x), in_float64(x_hat))
            self._totals = batch if self._totals is None else self._totals.merged(batch)

    def scores(self) -> ReconstructionScores:
        """The scores of all rows so far. Raises ValueError when there were none."""
        totals = self._checked()
        length_hat, dot, there, cosine, ratio, relative = totals.sums.tolist()
        error, variance = totals.errors.sum().item(), totals.deviations.sum().item()
        fvu = _ratio(error, variance)
        by_feature = [one for one in self._by_feature() if one is not None]
        return ReconstructionScores(
            rows=totals.rows,
            fvu=fvu,
            explained_variance=None if fvu is None else 1 - fvu,
            explained_variance_features=sum(by_feature) / len(by_feature) if by_feature else None,
            mse=error / totals.rows,
            mse_per_feature=error / totals.rows / len(totals.errors),
            cosine=_ratio(cosine, there),
            l2_ratio=_ratio(ratio, there),
            relative_bias=_ratio(length_hat, dot),
            normalised_mse=_ratio(relative, there),
        )

    def explained_variance_per_feature(self) -> Tensor:
        """float64 [d]: 1 - FVU of each feature by itself; nan where the feature never varied."""
        totals = self._checked()
        return 1 - torch.where(totals.deviations > 0, totals.errors / totals.deviations, torch.nan)

    def _by_feature(self) -> list[float | None]:
        """The same as JSON has it."""
        return [one if math.isfinite(one) else None for one in self.explained_variance_per_feature().tolist()]

    def _checked(self) -> _Totals:
        if self._totals is None:
            raise ValueError("no rows to score")
        return self._totals


@dataclass(frozen=True)
class _Totals:
    """Sums over some rows, float64."""

    rows: int
    mean: Tensor  # [d], of x
    deviations: Tensor  # [d], sum of (x - mean)^2
    errors: Tensor  # [d], sum of (x - x^)^2
    # sums of x^ . x^ and x . x^ over rows; of 1, cosine, ||x^|| / ||x||, ||x - x^||^2 / ||x||^2 over rows with x != 0
    sums: Tensor  # [6]

    @classmethod
    def of(cls, x: Tensor, x_hat: Tensor) -> _Totals:
        squares = (x - x_hat).square()
        norm, norm_hat = x.norm(dim=1), x_hat.norm(dim=1)
        dot, length_hat = torch.linalg.vecdot(x, x_hat), torch.linalg.vecdot(x_hat, x_hat)
        cosine = torch.where(norm_hat > 0, dot / (norm * norm_hat), 0.0)
        relative = torch.stack([torch.ones_like(norm), cosine, norm_hat / norm, squares.sum(1) / norm.square()])
        over_there = torch.where(norm > 0, relative, 0.0).sum(1)  # elsewhere they are nan or infinite
        mean = x.mean(0)
        sums = torch.cat([torch.stack([length_hat.sum(), dot.sum()]), over_there])
        return cls(len(x), mean, (x - mean).square().sum(0), squares.sum(0), sums)

    def merged(self, other: _Totals) -> _Totals:
        rows = self.rows + other.rows
        apart = other.mean - self.mean
        return _Totals(
            rows,
            self.mean + apart * (other.rows / rows),
            self.deviations + other.deviations + apart.square() * (self.rows * other.rows / rows),
            self.errors + other.errors,
            self.sums + other.sums,
        )


def in_float64(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).detach().double()


def _ratio(above: float, below: float) -> float | None:
    return above / below if below != 0 else None
