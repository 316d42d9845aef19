"""One pass over cached rows: how often, how strongly and where every latent of a dictionary fires.

Everything is kept for all latents at once, so that which ones to show can be decided afterwards, from what was seen.
Memory is about 0.5 kB a latent for the histogram and 60 bytes for each of its top + sample entries (110 MB for 24,576
latents and the defaults; merging takes as much again), beside one window's positions and one chunk's rows, however
many rows are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.interpret.examples import BINS, BINS_PER_OCTAVE, LOWEST_OCTAVE
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Latents

BATCH_ROWS = 4096
LEAST_WAITING = 1 << 18


class Dictionary(Protocol):
    """A survey needs these of a dictionary."""

    d_sae: int

    def encode(self, x: Tensor) -> Latents: ...


@dataclass
class Firings:
    """The nonzero latents of some rows: `row` (index into them), `latent` and `value`, each [n]."""

    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray


@contextmanager
def judging(sae: Dictionary) -> Iterator[None]:
    """Within this context there are no gradients, and no choice of latents depends on the batch."""
    training = isinstance(sae, nn.Module) and sae.training
    if isinstance(sae, nn.Module):
        sae.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        if isinstance(sae, nn.Module):
            sae.train(training)


def firings(sae: Dictionary, rows: Tensor) -> Firings:
    """Return the nonzero latents of rows [n, d] (on the dictionary's device), on the CPU."""
    latents = sae.encode(rows)
    if latents.entries is None:
        row, latent = latents.values.nonzero(as_tuple=True)
        value = latents.values[row, latent]
    else:
        value = latents.values.reshape(-1)
        on = value.nonzero().view(-1)
        row, latent, value = latents.entries.row_ids[on], latents.entries.indices[on], value[on]
    return Firings(row.cpu().numpy(), latent.cpu().numpy(), value.float().cpu().numpy())


class Best:
    """For every latent the `n` firings of highest score seen so far, best first, optionally one of each document.

    Streaming loses nothing: a firing leaves the table only for `n` better ones (of other documents), and a document's
    best only ever rises. Equal scores are told apart by position, so the order of arrival does not matter.

    What beats a latent's last entry waits until as much has come together as the table holds, and is then merged in:
    each merge sorts the table, so merging every batch would cost more than encoding it.
    """

    def __init__(self, d_sae: int, n: int, *, one_per_document: bool) -> None:
        self.n, self.one_per_document = n, one_per_document
        self.score = np.full((d_sae, n), -np.inf)
        self.value = np.zeros((d_sae, n), np.float32)
        self.position = np.full((d_sae, n), -1)
        self.document = np.zeros((d_sae, n), np.uint32)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._many = max(LEAST_WAITING, d_sae * n)

    def update(
        self, latent: np.ndarray, score: np.ndarray, value: np.ndarray, position: np.ndarray, document: np.ndarray
    ) -> None:
        """Offer firings, each argument [n]."""
        good = score >= self.score[latent, -1]
        self._waiting.append((latent[good], score[good], value[good], position[good], document[good]))
        if sum(len(columns[0]) for columns in self._waiting) >= self._many:
            self._merge()

    def _merge(self) -> None:
        """Merge the waiting firings into the table."""
        if not self._waiting:
            return
        there = self.position >= 0
        old = np.nonzero(there)[0], self.score[there], self.value[there], self.position[there], self.document[there]
        columns = [np.concatenate(parts) for parts in zip(old, *self._waiting, strict=True)]
        self._waiting.clear()
        latent, score, value, position, document = columns
        order = np.arange(len(latent))
        if self.one_per_document:
            order = np.lexsort((position, -score, document, latent))
            order = order[_first_of_run(latent[order], document[order])]
        order = order[np.lexsort((position[order], -score[order], latent[order]))]
        first = np.flatnonzero(_first_of_run(latent[order]))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        order, rank = order[rank < self.n], rank[rank < self.n]
        place = latent[order], rank
        self.score[place], self.value[place] = score[order], value[order]
        self.position[place], self.document[place] = position[order], document[order]

    def of(self, latent: int) -> list[tuple[float, int, int]]:
        """(value, position, document) of a latent's entries, best first."""
        self._merge()
        there = self.position[latent] >= 0
        columns = self.value[latent][there], self.position[latent][there], self.document[latent][there]
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _first_of_run(*columns: np.ndarray) -> np.ndarray:
    """bool [n]: where a sorted table's key columns differ from the row before."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return first


class Survey:
    """Statistics of every latent over `rows` rows, and its firings worth showing.

    A firing is as strong as its magnitude, for an architecture may let a latent fire with either sign.
    fired: int64 [d_sae], rows in which it fired. total: float64 [d_sae], sum of its magnitudes. max: float32 [d_sae],
    the largest of them (0 for a latent that never fired). histogram: int64 [d_sae, BINS] of them, logarithmic bins.
    top: the strongest firings, one a document. sample: a uniform random sample of all firings; values have their sign.
    """

    def __init__(self, d_sae: int, *, top: int, sample: int, seed: int) -> None:
        self.rows, self.d_sae, self.seed = 0, d_sae, seed
        self.fired = np.zeros(d_sae, np.int64)
        self.total = np.zeros(d_sae)
        self.max = np.zeros(d_sae, np.float32)
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self.top = Best(d_sae, top, one_per_document=True)
        self.sample = Best(d_sae, sample, one_per_document=False)

    def add(self, found: Firings, position: np.ndarray, document: np.ndarray) -> None:
        """Count the firings of rows that came from tokens `position` [rows] of documents `document` [rows]."""
        self.rows += len(position)
        self.fired += np.bincount(found.latent, minlength=self.d_sae)
        strength = np.abs(found.value)
        self.total += np.bincount(found.latent, strength, self.d_sae)
        np.maximum.at(self.max, found.latent, strength)
        octave = np.log2(strength) - LOWEST_OCTAVE
        box = np.clip(np.floor(octave * BINS_PER_OCTAVE), 0, BINS - 1).astype(np.int64)
        np.add.at(self.histogram.reshape(-1), found.latent * BINS + box, 1)
        at, by = position[found.row], document[found.row]
        self.top.update(found.latent, strength.astype(np.float64), found.value, at, by)
        self.sample.update(found.latent, random_scores(found.latent, at, self.seed), found.value, at, by)

    @property
    def live(self) -> np.ndarray:
        """Latents that fired, ascending."""
        return np.flatnonzero(self.fired)


def random_scores(latent: np.ndarray, position: np.ndarray, seed: int) -> np.ndarray:
    """Uniform [0, 1) numbers that depend on the firing and the seed alone (splitmix64, Steele et al. 2014).

    The firings with the highest of them are a uniform sample, whatever the order in which they come.
    """
    salt = (seed * 0xD1342543DE82EF95 + 1) % (1 << 64)
    mixed = latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(salt)
    mixed = _mix(mixed) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(mixed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def survey(
    sae: Dictionary, dataset: Dataset, tokens: TokenStore, rows: int, result: Survey, progress: Progress,
    device: torch.device,
) -> None:  # fmt: skip
    """Add the first `rows` rows that are read of the dataset to `result`, but for those that are not kept."""
    store = dataset.inputs[0]
    progress.start("features: reading rows", rows, "rows")
    try:
        for start, position, document in _windows(store, tokens, rows):
            for first in range(start, start + len(position), store.chunk_rows):
                stop = min(first + store.chunk_rows, start + len(position))
                chunk, inside = dataset.read(first, stop), np.arange(first - start, stop - start)
                if (kept := dataset.kept(first, stop)) is not None:
                    chunk, inside = chunk[kept], inside[kept]
                for at in range(0, len(chunk), BATCH_ROWS):
                    part, where = chunk[at : at + BATCH_ROWS].to(device), inside[at : at + BATCH_ROWS]
                    result.add(firings(sae, part), position[where], document[where])
                progress.advance(stop - first)
    finally:
        progress.finish()


def _windows(store: ActivationStore, tokens: TokenStore, rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, position [n], document [n]) window by window: a window's rows come from neighbouring contexts."""
    length = tokens.context_length
    for window in store.manifest.windows:
        if window.start >= rows:
            return
        position = store.positions(window.start, min(window.stop, rows))
        tokens.expect_positions(position, store)
        first, last = int(position.min()) // length, int(position.max()) // length
        documents = tokens.document_ids(first, last + 1).reshape(-1)
        yield window.start, position, documents[position - first * length]
