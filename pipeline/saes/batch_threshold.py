"""The part that architectures which choose over a whole batch share: the threshold that takes the batch's place
afterwards.

In training the k * B largest pre-activations of a batch are kept. What a row keeps then depends on the rows beside it,
which inference must not: there f = p where p exceeds theta, the running mean of the least value a batch kept.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from . import counting
from .base import SAE
from .config import Clock
from .encoder import Preactivations
from .fixed_k import FixedKConfig
from .inference import Formula, ThresholdRule
from .latents import Latents
from .losses import SparseLosses

MEMORY = 0.98
"""Weight of the past in the threshold; while fewer batches were seen, all count alike. A longer memory lags behind the
latents, which shrink as the learning rate falls: L0 would come out below k."""


class BatchThresholdConfig(FixedKConfig):
    """Settings of k over a batch."""

    threshold_start: int = Field(
        1000,
        ge=0,
        description="steps before the threshold is averaged, at most half of the training; it follows before",
    )


class BatchThreshold(SAE):
    """Selection over the batch in training mode, by the threshold in evaluation mode."""

    latent_units = ("b_enc", "threshold")
    config: BatchThresholdConfig
    threshold: Tensor
    threshold_batches: Tensor

    def _build(self, generator: torch.Generator) -> None:
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_batches", torch.zeros((), dtype=torch.int64))

    @property
    def rule(self) -> ThresholdRule:
        return ThresholdRule(self.threshold.expand(self.d_sae))

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        if not self.training:
            chosen = pre.above_threshold(self.threshold)
            return chosen.map(lambda p: p * (p > self.threshold))
        k = self.config.k_at(clock)
        return pre.batch_topk(k * pre.x.shape[0]).map(Tensor.relu)

    def _observe(self, losses: SparseLosses) -> Tensor:
        """The least value that was kept."""
        values = losses.latents.values.detach()
        if not values.numel():
            return values.new_full((1,), torch.nan)
        return counting.least(values)

    def _update(self, seen: Tensor, clock: Clock) -> None:
        start = min(self.config.threshold_start, clock.steps / 2)
        counting.lead_(self.threshold, self.threshold_batches, seen, clock.step >= start, 1 - MEMORY)

    def _take(self, formula: Formula) -> None:
        assert isinstance(formula.rule, ThresholdRule)
        self.threshold.copy_(formula.rule.threshold[0])
