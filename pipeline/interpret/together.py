"""Which latents fire together, from a sample of rows that fits into memory however many are read.

A count for every pair of 24,576 latents would take 2.4 GB; what is kept instead are the active latents of some rows. A
row is kept while a random number of its own (a function of its position and a seed) is below a threshold, which is
halved whenever there is too much: so what is kept at last is a uniform sample of all rows, and the same one in whatever
order they came. Until the threshold falls for the first time it is all of them, and the counts are exact.

A Jaccard index J estimated from u sampled rows in which either latent fires is off by sqrt(J (1 - J) / u), one standard
deviation.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.pipeline.interpret.best import random_scores, rank_in_run

MOST = np.array([1 << 20, 1 << 22, 1 << 29])  # of rows, of their active latents (16 MB), of pairs of these to count
BLOCK = 1 << 22  # pairs of latents that are counted at a time


class Partners(NamedTuple):
    """The latents that fire with each, highest Jaccard index first.

    latent int32, jaccard float32, phi float32 (NaN where one of them fires in every row), union int32 (sampled rows in
    which either fires), all [d_sae, n]; latent is -1 where there are no more. `rows`: how many were sampled, of `seen`.
    """

    latent: np.ndarray
    jaccard: np.ndarray
    phi: np.ndarray
    union: np.ndarray
    rows: int
    seen: int


class _Sampled(NamedTuple):
    """Some rows: a random number of each, how many latents are active in it, and which, row after row."""

    draws: np.ndarray  # float64 [r]
    counts: np.ndarray  # int64 [r]
    latents: np.ndarray  # int32 [sum of counts]

    def below(self, threshold: float) -> "_Sampled":
        """The rows whose random number is below a threshold."""
        keep = self.draws < threshold
        if keep.all():
            return self
        return _Sampled(self.draws[keep], self.counts[keep], self.latents[np.repeat(keep, self.counts)])

    @property
    def size(self) -> np.ndarray:
        """Rows, entries and pairs of entries of a row, int64 [3]."""
        return np.array([len(self.counts), len(self.latents), int(np.square(self.counts).sum())])


class Together:
    """A uniform sample of rows with the latents that are active in each."""

    def __init__(self, d_sae: int, seed: int) -> None:
        self.d_sae, self.seed = d_sae, seed
        self.threshold, self.seen = 1.0, 0
        self._kept: list[_Sampled] = []
        self._size = np.zeros(3, np.int64)

    def add(self, row: Tensor, latent: Tensor, position: np.ndarray) -> None:
        """Add rows at `position` [rows], with their firings by row (ascending) and latent, each [n], on any device."""
        self.seen += len(position)
        draws = random_scores(np.zeros(1, np.int64), position, self.seed)
        keep = draws < self.threshold
        counts = torch.bincount(row, minlength=len(position)).cpu().numpy()
        if not keep.all():
            latent = latent[torch.from_numpy(keep).to(row.device)[row]]
        found = _Sampled(draws[keep], counts[keep], latent.int().cpu().numpy())
        self._kept.append(found)
        self._size += found.size
        while (self._size > MOST).any():
            self.threshold /= 2
            self._kept = [self._all().below(self.threshold)]
            self._size = self._kept[0].size

    def _all(self) -> _Sampled:
        return _Sampled(*(np.concatenate(parts) for parts in zip(*self._kept, strict=True)))

    def partners(self, n: int) -> Partners:
        """The `n` latents that fire most with each; equal ones by number."""
        from scipy.sparse import csr_array

        _, counts, columns = self._all()
        rows = len(counts)
        offsets = np.concatenate([[0], counts.cumsum()])
        active = csr_array((np.ones(len(columns), np.float32), columns, offsets), shape=(rows, self.d_sae))
        fired = np.bincount(columns, minlength=self.d_sae)
        by_latent = active.T.tocsr()
        size = self.d_sae, n
        found = Partners(
            np.full(size, -1, np.int32), np.zeros(size, np.float32), np.zeros(size, np.float32),
            np.zeros(size, np.int32), rows, self.seen,
        )  # fmt: skip
        step = max(1, BLOCK // self.d_sae)
        for first in range(0, self.d_sae, step):
            counted = (by_latent[first : first + step] @ active).tocsc()  # whose entries come by `other`
            pairs = counted.tocoo()
            apart = pairs.row + first != pairs.col
            inside, other, both = pairs.row[apart], pairs.col[apart], pairs.data[apart].astype(np.int64)
            one = inside + first
            union = fired[one] + fired[other] - both
            jaccard = both / union
            order = np.argsort(inside + (1 - jaccard) / 2, kind="stable")  # one key, for sorting is most of the work
            rank = rank_in_run(one[order])
            order, rank = order[rank < n], rank[rank < n]
            one, other, both = one[order], other[order], both[order]
            place = one, rank
            found.latent[place], found.jaccard[place], found.union[place] = other, jaccard[order], union[order]
            found.phi[place] = _phi(rows, fired[one], fired[other], both)
        return found


def _phi(rows: int, one: np.ndarray, other: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Pearson correlation of firing or not, from counts [n]; NaN where one of them always does."""
    one, other, both = one.astype(np.float64), other.astype(np.float64), both.astype(np.float64)
    spread = np.sqrt(one * (rows - one)) * np.sqrt(other * (rows - other))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, (rows * both - one * other) / spread, np.nan)
