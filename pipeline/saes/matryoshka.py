"""Matryoshka SAE: BatchTopK whose first latents must reconstruct alone (Bussmann et al. 2025, arXiv 2503.17547)."""

from __future__ import annotations

from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from . import auxk, placement, sparse
from .base import register
from .batch_threshold import BatchThreshold, BatchThresholdConfig
from .losses import LossInputs


class MatryoshkaConfig(BatchThresholdConfig):
    """BatchTopK with nested prefixes and AuxK."""

    arch: Literal["matryoshka"] = Field("matryoshka", description="architecture")
    prefixes: tuple[float, ...] = Field(
        (1 / 32, 3 / 32, 7 / 32, 15 / 32),
        description="sizes of the prefixes, below the whole, that must reconstruct by themselves: latents, or shares "
        "of d_sae where below 1",
    )

    @model_validator(mode="after")
    def _prefixes_nest(self) -> Self:
        sizes = self.sizes
        if not all(a < b for a, b in zip((0, *sizes), (*sizes, self.d_sae), strict=True)):
            raise ValueError(f"prefixes: {sizes} latents must grow and stay below d_sae: {self.d_sae}")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The prefixes in latents."""
        return tuple(round(size * self.d_sae) if size < 1 else int(size) for size in self.prefixes)


@final
@register
class Matryoshka(BatchThreshold):
    """BatchTopK in which nested prefixes of the dictionary each reconstruct the input; a threshold at inference.

    f as in BatchTopK; the loss is the sum, over every prefix and the whole, of ||y - f_{1..s} W_dec_{1..s} - b_dec||^2.
    """

    config_type = MatryoshkaConfig
    config: MatryoshkaConfig

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        parts, rest = self._prefix_sums(batch), self._past_latents(batch.latents)
        terms = {
            f"prefix_{size}": self.squared_error(part + rest, batch.y)
            for size, part in zip(self.config.sizes, parts, strict=True)
        }
        return terms | auxk.term(self, batch)

    def _prefix_sums(self, batch: LossInputs) -> list[Tensor]:
        """[B, d_out] for every prefix: what its latents add up to, decoded group by group in one pass."""
        active, bounds = batch.latents, (0, *self.config.sizes)
        if active.entries is None:
            return [active.values[:, :size] @ batch.W_dec[:size] for size in bounds[1:]]
        entries, groups = active.entries, len(bounds)
        places = entries.row_ids * self.d_sae + entries.indices
        rows = torch.arange(entries.batch, device=places.device)[:, None] * self.d_sae
        starts = torch.searchsorted(places, (rows + placement.numbers(bounds, rows)).view(-1))
        sums = sparse.decode(active.values, entries.regrouped(starts), batch.W_dec)
        return list(sums.view(entries.batch, groups, -1)[:, :-1].cumsum(1).unbind(1))
