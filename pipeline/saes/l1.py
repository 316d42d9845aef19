"""ReLU with an L1 penalty, in the three forms in use (Bricken et al. 2023; Anthropic, April 2024 update; gpt_sae)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from .base import register
from .inference import ReLURule
from .losses import LossInputs
from .penalties import PenaltyConfig, l1
from .steering import Steered


class L1Config(PenaltyConfig):
    """ReLU and an L1 penalty."""

    arch: Literal["l1"] = Field("l1", description="architecture")


@final
@register
class L1(Steered):
    """ReLU with an L1 penalty: plain, weighted by decoder norms, or per token.

    f = ReLU(p); the term is the coefficient times the mean over the batch of each row's penalty.
    """

    config_type = L1Config
    config: L1Config

    @property
    def rule(self) -> ReLURule:
        return ReLURule()

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        penalty = l1(self.config.penalty, batch.latents, batch, batch.W_dec)
        return {"l1": self.weight(batch.clock) * penalty}
