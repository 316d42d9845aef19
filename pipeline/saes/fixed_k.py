"""The part that architectures with a fixed number of active latents share: k, its annealing, AuxK."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from .auxk import AuxKConfig
from .base import SAE
from .config import Clock, Config, Steps, ramp


class FixedKConfig(AuxKConfig):
    """Settings of k, beside those of AuxK."""

    encoder_scale: float = Field(0.3, gt=0, description=Config.model_fields["encoder_scale"].description)
    k: int = Field(32, ge=1, description="active latents a row, for architectures that fix it")
    k_start: int | None = Field(None, ge=1, description="latents kept per input at the first step; unset: k")
    k_anneal: Steps = Field(
        0.1, ge=0, description="steps over which k_start becomes k, evenly; below 1, a share of the training"
    )

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        for name, k in (("k", self.k), ("k_start", self.k_start or 1)):
            if k > self.d_sae and name not in self.idle:
                raise ValueError(
                    f"{name}: {k} latents per input, but d_sae: {self.d_sae} in all; lower {name} or raise d_sae"
                )
        return self

    def unfinished(self, steps: int) -> list[str]:
        return [name for name in super().unfinished(steps) if name != "k_anneal" or self.k_start is not None]

    def k_at(self, clock: Clock) -> int:
        """k of this step."""
        start = self.k if self.k_start is None else self.k_start
        return start + round((self.k - start) * ramp(self.k_anneal, clock))


def ks_at(sae: SAE, clock: Clock) -> list[int]:
    """k of this step; of a stack, that of each dictionary."""
    found = []
    for config in sae.configs:
        assert isinstance(config, FixedKConfig)
        found.append(config.k_at(clock))
    return found
