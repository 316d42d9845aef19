"""Which rows lie so far out that they are left out: one rule, for whatever reads rows to train or to judge.

A row is left out where its norm, as the store keeps it, is above a largest norm: a multiple of the median norm of the
training store's first window. That number stays the same however the store grows, and holds for held-out rows, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError

if TYPE_CHECKING:
    from torch import Tensor


def largest_norm(store: ActivationStore, multiple: float) -> float:
    """The largest norm a row of a training store may have, in multiples of the usual one. Raises SaeError for none."""
    if not multiple > 1:
        raise SaeError(f"outliers = {multiple:g}: rows around the median norm must stay; try 10")
    usual = usual_norm(store)
    if not usual:
        raise SaeError(f"outliers = {multiple:g}: the first rows of {store.path} are all zero; leave it unset")
    return multiple * usual


def usual_norm(store: ActivationStore) -> float:
    """Median norm of the rows of the first window (on which the columns were calibrated), rows of zeros left out."""
    norms = store.norms(0, store.manifest.windows[0].stop)
    return float(np.median(norms[norms > 0])) if norms.any() else 0.0


class Outliers:
    """Rows that lie far out in any of the stores: ascending row numbers, chunk by chunk of `chunk_rows` rows."""

    def __init__(self, stores: Sequence[ActivationStore], chunk_rows: int, largest: Sequence[float]) -> None:
        self._stores, self._chunk_rows, self._largest = stores, chunk_rows, largest
        self._rows = lru_cache(maxsize=256)(self._find)

    def __call__(self, chunk: int) -> np.ndarray:
        return self._rows(chunk)

    def _find(self, chunk: int) -> np.ndarray:
        low = chunk * self._chunk_rows
        high = min(low + self._chunk_rows, *(store.n_rows for store in self._stores))
        far = [store.norms(low, high) > most for store, most in zip(self._stores, self._largest, strict=True)]
        return low + np.flatnonzero(np.logical_or.reduce(far))


def kept_rows(store: ActivationStore, start: int, stop: int, largest: float | None) -> Tensor:
    """float32 [n, d]: rows [start, stop) without those above the largest norm (None: all of them)."""
    rows = store.rows(start, stop)
    return rows if largest is None else rows[store.norms(start, stop) <= largest]


def some_rows(
    store: ActivationStore, first: int, count: int, *, rows: int, batch: int, largest: float | None
) -> Iterator[Tensor]:
    """The next `count` rows that are kept, from row `first` on and around the end of the first `rows`, in batches.

    Fewer where fewer are kept; none twice. No batch is empty, and none has more than `batch` rows.
    """
    for low, high in ((first, rows), (0, first)):
        for start in range(low, high, batch):
            # without a limit the number of rows that are still wanted is the number to read
            wanted = min(batch, high - start, count if largest is None else batch)
            found = kept_rows(store, start, start + wanted, largest)[:count]
            count -= len(found)
            if len(found):
                yield found
            if not count:
                return


def outlier_rows(store: ActivationStore, rows: int, largest: float, batch: int) -> Iterator[Tensor]:
    """Those of a store's first rows that are left out, in batches of up to `batch` rows."""
    for start in range(0, rows, store.chunk_rows):
        stop = min(start + store.chunk_rows, rows)
        far = store.norms(start, stop) > largest
        if far.any():
            yield from store.rows(start, stop)[far].split(batch)


def expect_kept(store: ActivationStore, count: int, largest: float, option: str) -> None:
    """Raise SaeError, naming the option that asked for `count` rows, where fewer of a store's are kept."""
    kept = 0
    for start in range(0, store.n_rows, store.chunk_rows):
        kept += int((store.norms(start, min(start + store.chunk_rows, store.n_rows)) <= largest).sum())
        if kept >= count:
            return
    raise SaeError(
        f"{option} {count}: train.outliers leaves {kept:,} of the {store.n_rows:,} rows of {store.key}; lower it, "
        "allow larger norms, or harvest more"
    )
