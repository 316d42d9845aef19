"""Schedules: a learning rate rises, stays and falls."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from sae.configs.base import Settings


class Schedule(Settings):
    """A factor between 0 and 1 for every step: a linear rise, a stretch at 1, a fall to 0. decay 0: constant."""

    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps over which the learning rate rises from 0")
    decay: float = Field(0.2, ge=0, le=1, description="share of the steps, the last ones, over which it falls to 0")
    shape: Literal["linear", "quarter_cosine", "half_cosine"] = Field(
        "linear", description="how it falls: evenly, as cos from 0 to 90 degrees, or as (1 + cos) / 2 from 0 to 180"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay}: together they are more than all steps")
        return self

    def factor(self, step: int, total: int) -> float:
        """The factor of step 0, 1, ...; at decay 1 that is 1 - t/T, cos(pi t / 2(T-1)) or (1 + cos(pi t/T)) / 2."""
        rise = min(1.0, (step + 1) / (self.warmup * total)) if self.warmup else 1.0
        return min(rise, self._fall(step, total))

    def _fall(self, step: int, total: int) -> float:
        length = self.decay * total
        into = step - (total - length)
        if into <= 0 or length == 0:
            return 1.0
        match self.shape:
            case "linear":
                return (total - step) / length
            case "quarter_cosine":
                return math.cos(math.pi / 2 * min(1.0, into / max(1.0, length - 1)))
            case "half_cosine":
                return (1 + math.cos(math.pi * into / length)) / 2


class DecoderRate(Schedule):
    """The learning rate of the decoder's parameters, where it is not the encoder's."""

    ratio: float = Field(1.0, gt=0, description="the decoder's learning rate as a multiple of lr")
