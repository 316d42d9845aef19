"""A penalty's coefficient that follows L0: raised while more latents are active than were asked for, lowered while
fewer.

What coefficient leads to which L0 depends on the rows, the width and the learning rate, so nobody can say it
beforehand; L0 is what people choose. With e = log(L0 / target) of the last step, the coefficient is multiplied by
exp(prompt e) at once, and for good by exp(gain e / steps) after every step: a controller with a proportional and an
integral part on its logarithm, whose reach does not depend on how long the training is. Thresholds move slowly: by
itself the second part would swing, and a strong first one damps it. Everything else answers within some steps, and a
strong part would only keep it from learning.

A training starts with half of its latents active, and where L0 must not be the target at once, features have time to
form. So, but for thresholds, an L0 above the target counts only as far as it lies above a line, too, that falls from
where L0 was when steering began to the target (in its logarithm, over the first half of the training): the coefficient
is raised where L0 falls more slowly than that, and lowered only below the target.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .base import SAE
from .config import Clock, Config, Steps, TrainableConfig, ramp, steps_of
from .contract import Trainable
from .losses import SparseLosses

MOST = 1.0
"""Largest e that counts, half of it for good: where a training starts, half of the latents may be active."""

LEAST = 1e-3
"""Smallest L0 there is a logarithm of."""


class CoefficientConfig(TrainableConfig):
    """Settings of a penalty whose coefficient is given, or found while training."""

    coefficient: float = Field(
        1.0, ge=0, description="weight of the penalty beside the squared error; with target_l0, where it starts"
    )
    target_l0: float | None = Field(
        32.0,
        gt=0,
        description="active latents a row, for architectures with a penalty, whose coefficient is steered to it unless "
        "one is given; null: it stays as it is",
    )
    warmup: Steps = Field(
        0.05, ge=0, description="steps over which the coefficient rises from 0; below 1, a share of the training"
    )

    @property
    def steered(self) -> bool:
        """True where the coefficient follows L0."""
        return self.target_l0 is not None

    def unfinished(self, steps: int) -> list[str]:
        return [name for name in super().unfinished(steps) if name != "warmup" or self.coefficient]

    def expect_length(self, steps: int) -> None:
        super().expect_length(steps)
        if self.steered and steps_of(self.warmup, Clock(0, steps)) >= steps:
            raise ValueError(
                f"warmup: {self.warmup:g} leaves none of {steps:,} steps to steer L0 to target_l0: {self.target_l0:g} "
                "in; lower it, as to 0.05, or train longer"
            )

    @model_validator(mode="before")
    @classmethod
    def _a_coefficient_given_stays(cls, given: Any) -> Any:
        if isinstance(given, dict) and "coefficient" in given and "target_l0" not in given:
            return given | {"target_l0": None}
        return given

    @model_validator(mode="after")
    def _there_is_something_to_steer(self) -> Self:
        if self.target_l0 is not None and self.coefficient == 0:
            raise ValueError(
                f"target_l0: {self.target_l0} is reached by steering the coefficient, but coefficient: 0 stays 0"
            )
        return self


class SteeredConfig(CoefficientConfig, Config):
    """The same, of a sparse dictionary."""


class Steering(Trainable):
    """The part of what is trained that has a penalty's coefficient, which may be steered to an L0."""

    prompt: ClassVar[float] = 0.3
    """Power of L0 / target that the coefficient follows at once. L0 answers within some steps: more would swing."""
    gain: ClassVar[float] = 10.0
    """How many times over, in a training, a lasting e of 1 would multiply the coefficient by the number e."""
    descent: ClassVar[float] = 0.5
    """Share of the training over which L0 may come down to the target; 0: at once."""
    config: CoefficientConfig
    pressure: Tensor
    excess: Tensor
    height: Tensor

    def _register_steering(self) -> None:
        if self.config.steered:
            self.register_buffer("pressure", torch.ones(()))
            self.register_buffer("excess", torch.zeros(()))
            if self.descent:
                self.register_buffer("height", torch.zeros(()))

    def weight(self, clock: Clock) -> Tensor | float:
        """The coefficient of this step, a scalar."""
        weight = self.config.coefficient * ramp(self.config.warmup, clock)
        return weight * self.pressure * (self.prompt * self.excess).exp() if self.config.steered else weight

    def _steer(self, l0: Tensor, clock: Clock) -> None:
        """After a step: let the coefficient follow its L0, a scalar."""
        since = clock.step - steps_of(self.config.warmup, clock)
        if not self.config.steered or since < 0:
            return
        assert self.config.target_l0 is not None, "which steering needs"
        above = (l0.clamp_min(LEAST) / self.config.target_l0).log()
        if self.descent:
            if since < 1:
                self.height.copy_(above.clamp_min(0))
            allowed = self.height * max(0.0, 1 - since / (self.descent * clock.steps))
            above = (above - allowed).clamp_min(0) + above.clamp_max(0)
        self.excess.copy_(above.clamp(-MOST, MOST))
        self.pressure.mul_((self.excess.clamp(-MOST / 2, MOST / 2) * (self.gain / clock.steps)).exp())


class Steered(Steering, SAE):
    """A dictionary whose penalty's coefficient may be steered to an L0."""

    config: SteeredConfig

    def _build(self, generator: torch.Generator) -> None:
        self._register_steering()

    def _observe(self, losses: SparseLosses) -> Tensor:
        """The part's L0, where that is followed."""
        if not self.config.steered:
            return super()._observe(losses)
        return losses.l0().float().mean().view(1)

    def _update(self, seen: Tensor, clock: Clock) -> None:
        if self.config.steered:
            self._steer(seen[0], clock)
