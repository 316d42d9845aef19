"""A variational SAE with the prior N(0, I): every latent by itself (Kingma & Welling 2014, on a dictionary)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from .base import register
from .variational import Variational, VariationalConfig, gaussian


class VSAEIsoConfig(VariationalConfig):
    """Gaussian latents with the prior N(0, I)."""

    arch: Literal["vsae_iso"] = Field("vsae_iso", description="architecture")


@final
@register
class VSAEIso(Variational):
    """Variational: latents are Gaussians, with the prior N(0, I).

    The KL is 1/2 sum_i (mu_i^2 + sigma_i^2 - 1 - log sigma_i^2).
    """

    config_type = VSAEIsoConfig
    config: VSAEIsoConfig

    def marginals(self, mean: Tensor, variance: Tensor) -> Tensor:
        return gaussian(mean, variance)
