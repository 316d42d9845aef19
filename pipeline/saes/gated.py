"""Gated SAE: a gate decides which latents are active (Rajamanoharan, Conmy et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from . import latents, penalties
from .base import register
from .config import Clock, DecoderNorm, Steps, other_default, ramp
from .dictionary import Weights
from .encoder import Preactivations
from .inference import GatedRule
from .losses import LossInputs
from .penalties import PenaltyConfig
from .steering import Steered
from .uncounted import Asked, Uncounted


class GatedConfig(PenaltyConfig):
    """Gate and magnitude with tied weights, an L1 penalty on the gate, and an auxiliary reconstruction through it."""

    half_products = True
    arch: Literal["gated"] = Field("gated", description="architecture")
    decoder_norm: DecoderNorm = other_default("decoder_norm", "free")
    gate_to_decoder: Steps = Field(
        0.3,
        ge=0,
        description="steps over which the reconstruction through the gate trains the decoder, too, at first with all "
        "of its gradient, then with less and less; below 1, a share of the training; 0: never, as published",
    )

    def decoder_share(self, clock: Clock) -> float:
        """What part of its gradient the reconstruction through the gate gives the decoder in this step."""
        return 1 - ramp(self.gate_to_decoder, clock)


@final
@register
class Gated(Steered):
    """A gate that decides which latents are active and a magnitude path that decides how strongly.

    pi = (x - b_dec) W_enc + b_gate; f = ReLU(exp(r_mag) (pi - b_gate) + b_mag) where pi > 0. The penalty and an
    auxiliary squared error, decoded with the dictionary taken as given (but at the beginning, see `gate_to_decoder`),
    are those of ReLU(pi). b_enc is b_gate.
    """

    config_type = GatedConfig
    config: GatedConfig
    latent_units = ("b_enc", "b_mag")
    gain = 20.0  # as good on models' rows, better on planted ones
    r_mag: Tensor
    b_mag: Tensor

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self._bias("b_mag", self.d_sae, learned=self.config.encoder_bias)

    @property
    def rule(self) -> GatedRule:
        return GatedRule(self.r_mag, self.b_mag)

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked | None:
        if self.config.decoder_share(clock):  # entries decode gates with the dictionary as it is given
            return None
        gain = self.r_mag.exp()
        found = penalties.asked(self.config.penalty, weights.W_dec.detach())
        return found._replace(gain=gain, offset=self.b_mag - gain * pre.bias, gates=True)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        gate, W_dec = batch.latents, batch.W_dec.detach()
        if isinstance(gate, Uncounted):
            decoded = gate.gates
        else:
            assert gate.preactivations is not None
            gate = replace(gate, values=gate.preactivations.relu())
            share = self.config.decoder_share(batch.clock)
            decoded = latents.decode(gate, W_dec + share * (batch.W_dec - W_dec) if share else W_dec)
        through_gate = decoded + self._past_latents(gate).detach()
        return {
            "l1": self.weight(batch.clock) * penalties.l1(self.config.penalty, gate, batch, W_dec),
            "gate": self.squared_error(through_gate, batch.y),
        }

    def latent_parameters(self) -> dict[str, nn.Parameter]:
        return super().latent_parameters() | self._learned("r_mag", "b_mag")

    def _reset(self, which: Tensor) -> None:
        for parameter in (self.b_enc, self.b_mag, self.r_mag):
            parameter[which] = 0
