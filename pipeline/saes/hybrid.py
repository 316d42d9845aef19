"""Hybrid SAE: an L1 penalty on activations and the Johnson-Lindenstrauss penalty on directions (gpt_sae)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from . import penalties
from .base import register
from .coherence import CoherenceConfig, jl_term
from .config import Clock, Reduction, Steps, other_default
from .dictionary import Weights
from .encoder import Preactivations
from .inference import ReLURule
from .losses import LossInputs
from .penalties import PenaltyConfig
from .steering import Steered, SteeredConfig
from .uncounted import Asked


class HybridConfig(PenaltyConfig, CoherenceConfig):
    """ReLU and both penalties, on the squared error averaged over features."""

    arch: Literal["hybrid"] = Field("hybrid", description="architecture")
    penalty: penalties.Form = Field("per_token", description=PenaltyConfig.model_fields["penalty"].description)
    coefficient: float = Field(0.1, ge=0, description=PenaltyConfig.model_fields["coefficient"].description)
    target_l0: float | None = Field(None, gt=0, description=SteeredConfig.model_fields["target_l0"].description)
    warmup: Steps = Field(2000, ge=0, description=PenaltyConfig.model_fields["warmup"].description)
    reduction: Reduction = other_default("reduction", "mean_d")


@final
@register
class Hybrid(Steered):
    """ReLU with an L1 penalty and the Johnson-Lindenstrauss penalty.

    f = ReLU(p); the terms are those of `l1` and of `jl`.
    """

    config_type = HybridConfig
    config: HybridConfig

    @property
    def rule(self) -> ReLURule:
        return ReLURule()

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked:
        return penalties.asked(self.config.penalty, weights.W_dec)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        penalty = penalties.l1(self.config.penalty, batch.latents, batch, batch.W_dec)
        generator = self.generator("jl", batch.clock.step)
        return {
            "l1": self.weight(batch.clock) * penalty,
            "jl": jl_term(self.config, self.W_dec, self.W_enc_rows, generator, batch.clock),
        }
