"""How a dictionary's directions lie: angles between its rows, and between each latent's encoder and decoder.

Cosines of all pairs are computed a block of rows at a time, so memory is linear in the number of rows. Two numbers to
read `mean_abs_cosine` against: `random_cosine`, what random directions score, and `welch_bound`, below which no m
directions in d dimensions can push their largest cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Metric, Subject, Value, register
from sae.pipeline.saes.coherence import jl
from sae.pipeline.saes.dictionary import Dictionary

BLOCK = 1 << 22  # cosines held at a time


@register
class Geometry(Metric):
    """How a dictionary's directions lie towards each other and towards its encoder's."""

    name = "geometry"
    needs = ("directions",)
    figures = (
        Figure("orthogonality", "mean |cosine| of directions", "mean |cosine| of two decoder rows", "low", "studies"),
        Figure("jl", "JL penalty", "Johnson-Lindenstrauss penalty of the decoder, coefficient 1", "low", "studies"),
        Figure("encoder_decoder_cosine", "cosine of encoder and decoder", "mean cosine of a latent's encoder and decoder rows", None, "studies"),
    )  # fmt: skip

    def __init__(self, sae: Dictionary) -> None:
        self.sae = sae

    @classmethod
    def of(cls, subject: Subject) -> Geometry:
        return cls(subject.dictionary)

    @torch.no_grad()
    def result(self) -> dict[str, Value]:
        sae = self.sae
        alike = encoder_decoder_cosine(sae.W_enc.T, sae.W_dec) if sae.d_in == sae.d_out else None
        return {
            "orthogonality": mean_abs_cosine(sae.W_dec), "jl": jl(sae.W_dec).item(),
            "encoder_decoder_cosine": None if alike is None else alike.mean().item(),
        }  # fmt: skip


@torch.no_grad()
def mean_abs_cosine(table: Tensor) -> float | None:
    """Mean size of the cosine of two different rows of [m, d], over all pairs; None for a single row.

    A row of zeros is at right angles to every other.
    """
    m = len(table)
    if m < 2:
        return None
    unit = normalize(table.float(), dim=1)
    total = sum((part @ unit.T).abs().sum(dtype=torch.float64).item() for part in unit.split(max(1, BLOCK // m)))
    itself = unit.square().sum(dtype=torch.float64).item()  # the diagonal: 1 for every row that is not zero
    return max(0.0, total - itself) / (m * (m - 1))


@torch.no_grad()
def encoder_decoder_cosine(encoder: Tensor, decoder: Tensor) -> Tensor:
    """[m]: the cosine of each latent's encoder and decoder row, of [m, d] each. 1 where tied, 0 for rows of zeros."""
    return cosine_similarity(encoder, decoder)


def random_cosine(d: int) -> float:
    """Return about what `mean_abs_cosine` is for random directions in d dimensions: sqrt(2 / (pi d))."""
    return math.sqrt(2 / (math.pi * d))


def welch_bound(m: int, d: int) -> float:
    """The smallest that the largest |cosine| of m directions in d dimensions can be: 0 for m <= d (Welch 1974)."""
    return math.sqrt((m - d) / (d * (m - 1))) if m > d else 0.0
