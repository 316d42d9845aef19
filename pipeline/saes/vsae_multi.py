"""A variational SAE whose prior is a Gaussian with correlations, N(0, Sigma).

Equicorrelated, Sigma = (1 - rho) I + rho 11^T, no [m, m] matrix is made: Sigma has the eigenvalue 1 + (m - 1) rho along
1 and 1 - rho across, so a mean mu costs its part along 1 and its part across by themselves. (The difference of two
sums, a |mu|^2 - b (1^T mu)^2, is the same, but at 8192 latents little of it is left in float32.) A covariance of the
first n latents may be given instead, and the others are N(0, 1): by its Cholesky factor L, computed in float64, the
quadratic form is |L^-1 mu|^2.
"""

from __future__ import annotations

import math
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .base import register
from .variational import Variational, VariationalConfig, gaussian

LEAST = 1e-6
"""Smallest eigenvalue of a covariance as a share of its largest: below it a float32 has nothing to say."""


class VSAEMultiConfig(VariationalConfig):
    """Gaussian latents with correlations."""

    arch: Literal["vsae_multi"] = Field("vsae_multi", description="architecture")
    correlation: float = Field(0.5, gt=-1, lt=1, description="prior correlation of any two latents")
    covariance: tuple[tuple[float, ...], ...] | None = Field(
        None,
        description="prior covariance of the first latents, a list of rows, the others being independent; "
        "unset: correlation says it",
    )
    shrink: float = Field(
        0.0, ge=0, lt=1, description="share that is taken from what lies beside the diagonal of covariance"
    )

    @model_validator(mode="after")
    def _a_covariance(self) -> Self:
        if self.covariance is None:
            if self.correlation * (self.d_sae - 1) <= -1:
                raise ValueError(
                    f"correlation: {self.correlation} of any two cannot be among d_sae: {self.d_sae} latents; it is "
                    f"above {-1 / (self.d_sae - 1):.3g}"
                )
            return self
        n = len(self.covariance)
        if not 0 < n <= self.d_sae or any(len(row) != n for row in self.covariance):
            raise ValueError(f"covariance: is not n rows of n numbers, n from 1 to d_sae: {self.d_sae}")
        given = torch.tensor(self.covariance, dtype=torch.float64)
        if not bool(given.isfinite().all()) or not torch.allclose(given, given.T, rtol=1e-6, atol=0):
            raise ValueError("covariance: is not symmetric, or not finite")
        if not bool((given.diagonal() > 0).all()):
            raise ValueError("covariance: a variance on its diagonal is not above 0")
        if not _invertible(self.shrunk(self.shrink)):
            shares = (hundredths / 100 for hundredths in range(1, 100))
            enough = next((share for share in shares if _invertible(self.shrunk(share))), None)
            cure = "which no shrink mends" if enough is None else f"which shrink: {enough} mends"
            raise ValueError(f"covariance: has an eigenvalue that is not above 0, or not by much, {cure}")
        return self

    def shrunk(self, share: float) -> Tensor:
        """The covariance float64 [n, n] less a share of what lies beside its diagonal."""
        given = torch.tensor(self.covariance, dtype=torch.float64)
        symmetric = (given + given.T) / 2
        return torch.lerp(symmetric, symmetric.diagonal().diag(), share)


def _invertible(sigma: Tensor) -> bool:
    values = torch.linalg.eigvalsh(sigma)
    return bool(values[0] > LEAST * values[-1])


@final
@register
class VSAEMulti(Variational):
    """Variational: latents are Gaussians, with the prior N(0, Sigma) in which they correlate.

    The KL of a row is 1/2 (tr(Sigma^-1 diag(sigma^2)) + mu^T Sigma^-1 mu - m + log det Sigma - sum_i log sigma_i^2).
    """

    config_type = VSAEMultiConfig
    config: VSAEMultiConfig
    whitening: Tensor
    precision: Tensor
    variances: Tensor
    logdet: Tensor

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        if self.config.covariance is None:
            return
        sigma = self.config.shrunk(self.config.shrink)
        factor = torch.linalg.cholesky(sigma)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(sigma), dtype=sigma.dtype), upper=False)
        self.register_buffer("whitening", inverse.float().contiguous())  # L^-1 [n, n]
        self.register_buffer("precision", inverse.square().sum(0).float())  # diagonal of Sigma^-1 [n]
        self.register_buffer("variances", sigma.diag().float())  # [n]
        self.register_buffer("logdet", (2 * factor.diagonal().log().sum()).float())

    def cross_entropy(self, mean: Tensor, variance: Tensor) -> Tensor:
        if self.config.covariance is None:
            m, rho = self.d_sae, self.config.correlation
            across, along = 1 - rho, 1 + (m - 1) * rho
            middle = mean.mean(1, keepdim=True)
            quadratic = (mean - middle).square().sum(1) / across + m * middle.square().view(-1) / along
            trace = variance.sum(1) * ((m - 1) / across + 1 / along) / m
            return 0.5 * (quadratic + trace + (m - 1) * math.log(across) + math.log(along))
        n = len(self.whitening)
        quadratic = (mean[:, :n] @ self.whitening.T).square().sum(1)
        known = 0.5 * (quadratic + variance[:, :n] @ self.precision + self.logdet)
        return known + gaussian(mean[:, n:], variance[:, n:]).sum(1)

    def prior_covariance(self, count: int) -> Tensor:
        found = super().prior_covariance(count)
        if self.config.covariance is None:
            return found.masked_fill(found == 0, self.config.correlation)
        given = self.config.shrunk(self.config.shrink)[:count, :count]
        found[: len(given), : len(given)] = given
        return found

    def marginals(self, mean: Tensor, variance: Tensor) -> Tensor:
        if self.config.covariance is None:
            return gaussian(mean, variance)
        n = len(self.whitening)
        known = gaussian(mean[:, :n], variance[:, :n], std=self.variances.sqrt())
        return torch.cat([known, gaussian(mean[:, n:], variance[:, n:])], 1)
