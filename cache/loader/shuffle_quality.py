"""Quality of the loader's shuffle: what the rows of a batch have in common, measured on its own schedule.

Rows of one document resemble each other. Where a row is its document's effect (a share `rho` of the variance) plus
noise, the variance of batch means follows from how many rows of each document a batch has, so no activation is read:
only `position`, the schedule, and which document each token belongs to. Without the token store the context stands for
the document; documents longer than a context are then not seen as one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae.cache.activations import ActivationStore
from sae.cache.catalogue import of_recipe
from sae.cache.errors import SaeError
from sae.cache.loader.schedule import OPEN_CHUNKS, LoaderPosition, Schedule
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore

SPARSE = 64  # documents or contexts for each row, at most, that are counted by their own numbers
MOST_ROWS = 1 << 24  # of the store; four bytes each are held
MOST_STRETCHES = 64
STRETCH = 5  # consecutive batches that are looked at together


@dataclass(frozen=True)
class Mixing:
    """Means over batches of an epoch.

    `variance_ratio`: variance of batch means about the mean of all rows, times the batch, over the variance of a row:
    1 for rows drawn independently. `correlation`: of the means of consecutive batches, 0 where independent.
    """

    unit: str  # "document" or "context"
    rho: float
    batch: int
    open_chunks: int
    rows: int
    batches: int
    variance_ratio: float
    correlation: float
    distinct: float  # units in a batch
    most: float  # rows of one unit in a batch

    def as_json(self) -> dict[str, Any]:
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def mixing(
    store: ActivationStore,
    tokens: TokenStore | None = None,
    *,
    batch: int = 4096,
    open_chunks: int = OPEN_CHUNKS,
    seed: int = 0,
    rho: float = 0.3,
) -> Mixing:
    """Measure a loader of these settings on a store (its first 16.8M rows; up to 320 batches, evenly spread).

    Raises SaeError for a store with fewer rows than a batch, or whose rows do not come from contexts of tokens.
    """
    rows = min(store.n_rows, MOST_ROWS)
    if rows < batch:
        raise SaeError(f"{store.path}: has {rows:,} rows, a batch {batch:,}; harvest more")
    units = _units(store, rows, tokens)
    share = np.bincount(units) / rows
    ratios, products, distinct, most = [], [], [], []
    for stretch in _stretches(Schedule(rows, store.chunk_rows, batch, open_chunks, seed), batch):
        before: np.ndarray | None = None
        for low in range(0, len(stretch) - batch + 1, batch):
            counts = np.bincount(units[stretch[low : low + batch]], minlength=len(share))
            off = counts - batch * share
            ratios.append(float(off @ off) / batch)
            if before is not None:
                products.append(float(off @ before) / batch)
            before = off
            distinct.append(np.count_nonzero(counts))
            most.append(int(counts.max()))
    row = 1 - rho * float(share @ share)  # variance of a row about the mean of all
    ratio = (1 - rho + rho * float(np.mean(ratios))) / row
    shared = rho * float(np.mean(products)) / row if products else 0.0
    return Mixing(
        "context" if tokens is None else "document", rho, batch, open_chunks, rows, len(ratios), ratio, shared / ratio,
        float(np.mean(distinct)), float(np.mean(most)),
    )  # fmt: skip


def mixing_of(root: Path, store: Store) -> Mixing:
    """The same for a store of the cache at `root`, with its token store where that is there, and the usual settings
    (of a store with fewer rows than a batch: all of them)."""
    if not isinstance(store, ActivationStore):
        raise SaeError(f"shuffle_quality = True: {store.key} holds {store.kind}; name a store of activations")
    if "tokens" not in store.recipe:
        raise SaeError(
            f"shuffle_quality = True: the rows of {store.key} come from no documents, so there is nothing to mix"
        )
    tokens = of_recipe(root, TokenStore, store.recipe["tokens"])
    return mixing(store, tokens, batch=min(4096, store.n_rows))


def _units(store: ActivationStore, rows: int, tokens: TokenStore | None) -> np.ndarray:
    """The document (or context) of every row, by a number from 0 on: int32 [rows]."""
    length = store.recipe["tokens"].get("context_length")
    if length is None:
        raise SaeError(f"{store.path}: its rows do not come from contexts of tokens, so there is no telling them apart")
    units = np.empty(rows, np.int64)
    for low in range(0, rows, store.chunk_rows):
        high = min(low + store.chunk_rows, rows)
        positions = store.positions(low, high)
        context, place = np.divmod(positions, length)
        if tokens is not None:
            tokens.expect_positions(positions, store)
            first = int(context.min())
            context = tokens.document_ids(first, int(context.max()) + 1)[context - first, place]
        units[low:high] = context
    if int(units.max()) > SPARSE * rows:  # as no writer of ours numbers them: counting them would take the memory
        units = np.unique(units, return_inverse=True)[1]
    return units.astype(np.int32)


def _stretches(schedule: Schedule, batch: int) -> Iterator[np.ndarray]:
    """Rows of a few consecutive whole batches, at evenly spread places of the first epoch."""
    for number in range(min(MOST_STRETCHES, max(1, schedule.rows // (STRETCH * batch)))):
        step = number * schedule.steps // MOST_STRETCHES if schedule.steps >= MOST_STRETCHES else number
        parts: list[np.ndarray] = []
        place = LoaderPosition(0, step)
        while place.epoch == 0 and sum(map(len, parts)) < STRETCH * batch:
            spans = schedule.spans(0, place.step)
            sizes = spans.stop - spans.start
            parts.append(np.repeat(spans.start - np.cumsum(sizes) + sizes, sizes) + np.arange(spans.rows))
            place = schedule.after(place, spans.rows, None)[1]
        if parts:
            yield np.concatenate(parts)
