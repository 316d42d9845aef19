"""Shifted ReLU: a fixed soft threshold, without a learned one; what some studies call JumpReLU (exploring SAEs)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from . import penalties
from .base import register
from .config import Clock
from .dictionary import Weights
from .encoder import Preactivations
from .inference import Formula, ReLURule
from .latents import Latents
from .losses import LossInputs
from .penalties import PenaltyConfig
from .steering import Steered, SteeredConfig
from .uncounted import Asked


class ShiftedReLUConfig(PenaltyConfig):
    """ReLU of what exceeds a fixed shift; no penalty unless asked for."""

    arch: Literal["shifted_relu"] = Field("shifted_relu", description="architecture")
    shift: float = Field(0.1, ge=0, description="what is taken from every pre-activation before ReLU")
    target_l0: float | None = Field(None, gt=0, description=SteeredConfig.model_fields["target_l0"].description)
    coefficient: float = Field(0.0, ge=0, description=PenaltyConfig.model_fields["coefficient"].description)


@final
@register
class ShiftedReLU(Steered):
    """ReLU of the pre-activations less a fixed shift, which shrinks what stays active; an L1 penalty if asked for.

    f = ReLU(p - s).
    """

    config_type = ShiftedReLUConfig
    config: ShiftedReLUConfig
    latent_units = ("b_enc", "shift")
    shift: Tensor

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        self.register_buffer("shift", torch.tensor(self.config.shift))

    @property
    def rule(self) -> ReLURule:
        return ReLURule()

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        return pre.above_threshold(self.shift).map(lambda p: (p - self.shift).relu())

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked:
        shift = self.shift.expand(self.d_sae)
        found = penalties.asked(self.config.penalty, weights.W_dec) if self.config.coefficient else Asked()
        return found._replace(theta=shift, gain=torch.ones_like(shift), offset=-shift)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        if self.config.coefficient == 0:
            return {}
        penalty = penalties.l1(self.config.penalty, batch.latents, batch, batch.W_dec)
        return {"l1": self.weight(batch.clock) * penalty}

    def _written(self) -> Formula:
        # a plain ReLU with the shift in its bias: what every tool can run
        return replace(super()._written(), b_enc=self.b_enc - self.shift)

    def _take(self, formula: Formula) -> None:
        self.shift.zero_()
