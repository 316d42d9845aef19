"""Rows that lie so far out that they are left out: one rule, for whatever reads rows to train or to judge.

A row is left out where its norm, as the store keeps it, is above a largest norm: a multiple of the median norm of the
training store's first window. That number stays the same however the store grows, and holds for held-out rows, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError

Limits = tuple[float | None, ...]
"""The largest norm that a row may have in each of aligned stores; None: any."""


def largest_norm(store: ActivationStore, multiple: float) -> float:
    """The largest norm a row of a training store may have, in multiples of the usual one. Raises SaeError for none."""
    if not multiple > 1:
        raise SaeError(f"outliers = {multiple:g}: rows around the median norm must stay; try 10")
    usual = usual_norm(store)
    if not usual:
        raise SaeError(f"outliers = {multiple:g}: the first rows of {store.path} are all zero; leave it unset")
    return times(multiple, usual)


def usual_norm(store: ActivationStore) -> float:
    """Median norm of the rows of the first window (on which the columns were calibrated), rows of zeros left out."""
    norms = store.norms(0, store.manifest.windows[0].stop)
    return float(np.median(norms[norms > 0].astype(np.float64))) if norms.any() else 0.0


def times(multiple: float, usual: float) -> float:
    """A multiple of a norm, or the largest number that a norm can be."""
    return min(multiple * usual, float(np.finfo(np.float32).max))


def within(stores: Sequence[ActivationStore], limits: Limits, start: int, stop: int) -> np.ndarray:
    """bool [stop - start]: which rows are above the largest norm in none of the stores."""
    kept = np.ones(stop - start, bool)
    for store, most in zip(stores, limits, strict=True):
        if most is not None:
            kept &= store.norms(start, stop) <= most
    return kept


class Outliers:
    """Rows that lie far out in any of the stores: ascending row numbers, chunk by chunk of `chunk_rows` rows."""

    def __init__(self, stores: Sequence[ActivationStore], chunk_rows: int, limits: Limits) -> None:
        self._stores, self._chunk_rows, self._limits = stores, chunk_rows, limits
        self._rows = lru_cache(maxsize=256)(self._find)

    def __call__(self, chunk: int) -> np.ndarray:
        return self._rows(chunk)

    def _find(self, chunk: int) -> np.ndarray:
        low = chunk * self._chunk_rows
        high = min(low + self._chunk_rows, *(store.n_rows for store in self._stores))
        return low + np.flatnonzero(~within(self._stores, self._limits, low, high))
