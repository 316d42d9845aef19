"""The rows of a store that lie far out: how many, where they stand, what share of the variance is theirs; and the rule
by which training leaves out massive ones.

In a language model a few rows, those of the tokens that attention rests on, are up to a hundred times as long as the
others, and all point the same way. There is little to learn of these, and sums over rows are sums over them. So rows
above MEDIANS times the usual norm are massive where they are FEW at most, hold SHARE of the variance or more, and are
ALIKE. Heavy tails of anything else point everywhere, and are kept.

Norms and positions are those the store has of every row. Variance and directions are those of the rows as they are
read: of all rows of a store of up to SAMPLE, else of the chunks of its first ones and of those with its first far ones,
whose squares are then taken as large as the norms of all far ones say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from sae.cache.activations import ActivationStore
from sae.cache.outliers import largest_norm, times, usual_norm
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.store.codecs import OUTLIER_NORM

if TYPE_CHECKING:
    from torch import Tensor

MEDIANS = OUTLIER_NORM  # beyond which codecs, too, do not count on a row
FEW = 0.1  # of all rows
SHARE = 0.05  # of the variance; below it, nothing changes without them
ALIKE = 0.9  # length of the mean of their unit vectors: 0.99 in language models, below 0.8 in any heavy tail tried
SAMPLE, FAR_SAMPLE = 16_384, 8  # rows that are looked at, where a store has more
TINY = 1e-300
MOST_SHOWN, MOST_TOLD = 4, 32  # positions in a line, in JSON

OutlierRule = float | Literal["auto"] | None
"""Which rows to leave out: above so many usual norms; the massive ones; none."""


class FarRows(NamedTuple):
    """Those of the first `of` rows of a store whose norm is above `largest_norm`.

    rows: how many they are. norm: their median norm. usual: that of the first window. share: of the variance of all
    rows, that is theirs. alike: how far they point the same way, seen from the usual rows' mean: 1 for one direction.
    positions: how many stand at each position of a context, the most first; none where rows are of no tokens.
    """

    rows: int
    of: int
    largest_norm: float
    norm: float
    usual: float
    share: float
    alike: float
    positions: dict[int, int]

    @property
    def notable(self) -> bool:
        """Return True if whoever reads sums over the rows should know of these."""
        return self.share >= SHARE

    @property
    def massive(self) -> bool:
        """Return True if they are what the rule leaves out."""
        return self.notable and self.rows <= FEW * self.of and self.alike >= ALIKE

    def as_json(self) -> dict[str, Any]:
        """All of it, for `--json`, but for the positions of fewest rows where there are many."""
        positions = {str(position): rows for position, rows in [*self.positions.items()][:MOST_TOLD]}
        return {**self._asdict(), "massive": self.massive, "positions": positions}

    def __str__(self) -> str:
        here = f", at position{'s' if len(self.positions) > 1 else ''} {self._listed()}" if self.positions else ""
        return (
            f"{self.rows:,} of {self.of:,} rows have a norm above {_short(self.largest_norm)} (their median "
            f"{_short(self.norm)}, the usual one {_short(self.usual)}{here}) and hold {100 * self.share:.3g} % of the "
            "variance"
        )

    def _listed(self) -> str:
        first = [*self.positions][:MOST_SHOWN]
        more = len(self.positions) - len(first)
        return ", ".join(map(str, first)) + (f" and {more:,} more" if more else "")


def limit_of(store: ActivationStore, rule: OutlierRule, rows: int) -> float | None:
    """The largest norm a rule allows the first rows of a training store; None: any. SaeError where it has no sense."""
    if rule != "auto":
        return None if rule is None else largest_norm(store, rule)
    found = beyond_usual(store, rows)
    return found.largest_norm if found is not None and found.massive else None


def beyond_usual(store: ActivationStore, rows: int) -> FarRows | None:
    """The first rows of a training store that are MEDIANS times as long as usual, or longer; None where none is."""
    usual = usual_norm(store) if rows else 0.0
    return far_rows(store, times(MEDIANS, usual), rows) if usual else None


@lru_cache(maxsize=64)  # a sweep asks for each of its dictionaries
def far_rows(store: ActivationStore, largest: float, rows: int) -> FarRows | None:
    """Those of the first rows of a store that are above a norm; None where none is."""
    origin = provenance(store.recipe)
    length = origin.text.context_length if isinstance(origin, LanguageModelRows) else None
    norms: list[np.ndarray] = []
    positions: Counter[int] = Counter()
    for start, stop in _chunks(store, rows):
        among = store.norms(start, stop)
        if (far := among > largest).any():
            norms.append(among[far])
            if length is not None:
                positions.update((store.positions(start, stop)[far] % length).tolist())
    if not norms:
        return None
    every = np.concatenate(norms).astype(np.float64)
    share, alike = _share_and_likeness(store, largest, rows, every)
    in_order = dict(sorted(positions.items(), key=lambda pair: (-pair[1], pair[0])))
    return FarRows(len(every), rows, largest, float(np.median(every)), usual_norm(store), share, alike, in_order)


def _chunks(store: ActivationStore, rows: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + store.chunk_rows, rows)) for start in range(0, rows, store.chunk_rows))


def _share_and_likeness(store: ActivationStore, largest: float, rows: int, norms: np.ndarray) -> tuple[float, float]:
    """Of the first rows those above a norm, with these norms: their share of the variance, and how alike they are."""
    far, others, squares = _Sums(store.d), _Sums(store.d), 0.0
    for start, stop in _chunks(store, rows):
        if start >= SAMPLE and far.rows >= FAR_SAMPLE:
            break
        among = (here := store.norms(start, stop)) > largest
        if start < SAMPLE or among.any():
            values = store.rows(start, stop) - store.columns.mean  # which is near that of the usual rows
            far.add(values[among])
            others.add(values[~among])
            squares += _squared(here[among])
    usual = rows - len(norms)
    mean = (len(norms) * far.mean + usual * others.mean) / rows
    held, rest = far.rows * far.variance(mean) * (_squared(norms) / squares), usual * others.variance(mean)
    return (held / (held + rest) if held else 0.0), far.likeness


def _squared(norms: np.ndarray) -> float:
    return float(np.square(norms, dtype=np.float64).sum())


class _Sums:
    """Sums over some rows, float64: of them, of their unit vectors and of their squared norms."""

    def __init__(self, d: int) -> None:
        import torch

        self.rows, self._squares = 0, 0.0
        self._sum, self._units = torch.zeros(2, d, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        rows = rows.double()
        norms = rows.norm(dim=1, keepdim=True)
        self.rows += len(rows)
        self._sum += rows.sum(0)
        self._units += (rows / norms.clamp_min(TINY)).sum(0)
        self._squares += float(norms.square().sum())

    @property
    def mean(self) -> Tensor:
        return self._sum / max(1, self.rows)

    @property
    def likeness(self) -> float:
        """Length of the mean of the unit vectors."""
        return float(self._units.norm()) / max(1, self.rows)

    def variance(self, mean: Tensor) -> float:
        """Mean squared distance from a point; 0 of no rows."""
        if not self.rows:
            return 0.0
        return max(0.0, self._squares / self.rows + float(((mean - 2 * self.mean) * mean).sum()))


def _short(norm: float) -> str:
    return f"{norm:,.0f}" if norm >= 1000 else f"{norm:.3g}"
