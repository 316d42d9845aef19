"""One pass over cached rows: how often, how strongly and where every latent of a dictionary fires.

Everything is kept for all latents at once, so that which ones to show can be decided afterwards, from what was seen.
Memory a latent, in bytes: 8 BINS for the histogram, 8 WINDOWS for the rates, 32 for each of its top + sample entries
(twice that while they are merged), together 5 kB or 125 MB for 24,576 latents and the defaults; beside that 20 MB of
rows sampled for who fires with whom (`together`), one window's positions and one chunk's rows, however many are read.
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
from sae.pipeline.interpret.best import Best, random_scores
from sae.pipeline.interpret.examples import BINS, BINS_PER_OCTAVE, LOWEST_OCTAVE
from sae.pipeline.interpret.together import Together
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Latents

BATCH_ROWS = 4096
WINDOWS = 8  # equal parts of the rows that are read, whose rates are told apart


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


class Survey:
    """Statistics of every latent over rows, of which there are to be `rows`, and its firings worth showing.

    A firing is as strong as its magnitude, for an architecture may let a latent fire with either sign.
    windows: int64 [WINDOWS, d_sae], rows of each equal part of all of them in which a latent fired; window_rows: int64
    [WINDOWS], how many there were. total: float64 [d_sae], sum of a latent's magnitudes. histogram: int64 [d_sae, BINS]
    of them, logarithmic bins. top: the strongest firings, one a document. sample: a uniform random sample of all
    firings; values have their sign. together: which latents fire in the same rows.
    """

    def __init__(self, d_sae: int, *, rows: int, top: int, sample: int, seed: int) -> None:
        self.d_sae, self.seed, self._last = d_sae, seed, max(rows, 1)
        self.windows = np.zeros((WINDOWS, d_sae), np.int64)
        self.window_rows = np.zeros(WINDOWS, np.int64)
        self.total = np.zeros(d_sae)
        self.histogram = np.zeros((d_sae, BINS), np.int64)
        self.top = Best(d_sae, top, one_per_document=True)
        self.sample = Best(d_sae, sample, one_per_document=False)
        self.together = Together(d_sae, seed)

    def add(self, found: Firings, row: np.ndarray, position: np.ndarray, document: np.ndarray) -> None:
        """Count the firings of rows of these numbers, from tokens `position` of documents `document`, each [rows]."""
        window = row * WINDOWS // self._last
        self.window_rows += np.bincount(window, minlength=WINDOWS)
        np.add.at(self.windows.reshape(-1), window[found.row] * self.d_sae + found.latent, 1)
        strength = np.abs(found.value)
        self.total += np.bincount(found.latent, strength, self.d_sae)
        octave = np.log2(strength) - LOWEST_OCTAVE
        box = np.clip(np.floor(octave * BINS_PER_OCTAVE), 0, BINS - 1).astype(np.int64)
        np.add.at(self.histogram.reshape(-1), found.latent * BINS + box, 1)
        at, by = position[found.row], document[found.row]
        self.top.update(found.latent, strength.astype(np.float64), found.value, at, by)
        self.sample.update(found.latent, random_scores(found.latent, at, self.seed), found.value, at, by)
        self.together.add(found.row, found.latent, position)

    @property
    def rows(self) -> int:
        """Rows that were counted."""
        return int(self.window_rows.sum())


def survey(
    sae: Dictionary, dataset: Dataset, tokens: TokenStore | None, rows: int, result: Survey, progress: Progress,
    device: torch.device,
) -> None:  # fmt: skip
    """Add the first `rows` rows that are read of the dataset to `result`, but for those that are not kept.

    Of rows that come from no text, each is a document of its own.
    """
    store = dataset.inputs[0]
    progress.start("features: reading rows", rows, "rows")
    try:
        for start, position, document in _windows(store, tokens, rows):
            for first in range(start, start + len(position), store.chunk_rows):
                stop = min(first + store.chunk_rows, start + len(position))
                chunk, number = dataset.read(first, stop), np.arange(first, stop)
                if (kept := dataset.kept(first, stop)) is not None:
                    chunk, number = chunk[kept], number[kept]
                for at in range(0, len(chunk), BATCH_ROWS):
                    part, which = chunk[at : at + BATCH_ROWS].to(device), number[at : at + BATCH_ROWS]
                    result.add(firings(sae, part), which, position[which - start], document[which - start])
                progress.advance(stop - first)
    finally:
        progress.finish()


def _windows(
    store: ActivationStore, tokens: TokenStore | None, rows: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first row, position [n], document [n]) window by window: a window's rows come from neighbouring contexts."""
    for window in store.manifest.windows:
        if window.start >= rows:
            return
        position = store.positions(window.start, min(window.stop, rows))
        if tokens is None:
            yield window.start, position, position
            continue
        length = tokens.context_length
        tokens.expect_positions(position, store)
        first, last = int(position.min()) // length, int(position.max()) // length
        documents = tokens.document_ids(first, last + 1).reshape(-1)
        yield window.start, position, documents[position - first * length].astype(np.int64)
