"""TopK: keep the k largest pre-activations of every input (Gao et al. 2024, arXiv 2406.04093; Makhzani & Frey 2013)."""

from __future__ import annotations

from typing import Any, Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor

from .auxk import auxk_loss, default_k
from .base import SAE, register
from .config import Config
from .encoder import Preactivations
from .latents import Latents
from .losses import Batch


class TopKConfig(Config):
    """TopK with AuxK."""

    arch: Literal["topk"] = Field("topk", description="architecture")
    k: int = Field(32, ge=1, description="latents kept per input")
    aux_coefficient: float = Field(
        1 / 32, ge=0, description="weight of AuxK, in which dead latents reconstruct the residual; 0: off"
    )
    aux_k: int | None = Field(
        None, ge=1, description="dead latents AuxK uses per input; unset: half the width, rounded to a power of two"
    )

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k: {self.k} latents per input, but d_sae: {self.d_sae} in all; lower k or raise d_sae")
        return self


@final
@register
class TopK(SAE):
    """The k largest pre-activations of every input, with AuxK for dead latents.

    f = ReLU(the k largest of p), exactly k chosen whatever the ties; L0 is below k where fewer are positive.
    """

    config_type = TopKConfig
    config: TopKConfig

    def _activate(self, pre: Preactivations) -> Latents:
        return pre.topk(self.config.k).map(Tensor.relu)

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        if self.config.aux_coefficient == 0:
            return {}
        k_aux = self.config.aux_k or default_k(self.d_out)
        auxk = auxk_loss(batch.pre, self.dead(), k_aux, batch.y, batch.y_hat, self.W_dec)
        return {"auxk": self.config.aux_coefficient * auxk}

    def _saelens(self) -> dict[str, Any]:
        name = "topk_transcoder" if self.is_transcoder else "topk"
        return {"architecture": name, "k": self.config.k, "rescale_acts_by_decoder_norm": False}
