"""Johnson-Lindenstrauss SAE: near-orthogonal directions in the place of a penalty on activations (gpt_sae)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from .base import SAE, register
from .coherence import CoherenceConfig, jl_term
from .config import BiasStart, Reduction, other_default
from .inference import ReLURule
from .losses import LossInputs


class JLConfig(CoherenceConfig):
    """ReLU and the Johnson-Lindenstrauss penalty, without biases and on the squared error averaged over features."""

    arch: Literal["jl"] = Field("jl", description="architecture")
    b_dec_init: BiasStart = other_default("b_dec_init", "none")
    pre_encoder_bias: bool = other_default("pre_encoder_bias", False)
    encoder_bias: bool = other_default("encoder_bias", False)
    reduction: Reduction = other_default("reduction", "mean_d")


@final
@register
class JL(SAE):
    """ReLU with the Johnson-Lindenstrauss penalty on the dictionary's angles; not sparse by itself.

    f = ReLU(p); the term is c(t) sqrt(d) / m^2 sum_{i != j} atanh |a_i . a_j| over unit rows a.
    """

    config_type = JLConfig
    config: JLConfig

    @property
    def rule(self) -> ReLURule:
        return ReLURule()

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        generator = self.generator("jl", batch.clock.step)
        return {"jl": jl_term(self.config, self.W_dec, self.W_enc_rows, generator, batch.clock)}
