"""Crosscoder: one set of latents that reads several stores and reconstructs all of them (Lindsey et al. 2024; with
BatchTopK, Minder et al. 2025, arXiv 2504.02922).

Stores are layers of a model, or the same layer of two models (model diffing). A latent i counts by
f_i sum_l ||W_dec_i,l||, the sum over stores l of its decoders' norms: that is what the L1 penalty adds up, and what
BatchTopK chooses by. The sum, unlike the norm of all of the row, asks more of a latent the more stores have it, so that
one of a single store costs no more than it would there.
"""

from __future__ import annotations

from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor

from . import auxk, penalties
from .base import register
from .batch_threshold import BatchThreshold, BatchThresholdConfig
from .batchtopk import BatchTopKConfig
from .config import Clock, Config
from .dictionary import Weights
from .encoder import Preactivations
from .inference import ReLURule
from .latents import Latents
from .losses import LossInputs, SparseLosses
from .steering import Steered, SteeredConfig
from .uncounted import Asked
from .ways import WaysConfig


class CrosscoderConfig(WaysConfig, BatchThresholdConfig, SteeredConfig):
    """A crosscoder of several stores."""

    ways: ClassVar[dict[str, type[Config]]] = {"batchtopk": BatchTopKConfig, "l1": SteeredConfig}

    arch: Literal["crosscoder"] = Field("crosscoder", description="architecture")
    sparsity: Literal["batchtopk", "l1"] = Field(
        "batchtopk",
        description="the k largest of a batch on average, or an L1 penalty, each weighed by the sum of decoder norms; "
        "unset: as the other settings mean",
    )
    encoder_scale: float = Field(0.3, gt=0, description=Config.model_fields["encoder_scale"].description)
    decoder_norm: Literal["free"] = Field(
        "free",
        description="decoder rows: left free, a latent counting by its value times the sum of its decoders' norms",
    )

    @property
    def steered(self) -> bool:
        return super().steered and self.sparsity == "l1"


@final
@register
class Crosscoder(BatchThreshold, Steered):
    """One set of latents over several stores, each with an encoder and a decoder for every store.

    p = b_enc + sum over stores of (x_l - b_dec_l) W_enc_l; of g_i = sum_l ||W_dec_i,l|| and f = ReLU(p), batchtopk
    keeps the k B entries of a batch that are largest in f_i g_i (at inference those above a threshold), and l1
    penalises these.
    """

    config_type = CrosscoderConfig
    config: CrosscoderConfig

    def _build(self, generator: torch.Generator) -> None:
        BatchThreshold._build(self, generator)
        Steered._build(self, generator)

    @property
    def _penalised(self) -> bool:
        return self.config.sparsity == "l1"

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        return ReLURule()(pre) if self._penalised else super()._activate(pre, clock)

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked | None:
        return penalties.asked("plain", weights.W_dec) if self._penalised else None

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        if not self._penalised:
            return auxk.term(self, batch)
        return {"l1": self.weight(batch.clock) * penalties.l1("plain", batch.latents, batch, batch.W_dec)}

    def _observe(self, losses: SparseLosses) -> Tensor:
        return (Steered if self._penalised else BatchThreshold)._observe(self, losses)

    def _update(self, seen: Tensor, clock: Clock) -> None:
        (Steered if self._penalised else BatchThreshold)._update(self, seen, clock)
