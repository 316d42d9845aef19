"""The latents of a batch: one small type over a sparse form (the active entries) and a dense one ([B, d_sae])."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import counting, placement, sparse
from .sparse import SparsePattern

RowScaling = Literal["none", "standard", "norm"]
"""How rows are scaled one by one: less their mean and over their deviation, or to a norm of sqrt(d)."""


class RowStats(NamedTuple):
    """The scale of rows: what was subtracted from each and what it was divided by, both [B, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, x: Tensor) -> RowStats:
        """The row_stats of rows [B, d], a little off zero (SAELens' `layer_norm` to the letter)."""
        spread = x.std(1, keepdim=True) if len(x) else x.new_empty(0, 1)  # of which torch warns
        return cls(x.mean(1, keepdim=True), spread + 1e-5)

    @classmethod
    def of_norms(cls, x: Tensor) -> RowStats:
        """The row_stats in which rows [B, d] have norm sqrt(d); rows of zeros stay so."""
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True) / x.shape[1] ** 0.5
        return cls(torch.zeros_like(norms), norms.masked_fill(norms == 0, 1))

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def denormalise(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


@dataclass(frozen=True, eq=False)
class Latents:
    """Latent activations of B rows.

    values: [B, k] when every row has k entries, [n] when the number varies, [B, d_sae] when dense.
    entries: where the values sit, or None when dense.
    preactivations: laid out as `values`, what they were made from, where an architecture's loss needs it.
    row_stats: of the rows they were encoded from, where those were standardised one by one.
    bypass: [B, d_out], what a skip connection adds to the rows' reconstruction; None where there is no such.
    lead: the shape [...] of rows that came as [..., d]; None where they came as [B, d].
    An entry may hold the value 0 (TopK followed by ReLU): it counts as not firing everywhere here.
    """

    values: Tensor
    entries: SparsePattern | None
    d_sae: int
    preactivations: Tensor | None = None
    row_stats: RowStats | None = None
    bypass: Tensor | None = None
    lead: tuple[int, ...] | None = None

    @classmethod
    def of_rows(cls, values: Tensor, indices: Tensor, d_sae: int) -> Latents:
        """From values [B, k] and indices [B, k]; indices are unique within a row."""
        return cls(values, SparsePattern.per_row(indices, d_sae), d_sae)

    @classmethod
    def of_dense(cls, values: Tensor) -> Latents:
        """From a dense [..., d_sae] tensor."""
        lead = None if values.dim() == 2 else tuple(values.shape[:-1])
        return cls(values.reshape(-1, values.shape[-1]), None, values.shape[-1], lead=lead)

    def edited(self, values: Tensor) -> Latents:
        """Other values [..., d_sae] of the same rows, for `decode` to put where these rows were."""
        if not isinstance(values, Tensor):
            raise TypeError(f"values are a {type(values).__name__}; give a torch tensor, as torch.as_tensor(values)")
        if values.shape[-1:] != (self.d_sae,) or values.shape[:-1].numel() != self.batch:
            raise ValueError(f"{self.batch} rows of {self.d_sae} latents cannot have values {list(values.shape)}")
        return replace(Latents.of_dense(values), row_stats=self.row_stats, bypass=self.bypass)

    @property
    def batch(self) -> int:
        return self.values.shape[0] if self.entries is None else self.entries.batch

    @property
    def indices(self) -> Tensor | None:
        """int64 in the shape of `values` when sparse, None when dense."""
        return None if self.entries is None else self.entries.indices.view(self.values.shape)

    def map(self, function: Callable[[Tensor], Tensor]) -> Latents:
        """Apply an elementwise function that keeps zero at zero (ReLU, a scaling) to the values."""
        return replace(self, values=function(self.values))

    def beside(self, row_stats: RowStats | None, bypass: Tensor | None) -> Latents:
        """The same, with what decoding needs of the rows themselves."""
        return replace(self, row_stats=row_stats, bypass=bypass)

    def detach(self) -> Latents:
        return replace(self, values=self.values.detach(), preactivations=None)

    def per_entry(self, weights: Tensor) -> Tensor:
        """Gather a per-latent vector [d_sae] at the active entries: in the shape of `values`, or broadcasting to it."""
        if self.entries is None:
            return weights
        return weights.index_select(0, self.entries.indices).view(self.values.shape)

    def dense(self) -> Tensor:
        """[B, d_sae] or [..., d_sae], differentiable in the values."""
        if self.entries is None:
            return self.in_lead(self.values)
        flat = self.entries.row_ids * self.d_sae + self.entries.indices
        zeros = self.values.new_zeros(self.batch * self.d_sae)
        return self.in_lead(zeros.index_put((flat,), self.values.reshape(-1)).view(self.batch, self.d_sae))

    def l0(self) -> Tensor:
        """int64 [B] or [...]: how many latents fired in each row."""
        return self.in_lead(_per_row(self, (self.values != 0).long()))

    def led(self, lead: tuple[int, ...]) -> Latents:
        """The latents of rows that came in the shape [*lead, d]."""
        return replace(self, lead=lead)

    def in_lead(self, rows: Tensor) -> Tensor:
        """Something of each row, [B, ...], in the shape in which the rows came."""
        return rows if self.lead is None else rows.view((*self.lead, *rows.shape[1:]))

    def fired(self) -> Tensor:
        """int64 [d_sae]: in how many of the rows each latent fired."""
        return (self.values != 0).sum(0) if self.entries is None else counting.fired(self.values, self.entries)

    def sum_per_row(self, weights: Tensor | None = None) -> Tensor:
        """[B]: the sum of each row's values, each times its latent's weight [d_sae] when given; differentiable."""
        if weights is None:
            return _per_row(self, self.values)
        if self.entries is None:
            return self.values @ weights
        if placement.runs_ahead(self.values):  # where what is gathered has its gradients added in any order
            return self.decoded(weights[:, None]).view(-1)
        return _per_row(self, self.values * self.per_entry(weights))

    def decoded(self, table: Tensor) -> Tensor:
        """They @ table [m, d] -> [B, d], by whichever form they have."""
        if self.entries is None:
            return torch.mm(self.values, table)
        return sparse.decode(self.values, self.entries, table)


def _per_row(latents: Latents, values: Tensor) -> Tensor:
    """[B]: the values, laid out as the latents' own, summed row by row."""
    if values.dim() == 2:
        return values.sum(1)
    assert latents.entries is not None
    return values.new_zeros(latents.batch).index_add(0, latents.entries.row_ids, values)


def decode(latents: Latents, table: Tensor) -> Tensor:
    """latents [B, m] @ table [m, d] -> [B, d]."""
    return latents.decoded(table)


def beside(parts: Sequence[Latents]) -> Latents:
    """The latents that several dictionaries have of the same rows as those of one, the first dictionary's first."""
    if all(part.entries is None for part in parts):
        return Latents.of_dense(torch.cat([part.values for part in parts], dim=1))
    found, before = [], 0
    for part in parts:
        if part.entries is None:
            rows, which = part.values.nonzero(as_tuple=True)
            values = part.values[rows, which]
        else:
            rows, which, values = part.entries.row_ids, part.entries.indices, part.values.reshape(-1)
        found.append((rows, which + before, values))
        before += part.d_sae
    rows, which, values = (torch.cat(each) for each in zip(*found, strict=True))
    order = rows.argsort(stable=True)
    return _ragged(rows[order], which[order], values[order], parts[0].batch, before)


def apart(latents: Latents, size: int) -> list[Latents]:
    """The latents of each of several dictionaries, of `size` latents each: the other way."""
    firsts = range(0, latents.d_sae, size)
    if latents.entries is None:
        return [Latents.of_dense(latents.values[:, first : first + size]) for first in firsts]
    rows, which, values = latents.entries.row_ids, latents.entries.indices, latents.values.reshape(-1)
    found = []
    for first in firsts:
        its = ((which >= first) & (which < first + size)).nonzero().view(-1)
        found.append(_ragged(rows[its], which[its] - first, values[its], latents.batch, size))
    return found


def _ragged(rows: Tensor, which: Tensor, values: Tensor, batch: int, d_sae: int) -> Latents:
    """Latents from entries [n] in the order of their rows."""
    offsets = torch.searchsorted(rows, torch.arange(batch, device=rows.device))
    return Latents(values, SparsePattern(which, offsets, d_sae), d_sae)
