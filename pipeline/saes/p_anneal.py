"""p-annealing: an L1 penalty whose exponent falls below 1 in training (Karvonen et al. 2024, arXiv 2408.00113)."""

from __future__ import annotations

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from .base import register
from .config import Clock, DecoderNorm, Steps, other_default, steps_of
from .dictionary import Weights
from .encoder import Preactivations
from .inference import ReLURule
from .latents import Latents
from .losses import LossInputs, SparseLosses
from .steering import Steered, SteeredConfig
from .uncounted import Asked, Uncounted

SMALLEST = 1e-3
"""Added to a latent before it is raised to a power, whose slope at 0 is infinite."""


class PAnnealConfig(SteeredConfig):
    """ReLU and the sum of f^p, with p falling in stages from 1 and the coefficient following it."""

    arch: Literal["p_anneal"] = Field("p_anneal", description="architecture")
    decoder_norm: DecoderNorm = other_default("decoder_norm", "free")
    p_end: float = Field(0.2, gt=0, le=1, description="the last exponent")
    anneal_start: Steps = Field(
        0.3, ge=0, description="steps before p starts to fall; below 1, a share of the training"
    )
    stages: int = Field(10, ge=1, description="equal parts of the rest of the training, with p lower in each")

    def p_at(self, clock: Clock) -> float:
        """The exponent of this step."""
        start = steps_of(self.anneal_start, clock)
        if clock.step < start:
            return 1.0
        share = (clock.step - start) / max(1.0, clock.steps - start)
        stage = min(self.stages, int(share * self.stages) + 1)
        return 1.0 - (1.0 - self.p_end) * stage / self.stages


@final
@register
class PAnneal(Steered):
    """ReLU with a penalty on f^p, p falling from 1: closer to counting the active latents as training goes on.

    f = ReLU(p); the term is c times the mean over the batch of sum_i (f_i + s)^p - s^p with a tiny s. When p falls, c
    is multiplied by the ratio of the old penalty to the new one on that batch, so that its size stays.
    """

    config_type = PAnnealConfig
    config: PAnnealConfig
    gain = 20.0  # p falls until the end, and L0 with it
    factor: Tensor

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        self.register_buffer("factor", torch.ones(()))

    @property
    def rule(self) -> ReLURule:
        return ReLURule()

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked | None:
        if self._next_p(clock) != self.config.p_at(clock):  # values are raised to both, then
            return None
        return Asked("power", power=self.config.p_at(clock), smallest=SMALLEST)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        return {"lp": self.weight(batch.clock) * self.factor * power_sum(batch.latents, self.config.p_at(batch.clock))}

    def _observe(self, losses: SparseLosses) -> Tensor:
        """Beside L0: the penalty with this step's exponent, and with the next one's where that is lower."""
        return torch.cat([super()._observe(losses), self._powers(losses)])

    def _powers(self, losses: SparseLosses) -> Tensor:
        p, following = self.config.p_at(losses.clock), self._next_p(losses.clock)
        if following == p:
            return self.factor.new_ones(2)
        return torch.stack([power_sum(losses.latents.detach(), power) for power in (p, following)])

    def _next_p(self, clock: Clock) -> float:
        return self.config.p_at(clock._replace(step=clock.step + 1))

    def _update(self, seen: Tensor, clock: Clock) -> None:
        super()._update(seen, clock)
        old, new = seen[-2:]
        self.factor.mul_(torch.where(new > 0, old / new, 1))


def power_sum(active: Latents, p: float) -> Tensor:
    """Scalar: the mean over rows of sum_i (f_i + s)^p - s^p, which is 0 where f is and L1 for p = 1."""
    if isinstance(active, Uncounted):  # whose sums were asked for with this p
        return active.sums.mean()
    return active.map(lambda f: (f + SMALLEST).pow(p) - SMALLEST**p).sum_per_row().mean()
