"""One pass over cached rows: how often, how strongly and where every latent of a dictionary fires.

Everything is kept for all latents at once, so that which ones to show can be decided afterwards, from what was seen.
Memory a latent, in bytes: 8 BINS for the histogram, 8 WINDOWS for the rates, 36 for each of its top + sample entries
(a few times that while they are merged), together 5 kB or 125 MB for 24,576 latents and the defaults, all of it where
the dictionary is; beside that 20 MB of rows sampled for who fires with whom (`together`), one window's positions and
one chunk's rows, and on a device that runs ahead HELD bytes of codes and a batch, however many are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sae.cache.activations import ActivationStore
from sae.cache.device import landing
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.interpret.best import Best, random_bits
from sae.pipeline.interpret.examples import BINS, BINS_PER_OCTAVE, LOWEST_OCTAVE
from sae.pipeline.interpret.together import Together
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Latents, placement

BATCH_ROWS = 4096
HELD = 1 << 30  # bytes of codes on a device that runs ahead, at which it is waited for
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


def entries(codes: Latents) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value (float32) of the nonzero latents, each [n], by row; how many there are is asked for."""
    if codes.entries is None:
        row, latent = codes.values.nonzero(as_tuple=True)
        return row, latent, codes.values[row, latent].float()
    value = codes.values.reshape(-1)
    on = value.nonzero().view(-1)
    return codes.entries.row_ids[on], codes.entries.indices[on], value[on].float()


def firings(sae: Dictionary, rows: Tensor) -> Firings:
    """Return the nonzero latents of rows [n, d] (on the dictionary's device), on the CPU."""
    return Firings(*(column.cpu().numpy() for column in entries(sae.encode(rows))))


class Survey:
    """Statistics of every latent over rows, of which there are to be `rows`, and its firings worth showing.

    A firing is as strong as its magnitude, for an architecture may let a latent fire with either sign.
    windows: int64 [WINDOWS, d_sae], rows of each equal part of all of them in which a latent fired; window_rows: int64
    [WINDOWS], how many there were. total: float64 [d_sae], sum of a latent's magnitudes. histogram: int64 [d_sae, BINS]
    of them, logarithmic bins. top: the strongest firings, one a document. sample: a
    uniform random sample of all firings; values have their sign. together: which latents fire in the same rows.

    All but window_rows and what is kept of `together` is on `device`. One that runs ahead is not asked how much fired
    in a batch: codes are held until there are HELD bytes of them, and then counted, one batch after the other.
    """

    def __init__(
        self, d_sae: int, *, rows: int, top: int, sample: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.d_sae, self.seed, self._last = d_sae, seed, max(rows, 1)
        self.windows = torch.zeros(WINDOWS, d_sae, dtype=torch.int64, device=device)
        self.window_rows = np.zeros(WINDOWS, np.int64)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.histogram = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)
        self.top = Best(d_sae, top, one_per_document=True, device=device)
        self.sample = Best(d_sae, sample, one_per_document=False, device=device)
        self.together = Together(d_sae, seed)
        self._held: list[tuple[Latents, np.ndarray, np.ndarray, np.ndarray]] = []
        self._bytes = 0

    def add(self, codes: Latents, row: np.ndarray, position: np.ndarray, document: np.ndarray) -> None:
        """Take the codes of rows of these numbers, from tokens `position` of documents `document`, each [rows]."""
        codes = Latents(codes.values, codes.entries, codes.d_sae)
        self._held.append((codes, row, position, document))
        self._bytes += codes.values.nbytes + (0 if codes.entries is None else codes.entries.indices.nbytes)
        if self._bytes >= HELD or not placement.runs_ahead(codes.values):
            self.settle()

    def settle(self) -> None:
        """Count what is held; a device is waited for."""
        for held in self._held:
            self._count(*held)
        self._held.clear()
        self._bytes = 0

    def _count(self, codes: Latents, number: np.ndarray, position: np.ndarray, document: np.ndarray) -> None:
        row, latent, value = entries(codes)
        window = number * WINDOWS // self._last
        self.window_rows += np.bincount(window, minlength=WINDOWS)
        places = torch.from_numpy(np.stack([window, position, document])).to(row.device)
        part, at, by = places[:, row]
        one, strength = torch.ones_like(latent), value.abs()
        bits = strength.view(torch.int32).long()  # ordered as what they stand for
        self.windows.view(-1).index_add_(0, part * self.d_sae + latent, one)
        self.histogram.view(-1).index_add_(0, latent * BINS + boxes(bits), one)
        # in a fixed order on a GPU, too, which `index_add_` is not
        self.total += torch.zeros_like(self.total).index_put_((latent,), strength.double(), accumulate=True)
        self.top.update(latent, bits, value, at, by)
        self.sample.update(latent, random_bits(latent, at, self.seed), value, at, by)
        self.together.add(row, latent, position)

    @property
    def rows(self) -> int:
        """Rows that were counted."""
        return int(self.window_rows.sum())


def boxes(bits: Tensor) -> Tensor:
    """int64 [n]: the bin of each magnitude, from the bits of its float32 [n].

    A bin begins at the float32 nearest to `EDGES` of it, whatever computes: at a power of two or at that of sqrt 2.
    """
    half = (bits & 0x7FFFFF) >= 0x3504F3  # the fraction of sqrt 2
    return (((bits >> 23) - 127 - LOWEST_OCTAVE) * BINS_PER_OCTAVE + half).clamp(0, BINS - 1)


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
                    part, which = landing.moved(chunk[at : at + BATCH_ROWS], device), number[at : at + BATCH_ROWS]
                    result.add(sae.encode(part), which, position[which - start], document[which - start])
                progress.advance(stop - first)
        result.settle()
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
