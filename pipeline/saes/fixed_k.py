"""The part that architectures with a fixed number of active latents share: k, its annealing, AuxK."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from . import auxk, placement
from .base import SAE
from .config import Clock, Config, ramp
from .losses import LossInputs, share, spread

AuxShare = Literal["error", "variance", "none"]


class FixedKConfig(Config):
    """Settings of k and of AuxK."""

    encoder_scale: float = Field(0.3, gt=0, description=Config.model_fields["encoder_scale"].description)
    k: int = Field(32, ge=1, description="active latents a row, for architectures that fix it")
    k_start: int | None = Field(None, ge=1, description="latents kept per input at the first step; unset: k")
    k_anneal: float = Field(
        0.1, ge=0, description="steps over which k_start becomes k, evenly; below 1, a share of the training"
    )
    aux_coefficient: float = Field(
        2.0, ge=0, description="weight of AuxK, in which dead latents reconstruct the residual; 0: off"
    )
    aux_share: AuxShare = Field(
        "error",
        description="what AuxK is a share of: its squared error counts as the reconstruction's does (error), or it is "
        "divided by the residual's variance and counts as a share of the data's (variance, as published), or by itself "
        "(none, as in versions before 0.2)",
    )
    aux_k: int | None = Field(
        None, ge=1, description="dead latents AuxK uses per input; unset: half the width, rounded to a power of two"
    )

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        for name, k in (("k", self.k), ("k_start", self.k_start or 1)):
            if k > self.d_sae and name not in self.idle:
                raise ValueError(
                    f"{name}: {k} latents per input, but d_sae: {self.d_sae} in all; lower {name} or raise d_sae"
                )
        return self

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


def auxk_term(sae: SAE, batch: LossInputs) -> dict[str, Tensor]:
    """{"auxk": the weighted term}, or nothing where it is switched off."""
    config = sae.config
    assert isinstance(config, FixedKConfig)
    if config.aux_coefficient == 0:
        return {}
    if sae.none_dead(batch.clock):
        return {"auxk": batch.y.new_zeros(batch.y.shape[:-2])}
    k_aux, dead = config.aux_k or auxk.default_k(sae.d_out), sae.dead(batch.clock)
    ahead = placement.runs_ahead(dead)
    if ahead:
        e_hat = auxk.explained_ahead(batch.pre, dead, min(k_aux, sae.d_sae), batch.W_dec, batch.clock)
    else:
        who = dead.nonzero().view(-1)
        if not len(who):
            return {"auxk": batch.y.new_zeros(())}
        e_hat = auxk.explained(batch.pre, who, min(k_aux, len(who)), batch.W_dec)
    residual = (batch.y - batch.y_hat).detach()
    error = (residual - e_hat).square().sum((-2, -1))
    match config.aux_share:
        case "error":
            term = sae.reduced(error, batch.y)
        case "variance":
            term = sae.reduced(spread(batch.y), batch.y) * share(error, spread(residual))
        case "none":
            term = share(error, spread(residual))
    term = config.aux_coefficient * term
    return {"auxk": term.masked_fill(~dead.any(-1), 0) if ahead else term}
