"""How a dictionary's directions lie: angles between its rows, and between each latent's encoder and decoder.

Cosines of all pairs are computed a block of rows at a time, so memory is linear in the number of rows. Two numbers to
read `orthogonality` against: `random_cosine`, what random directions score, and `welch_bound`, below which no m
directions in d dimensions can push their largest cosine.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Metric, Subject, Value, register
from sae.pipeline.metrics.similarity import chance
from sae.pipeline.saes import coherence
from sae.pipeline.saes.dictionary import Dictionary

SAMPLED = 256  # random directions whose nearest is looked for


@register
class Geometry(Metric):
    """How a dictionary's directions lie towards each other and towards its encoder's."""

    name = "geometry"
    needs = ("directions",)
    figures = (
        Figure("orthogonality", "mean |cosine| of directions", "mean |cosine| of two decoder rows", "low", "studies"),
        Figure("jl", "JL penalty", "Johnson-Lindenstrauss penalty of the decoder, coefficient 1", "low", "studies"),
        Figure("largest_cosine", "largest cosine of directions", "largest cosine of two decoder rows", "low", "studies"),
        Figure("mean_largest_cosine", "nearest direction", "mean over latents of the largest cosine with another's decoder row", "low", "studies"),
        Figure("mean_largest_cosine_chance", "nearest direction by chance", "the same of as many random directions", None, "studies"),
        Figure("orthogonality_chance", "mean |cosine| by chance", "mean |cosine| of random directions, sqrt(2 / (pi d))", None, "studies"),
        Figure("welch_bound", "Welch bound", "what the largest |cosine| of so many directions cannot be below", None, "studies"),
        Figure("encoder_decoder_cosine", "cosine of encoder and decoder", "mean cosine of a latent's encoder and decoder rows", None, "studies"),
    )  # fmt: skip

    def __init__(self, sae: Dictionary) -> None:
        self.sae = sae

    @classmethod
    def of(cls, subject: Subject) -> Geometry:
        return cls(subject.dictionary)

    def result(self) -> dict[str, Value]:
        sae, pairs, alike = self.sae, self._pairs, self._alike
        m, d = sae.d_sae, sae.d_out
        several = m > 1
        return {
            "orthogonality": pairs.mean_abs, "jl": pairs.jl,
            "largest_cosine": pairs.largest.max().item() if several else None,
            "mean_largest_cosine": pairs.largest.mean().item() if several else None,
            "mean_largest_cosine_chance": chance(min(m, SAMPLED), m - 1, d) if several else None,
            "orthogonality_chance": random_cosine(d), "welch_bound": welch_bound(m, d),
            "encoder_decoder_cosine": None if alike is None else alike.mean().item(),
        }  # fmt: skip

    def latents(self) -> dict[str, Tensor]:
        found = {"largest_cosine": self._pairs.largest, "nearest": self._pairs.nearest} if self.sae.d_sae > 1 else {}
        return found | ({} if self._alike is None else {"encoder_decoder_cosine": self._alike})

    @cached_property
    def _pairs(self) -> Pairs:
        return pairs(self.sae.W_dec.detach())

    @cached_property
    def _alike(self) -> Tensor | None:
        """float32 [d_sae]; None of what reconstructs another space than it reads."""
        sae = self.sae
        return encoder_decoder_cosine(sae.W_enc.T, sae.W_dec).float().cpu() if sae.d_in == sae.d_out else None


class Pairs(NamedTuple):
    """Of the rows of a table [m, d]: the mean |cosine| of two of them (None for a single row), the penalty of
    `coherence`, each one's largest cosine with another, float32 [m], and which that is, int64 [m] (both empty for a
    single row). On the CPU."""

    mean_abs: float | None
    jl: float
    largest: Tensor
    nearest: Tensor


@torch.no_grad()
def pairs(table: Tensor) -> Pairs:
    """Look at the cosines of all pairs of rows [m, d], each once. A row of zeros is at right angles to every other."""
    m, d = table.shape
    if m < 2:
        return Pairs(None, 0.0, torch.empty(0), torch.empty(0, dtype=torch.int64))
    unit = normalize(table.float(), dim=1)
    sizes, penalty = unit.new_zeros(2, dtype=torch.float64)
    largest, nearest = torch.full_like(unit[:, 0], -torch.inf), torch.zeros_like(unit[:, 0], dtype=torch.int64)
    for start, cosines in coherence.triangle(unit):
        stop = start + len(cosines)
        sizes += coherence.over_ordered_pairs(cosines.abs())
        penalty += coherence.over_ordered_pairs(coherence.of_pairs(cosines, "abs"))
        cosines[:, : len(cosines)].fill_diagonal_(-torch.inf)
        if stop < m:  # those after have met rows of lower numbers alone so far, which go first where cosines are equal
            _take(largest[stop:], nearest[stop:], cosines[:, len(cosines) :].max(0), start)
        _take(largest[start:stop], nearest[start:stop], cosines.max(1), start)
    jl = (penalty * coherence.scale(d, m * m)).float()
    return Pairs(sizes.item() / (m * (m - 1)), jl.item(), largest.cpu(), nearest.cpu())


def _take(largest: Tensor, nearest: Tensor, found: Any, first: int) -> None:
    """Take up what is larger: values and indices, which count from `first` on."""
    larger = found.values > largest
    largest.copy_(torch.where(larger, found.values, largest))
    nearest.copy_(torch.where(larger, found.indices + first, nearest))


@torch.no_grad()
def encoder_decoder_cosine(encoder: Tensor, decoder: Tensor) -> Tensor:
    """[m]: the cosine of each latent's encoder and decoder row, of [m, d] each. 1 where tied, 0 for rows of zeros."""
    return cosine_similarity(encoder, decoder)


def random_cosine(d: int) -> float:
    """Return about what the mean |cosine| is of random directions in d dimensions: sqrt(2 / (pi d))."""
    return math.sqrt(2 / (math.pi * d))


def welch_bound(m: int, d: int) -> float:
    """The smallest that the largest |cosine| of m directions in d dimensions can be: 0 for m <= d (Welch 1974)."""
    return math.sqrt((m - d) / (d * (m - 1))) if m > d else 0.0
