"""Gated SAE: a gate decides which latents are active (Rajamanoharan, Conmy et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from . import latents
from .base import SAE, register
from .config import Clock
from .encoder import Preactivations
from .latents import Latents
from .losses import Batch
from .penalties import PenaltyConfig, l1


class GatedConfig(PenaltyConfig):
    """Gate and magnitude with tied weights, an L1 penalty on the gate, and an auxiliary reconstruction through it."""

    arch: Literal["gated"] = Field("gated", description="architecture")


@final
@register
class Gated(SAE):
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
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))
        self._bias("b_mag", self.d_sae, learned=self.config.encoder_bias)

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        gates = pre.above(0.0)
        pi, gain = gates.values, gates.each(self.r_mag.exp())
        magnitudes = gain * (pi - gates.each(self.b_enc)) + gates.each(self.b_mag)
        return replace(gates, values=magnitudes.relu() * (pi > 0), before=pi)

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.latents.before is not None
        gate = replace(batch.latents, values=batch.latents.before.relu())
        through_gate = latents.decode(gate, self.W_dec.detach()) + self.b_dec.detach()
        return {
            "l1": self.config.coefficient_at(batch.clock) * l1(self.config.penalty, gate, batch, self.W_dec.detach()),
            "gate": self.squared_error(through_gate, batch.y),
        }

    def _reset(self, which: Tensor) -> None:
        for parameter in (self.b_enc, self.b_mag, self.r_mag):
            parameter[which] = 0

    def _export(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {"b_gate": tensors.pop("b_enc"), "b_mag": self.b_mag, "r_mag": self.r_mag}
        return tensors | own

    def _import(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in ("b_mag", "r_mag"):
            getattr(self, name).copy_(tensors.pop(name))
        return tensors | {"b_enc": tensors.pop("b_gate")}

    def _saelens(self) -> dict[str, Any]:
        return {"architecture": "gated_transcoder" if self.is_transcoder else "gated"}
