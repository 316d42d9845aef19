"""How many latents fire, how often each does, and which never do.

A latent fires in a row where its activation is not 0; an entry of a sparse form that holds 0 (TopK followed by ReLU)
does not. Latents come dense, as k entries a row, or as a varying number of entries a row.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.saes import Latents

DENSE = 0.1  # a latent is dense when it fires in more than this share of rows
RARE = 1e-6  # and ultra-low in density when in less than this one (but ever)
TINY, SMALL = 1e-8, 1e-5  # the thresholds of `l0_above_tiny` and `l0_above_small`
RELATIVE = 0.01  # `l0_relative` counts activations above this share of their row's largest


@dataclass(frozen=True)
class SparsityScores:
    """Over `rows` rows and d_sae latents. "Dead" means: did not fire in any of these rows."""

    rows: int
    l0: float  # mean number of latents that fire in a row
    l0_above_tiny: float  # the same, counting |f| > 1e-8
    l0_above_small: float  # the same, counting |f| > 1e-5
    l0_relative: float  # the same, counting |f| > 0.01 max |f| of the row
    l1: float  # mean over rows of sum |f|
    hoyer: float | None  # mean of (sqrt m - L1 / L2) / (sqrt m - 1) over rows where anything fires
    zeros: float  # share of activations that are zero: 1 - l0 / d_sae
    dead: int  # latents that fired in none of the rows
    dead_share: float  # dead / d_sae
    rare: int | None  # latents that fired, but in less than 1e-6 of the rows; None with too few rows to tell
    dense: int  # latents that fired in more than 0.1 of the rows
    dense_share: float  # dense / d_sae


@register
class Sparsity(Metric):
    """How many latents fire, and how often each does. `count` accumulates batches for `scores`."""

    name = "sparsity"
    needs = ("codes",)
    figures = (
        Figure("l0", "L0", "latents that fire in a row"),
        Figure("sparsity", "sparsity", "share of activations that are zero: 1 - L0 / latents", None, "studies", share=True ),
        Figure("l0_relative", "L0 above a hundredth", "latents above a hundredth of their row's largest", None, "studies"),
        Figure("l1", "L1", "mean over rows of the sum of |latents|, in the data's units", None, "studies"),
        Figure("hoyer", "Hoyer sparsity", "mean over rows of (sqrt m - L1 / L2) / (sqrt m - 1): 1 where one of m latents fires", None, "studies"),
        Figure("dense_share", "dense latents", "share of latents that fire in more than a tenth of the rows", "low", "studies", share=True),
        Figure("rate_q25", "lower quartile of firing rates", "firing rate that a quarter of the living latents stay below", None, "studies"),
        Figure("rate_median", "median firing rate", "half of them", None, "studies"),
        Figure("rate_q75", "upper quartile of firing rates", "three quarters", None, "studies"),
    )  # fmt: skip

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.rows = 0
        self._fired = torch.zeros(d_sae, dtype=torch.int64)
        self._sums = torch.zeros(7, dtype=torch.float64)  # fired, above TINY, SMALL, RELATIVE, |f|, Hoyer, its rows

    @classmethod
    def of(cls, subject: Subject) -> Sparsity:
        return cls(subject.coder.width)

    def update(self, batch: Encoded) -> None:
        codes = batch.codes
        assert codes is not None
        self.count(codes if isinstance(codes, Latents) else Latents.of_dense(codes.dense()))

    def result(self) -> dict[str, Value]:
        found, density = self.scores(), self.density()
        living = density[density > 0].tolist()
        rates = statistics.quantiles(living, n=4, method="inclusive") if len(living) > 1 else [None, None, None]
        return {
            "l0": found.l0, "sparsity": found.zeros, "l0_relative": found.l0_relative, "l1": found.l1,
            "hoyer": found.hoyer, "dense_share": found.dense_share,
            **dict(zip(("rate_q25", "rate_median", "rate_q75"), rates, strict=True)),
        }  # fmt: skip

    def details(self) -> dict[str, Any]:
        return {"sparsity": asdict(self.scores())}

    def latents(self) -> dict[str, Tensor]:
        return {"density": self.density().float()}

    def count(self, codes: Latents) -> None:
        """Count a batch of codes in any of their forms."""
        assert codes.d_sae == self.d_sae, (codes.d_sae, self.d_sae)
        values = codes.values.detach()
        size, fires = values.abs(), values != 0
        if values.dim() == 2:
            largest = size.amax(1, keepdim=True) if values.numel() else size.new_zeros(len(values), 1)
        else:
            assert codes.entries is not None
            rows = codes.entries.row_ids
            largest = size.new_zeros(codes.batch).scatter_reduce(0, rows, size, "amax")[rows]
        counts = [
            fires.sum(), (size > TINY).sum(), (size > SMALL).sum(), (fires & (size > RELATIVE * largest)).sum(),
            size.sum(dtype=torch.float64), *self._hoyer(codes),
        ]  # fmt: skip
        sums = torch.stack([one.double() for one in counts])
        self._sums = self._sums.to(sums.device) + sums
        self._fired = self._fired.to(sums.device) + codes.fired()
        self.rows += codes.batch

    def _hoyer(self, codes: Latents) -> tuple[Tensor, Tensor]:
        """The sum over rows that have it, and how many do."""
        sizes = codes.detach().map(lambda values: values.abs().double())
        l1, l2 = sizes.sum_per_row(), sizes.map(torch.square).sum_per_row().sqrt()
        there, root = l2 > 0, self.d_sae**0.5
        each = (root - l1 / l2) / (root - 1) if self.d_sae > 1 else torch.ones_like(l1)
        return torch.where(there, each, 0.0).sum(), there.sum()

    def density(self) -> Tensor:
        """float64 [d_sae]: the share of rows each latent fired in."""
        self._check()
        return self._fired.cpu().double() / self.rows

    def scores(self) -> SparsityScores:
        """The scores of all rows so far. Raises ValueError when there were none."""
        self._check()
        sums, fired = self._sums.cpu(), self._fired.cpu()
        l0, tiny, small, relative, l1 = (sums[:5] / self.rows).tolist()
        hoyer, there = sums[5:].tolist()
        density = self.density()
        dead, dense = int((fired == 0).sum()), int((density > DENSE).sum())
        return SparsityScores(
            rows=self.rows,
            l0=l0,
            l0_above_tiny=tiny,
            l0_above_small=small,
            l0_relative=relative,
            l1=l1,
            hoyer=hoyer / there if there else None,
            zeros=1 - l0 / self.d_sae,
            dead=dead,
            dead_share=dead / self.d_sae,
            rare=int(((density < RARE) & (fired > 0)).sum()) if self.rows * RARE > 1 else None,
            dense=dense,
            dense_share=dense / self.d_sae,
        )

    def _check(self) -> None:
        if not self.rows:
            raise ValueError("no rows to score")
