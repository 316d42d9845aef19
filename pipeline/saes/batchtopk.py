"""BatchTopK: keep the k * B largest pre-activations of a batch of B (Bussmann et al. 2024, arXiv 2412.06410)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from . import auxk
from .base import register
from .batch_threshold import BatchThreshold, BatchThresholdConfig
from .losses import LossInputs


class BatchTopKConfig(BatchThresholdConfig):
    """BatchTopK with AuxK."""

    arch: Literal["batchtopk"] = Field("batchtopk", description="architecture")


@final
@register
class BatchTopK(BatchThreshold):
    """The k largest pre-activations per input on average over a batch, with AuxK; a threshold at inference.

    f = ReLU(p) where p is among the k B largest of the batch; at inference p where p > theta.
    """

    config_type = BatchTopKConfig
    config: BatchTopKConfig

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        return auxk.term(self, batch)
