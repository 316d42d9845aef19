"""ReLU with an L1 penalty, in the three forms in use (Bricken et al. 2023; Anthropic, April 2024 update; gpt_sae)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from . import penalties
from .base import register
from .config import Clock, Config, DecoderNorm
from .dictionary import Weights
from .encoder import Preactivations
from .inference import ReLURule
from .losses import LossInputs
from .penalties import PenaltyConfig
from .steering import Steered
from .uncounted import Asked


class L1Config(PenaltyConfig):
    """ReLU and an L1 penalty."""

    half_products = True
    arch: Literal["l1"] = Field("l1", description="architecture")
    decoder_norm: DecoderNorm = Field("free", description=Config.model_fields["decoder_norm"].description)


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

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked:
        return penalties.asked(self.config.penalty, weights.W_dec)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        penalty = penalties.l1(self.config.penalty, batch.latents, batch, batch.W_dec)
        return {"l1": self.weight(batch.clock) * penalty}
