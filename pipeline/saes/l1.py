"""ReLU with an L1 penalty, in the three forms in use (Bricken et al. 2023; Anthropic, April 2024 update; gpt_sae)."""

from __future__ import annotations

from typing import Any, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .base import SAE, register
from .config import Config, ramp
from .encoder import Preactivations
from .latents import Latents
from .losses import Batch


class L1Config(Config):
    """ReLU and an L1 penalty."""

    arch: Literal["l1"] = Field("l1", description="architecture")
    penalty: Literal["plain", "decoder_norm", "per_token"] = Field(
        "plain",
        description="what is summed over a row's latents f: f (plain), f times the norm of its decoder row, "
        "or f over the input's norm (per_token)",
    )
    coefficient: float = Field(
        5.0, ge=0, description="weight of the penalty, whatever the reduction of the squared error"
    )
    warmup: float = Field(
        0.05, ge=0, description="steps over which the coefficient rises from 0; below 1, a share of the training"
    )

    @model_validator(mode="after")
    def _penalty_holds(self) -> Self:
        if self.decoder_norm == "free" and self.penalty != "decoder_norm":
            raise ValueError(
                f"penalty: {self.penalty} vanishes as rows grow under decoder_norm: free; use penalty: decoder_norm"
            )
        return self


@final
@register
class L1(SAE):
    """ReLU with an L1 penalty: plain, weighted by decoder norms, or per token.

    f = ReLU(p); the term is the coefficient times the mean over the batch of each row's penalty.
    """

    config_type = L1Config
    config: L1Config

    def _activate(self, pre: Preactivations) -> Latents:
        return pre.positive()

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        match self.config.penalty:
            case "plain":
                sums = batch.latents.total()
            case "decoder_norm":
                sums = batch.latents.total(torch.linalg.vector_norm(self.W_dec, dim=1))
            case "per_token":
                norms = torch.linalg.vector_norm(batch.x, dim=1)
                sums = batch.latents.total() / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        return {"l1": self.config.coefficient * ramp(self.config.warmup, batch.clock) * sums.mean()}

    def _saelens(self) -> dict[str, Any]:
        return {"architecture": "transcoder" if self.is_transcoder else "standard"}
