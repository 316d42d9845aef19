"""VAE: a variational autoencoder of rows (Kingma & Welling 2014; beta: Higgins 2017; free bits: Kingma et al. 2016).

Its codes are Gaussians with means and variances from a linear encoder or one with a hidden layer, few or many, and all
of them act in every row. So it is placed beside sparse dictionaries by its bits, not by L0.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from .base import register
from .config import FINISHED, Clock, Steps, ramp
from .latents import Latents
from .losses import Losses, PlainLosses
from .scaled import Scaled, ScaledConfig, encoder, linear
from .variational import LOGVAR, Posterior, gaussian


class GaussianConfig(ScaledConfig):
    """Settings of Gaussian codes and of their KL's weight."""

    units: int = Field(32, ge=1, description="Gaussian codes (of each group)")
    beta: float = Field(1.0, ge=0, description="weight of the KL in nats a row; 1 is the bound on the likelihood")
    beta_warmup: Steps = Field(
        0.3, ge=0, description="steps over which beta rises from 0; below 1, a share of the training"
    )
    sigma: Literal["learned", "one"] = Field(
        "learned",
        description="deviation of rows about their reconstruction: a number that is learned, for a loss in nats, or 1, "
        "for half the squared error as it is",
    )

    @model_validator(mode="after")
    def _nats_are_summed(self) -> GaussianConfig:
        if self.sigma == "learned" and self.reduction != "sum_d":
            raise ValueError(
                f"sigma: learned is for a loss in nats, summed over features, and reduction: {self.reduction} is no "
                "such; take sigma: one, or sum_d"
            )
        return self


class VAEConfig(GaussianConfig):
    """Gaussian codes under N(0, 1)."""

    arch: Literal["vae"] = Field("vae", description="architecture")
    free_bits: float = Field(0.0, ge=0, description="nats of each code in each row below which its KL costs the same")

    @property
    def latents(self) -> int:
        return self.units


class Gaussians(Scaled):
    """What Gaussian codes share: the likelihood of the rows, and the terms of the loss."""

    config: GaussianConfig

    def _register_sigma(self) -> None:
        if self.config.sigma == "learned":
            self.log_sigma = nn.Parameter(torch.zeros(()))

    def likelihood(self, y_hat: Tensor, y: Tensor) -> dict[str, Tensor]:
        """-log p(y | z) in nats a row, less d/2 log 2 pi, as terms; without a learned sigma half the squared error."""
        half = self.squared_error(y_hat, y) / 2
        if self.config.sigma == "one":
            return {"reconstruction": half}
        return {"reconstruction": half * (-2 * self.log_sigma).exp(), "sigma": self.d_out * self.log_sigma}

    def beta(self, clock: Clock) -> float:
        """The KL's weight at a step."""
        return self.config.beta * ramp(self.config.beta_warmup, clock)


@final
@register
class VAE(Gaussians):
    """Gaussian codes under a standard normal prior, a linear decoder, beta, free bits, and a deviation that is learned.

    L = ||y - y_hat||^2 / (2 s^2) + d log s + beta sum_i max(KL_i, free_bits), the mean over rows, KL_i being that of
    N(mu_i, sigma_i^2) from N(0, 1). Training decodes a draw, everything after it the means.
    """

    config_type = VAEConfig
    config: VAEConfig

    def __init__(self, config: VAEConfig, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__(config, d_in, d_out, seed)
        generator = torch.Generator().manual_seed(seed)
        self.encoder = encoder(d_in, config.hidden, 2 * config.units, generator)
        self.decoder = linear(config.units, self.d_out, generator)
        self.decoder.register_parameter("bias", None)  # which is b_dec
        self._register_sigma()

    @property
    def width(self) -> int:
        return self.config.units

    def posterior(self, x: Tensor) -> Posterior:
        """q(z | x) of rows [B, d_in] in the data's units."""
        mean, logvar = self.encoder(self._scaled(x)).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR))

    def kls(self, x: Tensor) -> Tensor:
        """[B, units]: the KL of each code from its prior, in nats."""
        return standard_kl(self.posterior(x))

    def unit_means(self, x: Tensor) -> Tensor:
        return self.posterior(x).mean

    def encode(self, x: Tensor) -> Latents:
        return Latents.of_dense(self.posterior(x).mean)

    def decode(self, codes: Latents) -> Tensor:
        return self._reconstruct(codes.dense()) / self.target_scale

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        y = self._target(x, target)
        posterior = self.posterior(x)
        z = posterior.mean
        if not clock.finished:
            z = z + posterior.variance.sqrt() * self.noise(len(x), self.width, clock, z)
        y_hat = self._reconstruct(z)
        kl = standard_kl(posterior).clamp_min(self.config.free_bits).sum(1).mean()
        terms = self.likelihood(y_hat, y) | {"kl": self.beta(clock) * kl}
        return PlainLosses(terms, clock, y_hat / self.target_scale)

    def _reconstruct(self, z: Tensor) -> Tensor:
        return self.decoder(z) + self.b_dec


def standard_kl(posterior: Posterior) -> Tensor:
    """[B, m]: KL(N(mean, variance) || N(0, 1)) of each code, in nats."""
    assert posterior.logvar is not None, "a code without a variance has no such number"
    return gaussian(posterior.mean, posterior.variance) - 0.5 * (1 + posterior.logvar)
