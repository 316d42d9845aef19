"""Doses: one latent of a dictionary changed by so much, at some of the positions of what the model reads.

Which positions change is decided by a token's place alone, never by what is the last one at the moment: so it is the
same whether the model computes a text at once or a token at a time, with what it kept of the earlier ones.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.language_model.places import intervene
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.steering.config import SteerConfig
from sae.pipeline.steering.opened import Opened

BATCH, ELEMENTS = 4096, 1 << 24  # rows, and latents of them, that are held at a time


@dataclass(frozen=True)
class Dose:
    """A strength of one latent, of which `size` is one unit, in texts that begin with `prompt` tokens."""

    opened: Opened
    config: SteerConfig
    feature: int
    strength: float
    size: float
    prompt: int

    def at(self, tokens: Tensor, first: int = 0) -> AbstractContextManager[None]:
        """The context in which the model is given tokens [T], the first of which is at position `first` of the text."""
        there, amount = self.changes(tokens, first), self.strength * self.size
        if self.config.mode == "add" and self.config.unit == "norm":
            direction = self.opened.dictionary.W_dec[self.feature] / self.opened.dictionary.target_scale
            added = there[:, None].to(direction.device) * (amount / direction.norm()) * direction
            return intervene(self.opened.model, {self.opened.writes: lambda value: value + added.to(value)})

        def edit(values: Tensor) -> Tensor:
            new, old = values.clone(), values[..., self.feature]
            to = old + amount if self.config.mode == "add" else torch.full_like(old, amount)
            new[..., self.feature] = torch.where(there.to(old.device), to, old)
            return new

        return self.opened.attached.edit(edit)

    def changes(self, tokens: Tensor, first: int = 0) -> Tensor:
        """bool [T]: which of some tokens [T] change."""
        place = torch.arange(first, first + len(tokens))
        match self.config.positions:
            case "all":
                return self.opened.learned(tokens, first)
            case "last":
                return place >= self.prompt - 1
            case listed:
                return torch.isin(place, torch.tensor(listed))


@dataclass(frozen=True)
class Nothing:
    """The model as it is, in the place of a dose."""

    def at(self, tokens: Tensor, first: int = 0) -> AbstractContextManager[None]:
        return nullcontext()


@torch.no_grad()
def unit_size(opened: Opened, config: SteerConfig, feature: int, progress: Progress) -> float:
    """The size of a strength of 1, measured on the first rows that the dictionary was trained on.

    Raises SaeError where the unit is a latent's largest activation and there is none.
    """
    if config.mode == "ablate" or config.unit == "raw":
        return 1.0
    dictionary, rows = opened.dictionary, min(config.rows, opened.dataset.n_rows)
    where = dictionary.W_dec.device
    largest, norms, seen = 0.0, 0.0, 0
    progress.start(f"measuring {config.unit}", rows, "rows")
    try:
        for batch in opened.dataset.following(0, rows, max(1, min(BATCH, ELEMENTS // dictionary.d_sae))):
            if config.unit == "norm":
                norms += float(batch.y.double().norm(dim=1).sum())
            else:
                values = dictionary.encode(batch.x.to(where)).dense()[:, feature]
                largest = max(largest, float(values.abs().max()))
            seen += len(batch.x)
            progress.advance(len(batch.x))
    finally:
        progress.finish()
    if config.unit == "norm":
        return norms / seen
    if not largest:
        raise SaeError(
            f"feature = {feature}: fires in none of the first {rows:,} rows of {opened.dataset.key}, so it has no "
            "largest activation to measure by; steer with `unit = norm` or `unit = raw`"
        )
    return largest
