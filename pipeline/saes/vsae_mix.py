"""A variational SAE whose prior expects pairs: latents that come together, and latents of which one comes at a time.

The first 2 `correlated_pairs` latents are pairs (0, 1), (2, 3), ...; the 2 `anticorrelated_pairs` after them likewise;
all others have N(0, 1). With D(a, b) = N((a, b), std^2 I) the prior of a pair is

    mixture    correlated       pi D(s, s) + (1 - pi) N(0, I)
               anti-correlated  pi/2 D(s, 0) + pi/2 D(0, s) + (1 - pi) N(0, I)
    shifted    correlated D(s, s), anti-correlated D(s, -s): one Gaussian each, so that a pair ought always to be there

From a Gaussian to a mixture the KL has no closed form; -log sum_k pi_k exp(-KL_k) bounds it from above, and is exact
where there is no variance.
"""

from __future__ import annotations

import math
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import placement
from .base import register
from .variational import Variational, VariationalConfig, gaussian

Component = tuple[float, float, float, float]
"""Weight, the means of both members, standard deviation."""


class VSAEMixConfig(VariationalConfig):
    """Gaussian latents of which the first ones come in pairs."""

    arch: Literal["vsae_mix"] = Field("vsae_mix", description="architecture")
    prior: Literal["mixture", "shifted"] = Field(
        "mixture",
        description="prior of a pair: a mixture of being there and not, or a Gaussian about where it would be",
    )
    correlated_pairs: int = Field(2, ge=0, description="pairs of latents that are to come together, the first ones")
    anticorrelated_pairs: int = Field(
        1, ge=0, description="pairs of latents of which one is to come at a time, the next"
    )
    prior_shift: float = Field(1.0, ge=0, description="prior mean of a latent whose pair is there")
    prior_std: float = Field(1.0, gt=0, description="prior standard deviation of latents whose pair is there")
    presence: float = Field(0.1, gt=0, lt=1, description="prior probability that a pair is there, of the mixture")

    @property
    def pairs(self) -> int:
        """Pairs of both kinds."""
        return self.correlated_pairs + self.anticorrelated_pairs

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if 2 * self.pairs > self.d_sae:
            raise ValueError(
                f"correlated_pairs: {self.correlated_pairs} and anticorrelated_pairs: {self.anticorrelated_pairs} are "
                f"{2 * self.pairs} latents, but d_sae: {self.d_sae} in all; ask for fewer pairs or raise d_sae"
            )
        return self

    @model_validator(mode="after")
    def _means_are_reached(self) -> Self:
        if self.prior == "shifted" and self.mean == "relu" and self.anticorrelated_pairs and self.prior_shift:
            raise ValueError(
                f"prior: shifted has the mean {-self.prior_shift:g} for the second of an anti-correlated pair, which "
                "mean: relu does not reach; take mean: identity, prior: mixture or anticorrelated_pairs: 0"
            )
        return self

    def components(self, *, correlated: bool) -> tuple[Component, ...]:
        """The prior of a pair, as components of weights that add up to 1."""
        s, std, pi = self.prior_shift, self.prior_std, self.presence
        if self.prior == "shifted":
            return ((1.0, s, s if correlated else -s, std),)
        away = (1 - pi, 0.0, 0.0, 1.0)
        return ((pi, s, s, std), away) if correlated else ((pi / 2, s, 0.0, std), (pi / 2, 0.0, s, std), away)


@final
@register
class VSAEMix(Variational):
    """Variational: latents are Gaussians, the first ones in pairs with a mixture as prior, the others with N(0, 1).

    The KL of a pair is bounded by -log sum_k pi_k exp(-KL(q || p_k)).
    """

    config_type = VSAEMixConfig
    config: VSAEMixConfig

    def cross_entropy(self, mean: Tensor, variance: Tensor) -> Tensor:
        rest = slice(2 * self.config.pairs, None)
        total = gaussian(mean[:, rest], variance[:, rest]).sum(1)
        for pairs, components in self._priors():
            mu, var = mean[:, pairs].unflatten(1, (-1, 2)), variance[:, pairs].unflatten(1, (-1, 2))
            costs = [
                gaussian(mu, var, placement.numbers((one, other), mu), std).sum(2) - math.log(weight)
                for weight, one, other, std in components
            ]
            total = total - torch.logsumexp(-torch.stack(costs), 0).sum(1)
        return total

    def marginals(self, mean: Tensor, variance: Tensor) -> Tensor:
        found = gaussian(mean, variance)
        for pairs, components in self._priors():
            mu, var = mean[:, pairs], variance[:, pairs]
            costs = [
                gaussian(mu, var, placement.numbers((one, other), mu).repeat(mu.shape[1] // 2), std) - math.log(weight)
                for weight, one, other, std in components
            ]
            found = found.slice_scatter(-torch.logsumexp(-torch.stack(costs), 0), 1, pairs.start, pairs.stop)
        return found

    def prior_covariance(self, count: int) -> Tensor:
        found = super().prior_covariance(max(count, 2 * self.config.pairs))
        for pairs, components in self._priors():
            weight, *at, std = (torch.tensor(column, dtype=torch.float64) for column in zip(*components, strict=True))
            means = torch.stack(at)  # [2, components]
            middle = means @ weight
            spread = (weight * std.square()).sum() * torch.eye(2, dtype=torch.float64)
            of_pair = spread + (weight * means) @ means.T - middle[:, None] * middle
            for first in range(pairs.start, pairs.stop, 2):
                found[first : first + 2, first : first + 2] = of_pair
        return found[:count, :count]

    def _priors(self) -> list[tuple[slice, tuple[Component, ...]]]:
        """Which latents the pairs of each kind are, and their prior."""
        first, stop = 2 * self.config.correlated_pairs, 2 * self.config.pairs
        kinds = {True: slice(0, first), False: slice(first, stop)}
        return [(who, self.config.components(correlated=kind)) for kind, who in kinds.items() if who.stop > who.start]
