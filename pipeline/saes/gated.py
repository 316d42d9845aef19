"""Gated SAE: a gate decides which latents are active (Rajamanoharan, Conmy et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from . import latents
from .base import register
from .inference import GatedRule
from .losses import LossInputs
from .penalties import PenaltyConfig, l1
from .steering import Steered


class GatedConfig(PenaltyConfig):
    """Gate and magnitude with tied weights, an L1 penalty on the gate, and an auxiliary reconstruction through it."""

    arch: Literal["gated"] = Field("gated", description="architecture")


@final
@register
class Gated(Steered):
    """A gate that decides which latents are active and a magnitude path that decides how strongly.

    pi = (x - b_dec) W_enc + b_gate; f = ReLU(exp(r_mag) (pi - b_gate) + b_mag) where pi > 0. The penalty and an
    auxiliary squared error, decoded with the dictionary taken as given, are those of ReLU(pi). b_enc is b_gate.
    """

    config_type = GatedConfig
    config: GatedConfig
    latent_units = ("b_enc", "b_mag")
    r_mag: Tensor
    b_mag: Tensor

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self._bias("b_mag", self.d_sae, learned=self.config.encoder_bias)

    @property
    def rule(self) -> GatedRule:
        return GatedRule(self.r_mag, self.b_mag)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        assert batch.latents.preactivations is not None
        W_dec = batch.W_dec.detach()
        gate = replace(batch.latents, values=batch.latents.preactivations.relu())
        through_gate = latents.decode(gate, W_dec) + self._past_latents(gate).detach()
        return {
            "l1": self.weight(batch.clock) * l1(self.config.penalty, gate, batch, W_dec),
            "gate": self.squared_error(through_gate, batch.y),
        }

    def latent_parameters(self) -> dict[str, nn.Parameter]:
        return super().latent_parameters() | self._learned("r_mag", "b_mag")

    def _reset(self, which: Tensor) -> None:
        for parameter in (self.b_enc, self.b_mag, self.r_mag):
            parameter[which] = 0
