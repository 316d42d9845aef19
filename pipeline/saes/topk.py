"""TopK: keep the k largest pre-activations of every input (Gao et al. 2024, arXiv 2406.04093; Makhzani & Frey 2013)."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from . import auxk
from .base import SAE, register
from .config import Clock
from .encoder import Preactivations
from .fixed_k import FixedKConfig, ks_at
from .inference import TopKRule
from .latents import Latents
from .losses import LossInputs


class TopKConfig(FixedKConfig):
    """TopK with AuxK."""

    arch: Literal["topk"] = Field("topk", description="architecture")


@final
@register
class TopK(SAE):
    """The k largest pre-activations of every input, with AuxK for dead latents.

    f = ReLU(the k largest of p), exactly k chosen whatever the ties; L0 is below k where fewer are positive.
    """

    config_type = TopKConfig
    stacks = True
    config: TopKConfig

    @property
    def rule(self) -> TopKRule:
        return TopKRule(self.config.k)

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        return pre.topk(*ks_at(self, clock)).map(Tensor.relu)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        return auxk.term(self, batch)
