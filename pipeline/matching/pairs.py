"""Two dictionaries: the best match of every latent, and the best matching one to one.

By direction the likeness of two latents is the cosine of their decoder rows, by firing the correlation of their values
over the same rows. Either way each latent may have its best match, which several may share (many to one), or all have
one of their own (one to one, Hungarian). What chance would give stands beside: random directions; rows that belong to
others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.pipeline.metrics.similarity import best, hungarian, mean_cosine, random_directions

SHARES = {"07": 0.7, "09": 0.9}
BLOCK = 1 << 24  # correlations held at a time
CONSTANT = 1e-6  # deviation, as a share of the mean, below which a latent does not vary
WAYS = {"ab": ("a", "b"), "ba": ("b", "a")}
MEANINGS = {  # what the figures of two dictionaries a and b are
    **{f"latents_{one}": f"latents of {one} that are compared" for one in "ab"},
    "mmcs": "mean of mmcs_ab and mmcs_ba",
    "mmcs_chance": "the same of random directions",
    "hungarian": "mean cosine of the best one-to-one matching",
    "hungarian_chance": "the same of random directions",
    **{f"mmcs_{way}": f"mean over latents of {x} of their largest cosine with {y}'s" for way, (x, y) in WAYS.items()},
    **{f"mmcs_{way}_chance": "the same of random directions" for way in WAYS},
    **{f"distinct_{way}": f"different best matches in {y}, over the latents of {x}" for way, (x, y) in WAYS.items()},
    **{
        f"above_{name}_{way}": f"share of the latents of {x} whose best match is above {least}"
        for name, least in SHARES.items() for way, (x, _) in WAYS.items()
    },
    **{f"above_{name}_hungarian": f"share of one-to-one pairs above {least}" for name, least in SHARES.items()},
    "correlation": "mean of correlation_ab and correlation_ba",
    **{
        f"correlation_{way}": f"mean over latents of {x} of their largest correlation over rows with {y}'s"
        for way, (x, y) in WAYS.items()
    },
    **{f"correlation_{way}_chance": "the same where the rows of one are others" for way in WAYS},
    "correlation_hungarian": "mean correlation of the best one-to-one matching by correlation",
    "correlation_of_matched": "mean correlation of the pairs that are matched one to one by cosine",
}  # fmt: skip

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Matched:
    """Two dictionaries compared. ab, ba: the largest likeness of each latent of one with one of the other, [n] and [m].

    pairs: the one-to-one matching, as latents of the first and of the second; None where it was not asked for.
    likeness: of these pairs.
    """

    ab: Tensor
    ba: Tensor
    figures: Figures
    pairs: tuple[Tensor, Tensor] | None = None
    likeness: Tensor | None = None


def by_direction(a: Tensor, b: Tensor, *, one_to_one: bool) -> Matched:
    """Compare decoders a [n, d] and b [m, d], none of whose rows is zero."""
    nearest, back = best(a, b), best(b, a)
    ab, ba = cosine_similarity(a, b[nearest]), cosine_similarity(b, a[back])
    random = [random_directions(len(table), a.shape[1], seed=seed) for seed, table in enumerate((a, b), 1)]
    by_chance = [cosine_similarity(x, y[best(x, y)]).mean().item() for x, y in (random, random[::-1])]
    pairs = hungarian(a, b) if one_to_one else None
    likeness = None if pairs is None else cosine_similarity(a[pairs[0]], b[pairs[1]])
    figures: Figures = {
        "mmcs": (ab.mean().item() + ba.mean().item()) / 2, "mmcs_chance": sum(by_chance) / 2,
        "hungarian": None if likeness is None else likeness.mean().item(),
        "hungarian_chance": mean_cosine(random[0], random[1], hungarian(*random)).item() if one_to_one else None,
        "mmcs_ab": ab.mean().item(), "mmcs_ab_chance": by_chance[0],
        "mmcs_ba": ba.mean().item(), "mmcs_ba_chance": by_chance[1],
        "distinct_ab": len(nearest.unique()) / len(a), "distinct_ba": len(back.unique()) / len(b),
        **_shares(ab, ba, likeness),
    }  # fmt: skip
    return Matched(ab, ba, figures, pairs, likeness)


def _shares(ab: Tensor, ba: Tensor, likeness: Tensor | None) -> Figures:
    """How many latents have a match above 0.7 and above 0.9."""
    found: Figures = {}
    for name, least in SHARES.items():
        found |= {f"above_{name}_ab": _share(ab, least), f"above_{name}_ba": _share(ba, least)}
        found[f"above_{name}_hungarian"] = None if likeness is None else _share(likeness, least)
    return found


def _share(values: Tensor, least: float) -> float | None:
    return (values > least).double().mean().item() if len(values) else None


class Firing:
    """Latents over rows, [rows, d_sae] stored sparsely, in units of their deviation. `alive` [d_sae]: which vary."""

    def __init__(self, values: Any) -> None:
        columns = values.tocsc().astype(np.float64)
        self.rows = columns.shape[0]
        mean = np.asarray(columns.mean(0)).reshape(-1)
        squares = np.asarray(columns.multiply(columns).mean(0)).reshape(-1)
        deviation = np.sqrt(np.maximum(squares - mean**2, 0))
        self.alive = deviation > CONSTANT * np.abs(mean)
        unit = np.where(self.alive, 1 / np.where(self.alive, deviation, 1), 0)
        self._columns = (columns @ sparse.diags(unit)).tocsc()
        self._mean = mean * unit

    def shifted(self) -> Firing:
        """The same latents, each row's those of a row half of all rows away: what has nothing to do with it."""
        other = object.__new__(Firing)
        order = np.roll(np.arange(self.rows), self.rows // 2)
        other.__dict__ |= {**self.__dict__, "_columns": self._columns.tocsr()[order].tocsc()}
        return other

    def correlations(self, other: Firing, which: slice) -> np.ndarray:
        """float64 [n, m]: Pearson's r of some latents with each of another's; 0 where one does not vary."""
        products = (self._columns[:, which].T @ other._columns).toarray() / self.rows
        return np.asarray(products - np.outer(self._mean[which], other._mean))

    def of_pairs(self, other: Firing, pairs: tuple[Tensor, Tensor]) -> Tensor:
        """float64 [k]: Pearson's r of matched latents."""
        mine, its = (one.cpu().numpy() for one in pairs)
        products = np.asarray(self._columns[:, mine].multiply(other._columns[:, its]).sum(0)).reshape(-1) / self.rows
        return torch.from_numpy(products - self._mean[mine] * other._mean[its])


def by_firing(a: Firing, b: Firing, *, one_to_one: bool) -> Matched:
    """Compare latents over the same rows; of latents that do not vary there nothing is said."""
    ab, ba, table = _largest(a, b, keep=one_to_one)
    mine, its = torch.from_numpy(a.alive), torch.from_numpy(b.alive)
    ab_chance, ba_chance, _ = _largest(a, b.shifted(), keep=False)
    pairs = likeness = None
    if table is not None:
        from scipy.optimize import linear_sum_assignment

        rows, columns = (torch.from_numpy(one) for one in linear_sum_assignment(table, maximize=True))
        pairs, likeness = (rows, columns), torch.from_numpy(table)[rows, columns]
    forth, back = _mean(ab[mine]), _mean(ba[its])
    figures: Figures = {
        "correlation": None if forth is None or back is None else (forth + back) / 2,
        "correlation_ab": forth, "correlation_ab_chance": _mean(ab_chance[mine]),
        "correlation_ba": back, "correlation_ba_chance": _mean(ba_chance[its]),
        "correlation_hungarian": None if likeness is None else _mean(likeness),
    }  # fmt: skip
    return Matched(ab, ba, figures, pairs, likeness)


def _largest(a: Firing, b: Firing, *, keep: bool) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """The largest correlation of each latent with one of the other dictionary, both ways; all of them where kept."""
    n, m = len(a.alive), len(b.alive)
    step, parts = max(1, BLOCK // m), []
    ab, ba = np.zeros(n), np.full(m, -np.inf)
    for low in range(0, n, step):
        part = a.correlations(b, slice(low, low + step))
        ab[low : low + step] = part.max(1)
        ba = np.maximum(ba, part.max(0))
        parts += [part] if keep else []
    return torch.from_numpy(ab), torch.from_numpy(ba), np.concatenate(parts) if keep else None


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None
