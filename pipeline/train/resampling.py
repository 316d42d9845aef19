"""Remedies for latents that stopped firing, between two steps: resampling, or starting the dictionary again.

(AuxK and ghost gradients do it within the loss instead.) All of it is a function of the dictionary, the rows and a
generator: a resumed run does the same at the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sae.cache.loader.loader import Batch
from sae.configs.base import Settings
from sae.pipeline.saes.base import SAE
from sae.pipeline.saes.config import IN_STEPS, Clock, Steps, beyond, steps_of


class NoRevival(Settings):
    """Dead latents stay dead, but for what the loss does about them."""

    kind: Literal["none"] = Field("none", description="what is done about dead latents between steps")

    def unfinished(self, total: int) -> list[str]:
        """None: there are no lengths."""
        return []


class _AtSteps(Settings):
    every: Steps = Field(0.1, gt=0, description="steps between two times; below 1, a share of the training")
    until: float = Field(0.8, gt=0, description="the last step it may happen at; below 1, a share of the training")

    def due(self, done: int, total: int) -> bool:
        """Return True if it happens after that many steps of so many in all."""
        clock = Clock(done, total)
        return done % self._interval(total) == 0 and 0 < done <= steps_of(self.until, clock)

    def since(self, step: int, total: int) -> int | None:
        """Steps taken, before this one, since it last happened; None before the first time."""
        last = min(step, int(steps_of(self.until, Clock(step, total))))
        last -= last % self._interval(total)
        return step - last if last > 0 else None

    def unfinished(self, total: int) -> list[str]:
        """The names of lengths that a training of so many steps ends before, or in which it never happens."""
        never = self._interval(total) > min(total, steps_of(self.until, Clock(0, total)))
        return sorted({*beyond(self, total), *(["every"] if never else [])})

    def _interval(self, total: int) -> int:
        return max(1, round(steps_of(self.every, Clock(0, total))))


class Resample(_AtSteps):
    """Dead latents become directions of badly reconstructed rows (Bricken et al. 2023)."""

    kind: Literal["resample"] = Field("resample", description="what is done about dead latents between steps")
    rows: int = Field(819_200, ge=1, description="rows to choose from, by the square of their error")
    scale: float = Field(0.2, gt=0, description="norm of a new encoder row, of the mean norm of the living ones")
    rewarm: Annotated[int, IN_STEPS] = Field(
        0, ge=0, description="steps over which the learning rate rises again from 0 afterwards"
    )


class Reinitialise(_AtSteps):
    """A dictionary whose latents fire too unequally starts again (mutual feature regularization)."""

    kind: Literal["reinitialise"] = Field("reinitialise", description="what is done about dead latents between steps")
    every: Steps = Field(100, gt=0, description=_AtSteps.model_fields["every"].description)
    threshold: float = Field(
        2.5, gt=0, description="start again where the mean over latents of |rate / (k / d_sae) - 1|^3 exceeds this"
    )


@torch.no_grad()
def resample(
    sae: SAE,
    optimiser: torch.optim.Optimizer,
    rows: Iterable[Batch],
    settings: Resample,
    generator: torch.Generator,
    clock: Clock,
) -> int:
    """Give latents that are dead by that time new directions, and fresh Adam moments; how many were.

    Rows are drawn without replacement, with chances in proportion to the square of their squared error. Fewer rows with
    an error than dead latents: the others wait for the next time.
    """
    all_dead = sae.dead(clock)
    dead = all_dead.nonzero().view(-1)
    if len(dead) == 0:
        return 0
    inputs, outputs = _draw(sae, rows, len(dead), generator)
    which, alive = dead[: len(inputs)], ~all_dead
    living = alive if alive.any() else torch.ones_like(alive)
    norms = [torch.linalg.vector_norm(table[living], dim=1).mean() for table in (sae.W_enc_rows, sae.W_dec)]
    unit = sae.config.decoder_norm == "unit"
    sae.restart(which, settings.scale * norms[0] * inputs, outputs * (1 if unit else norms[1]))
    for parameter in sae.latent_parameters().values():
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in (state := optimiser.state[parameter]):
                state[moment][which] = 0
    return len(which)


def _draw(sae: SAE, rows: Iterable[Batch], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Up to `count` rows, weighted, without replacement, as unit directions [n, d_in] and [n, d_out].

    One pass and `count` rows held at a time: the smallest of exponential draws over their weights win (Efraimidis and
    Spirakis 2006).
    """
    inputs, outputs = sae.W_enc_rows.new_empty(0, sae.d_in), sae.W_dec.new_empty(0, sae.d_out)
    keys = torch.empty(0, dtype=torch.float64)
    for batch in rows:
        ins, outs, errors = sae.directions(batch.x, batch.y)
        weights = errors.double().cpu().square()
        new = torch.empty_like(weights).exponential_(generator=generator) / weights  # infinite for a weight of 0
        keys = torch.cat([keys, new])
        best = keys.argsort(stable=True)[:count]
        best = best[keys[best].isfinite()]
        where = best.to(inputs.device)
        keys, inputs, outputs = keys[best], torch.cat([inputs, ins])[where], torch.cat([outputs, outs])[where]
    return inputs, outputs


@torch.no_grad()
def firing_rate_skew(sae: SAE, k: int) -> float:
    """Mean over latents of |r / r* - 1|^3, for firing rates r and the rate r* = k / d_sae of equal latents."""
    return (sae.firing_rate * (sae.d_sae / k) - 1).abs().pow(3).mean().item()


@torch.no_grad()
def reinitialise(sae: SAE, optimiser: torch.optim.Optimizer, sample: Batch, generator: torch.Generator) -> None:
    """All weights, biases and counters as those of a new dictionary of another seed; the optimiser forgets."""
    seed = int(torch.randint(2**31, (), generator=generator))
    outputs = sae.widths_out if sae.is_transcoder else None
    fresh = type(sae)(sae.config, sae.widths_in, outputs, seed=seed).to(sae.W_dec.device)
    fresh.initialise(sample.x, sample.y)
    sae.load_state_dict(fresh.state_dict())
    optimiser.state.clear()
