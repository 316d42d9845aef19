"""The text that latents are explained from, and the other text that explanations are judged on.

The tokens of a store are cut into windows that lie in one document each. Tokens that have no row (begin tokens, rows
left out for their norm) are in no window: nobody knows whether a latent fires on them. A seeded draw sends every
document to one of two halves: windows of one half are shown to whoever explains, those of the other are judged on, and
one whose tokens were shown in the first is left out.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sae.cache.errors import DamagedStore
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.explain.config import LEAST
from sae.pipeline.interpret.best import random_scores
from sae.pipeline.interpret.survey import BATCH_ROWS, Dictionary, firings, judging
from sae.pipeline.runtime.progress import Progress

SHORTEST = 4  # tokens in a window
DENSEST = 0.2  # of rows: latents that fire on more say little by where they fire
EXPLAINED, JUDGED = 0, 1  # the halves


@dataclass(frozen=True)
class Window:
    """Some tokens of one document that follow each other, and the magnitude of a latent on each.

    texts: of the tokens; a character that is split over tokens stands where it is complete. position: of its first
    token in the token store.
    """

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    activations: tuple[float, ...]
    document: int
    position: int

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def fires(self) -> tuple[bool, ...]:
        """On which tokens the latent fires."""
        return tuple(bool(value) for value in self.activations)


@dataclass(frozen=True)
class Material:
    """What one latent is explained from and judged on.

    examples: windows in which it fires, the strongest first. active, silent: others, of other documents. density: the
    share of rows on which it fires.
    """

    latent: int
    density: float
    examples: tuple[Window, ...]
    active: tuple[Window, ...]
    silent: tuple[Window, ...]

    @property
    def lacks(self) -> str | None:
        """What there is too little of, in words; None where there is enough."""
        there = {
            "it fires in to explain it from": self.examples, "it fires in to judge on": self.active,
            "it is silent in to judge on": self.silent,
        }  # fmt: skip
        few = [f"{len(windows)} contexts {what}" for what, windows in there.items() if len(windows) < LEAST]
        return f"{few[0]}, of {LEAST} at least; search more `rows`" if few else None


class Corpus:
    """The first rows of a dataset, and where chosen latents fire on them. Takes some 25 bytes a token of them.

    Everything is in the order of the token store: `place` numbers its tokens from the first of the first context.
    """

    def __init__(self, dataset: Dataset, tokens: TokenStore, rows: int, *, window: int, seed: int) -> None:
        self.dataset, self.rows, self.seed, self.source = dataset, rows, seed, tokens.path
        store = dataset.inputs[0]
        self.places = store.positions(0, rows).astype(np.int64)
        tokens.expect_positions(self.places, store)
        if (kept := dataset.kept(0, rows)) is not None:
            self.kept = np.flatnonzero(kept)
            self.places = self.places[kept]
        else:
            self.kept = np.arange(rows)
        length = tokens.context_length
        contexts = int(self.places.max()) // length + 1 if len(self.places) else 0
        self.tokens = tokens.contexts(0, contexts).astype(np.uint32).reshape(-1)
        self.vocabulary = tokens.vocabulary()
        self._cut(tokens.document_ids(0, contexts), window)

    def _cut(self, documents: np.ndarray, window: int) -> None:
        """Cut the contexts [C, T] into windows: each of tokens with a row, in one context and one document."""
        place = np.arange(documents.shape[1], dtype=np.int32)[None, :]
        has_row = np.zeros(documents.shape, bool)
        has_row.reshape(-1)[self.places] = True
        new = np.ones(documents.shape, bool)
        new[:, 1:] = (documents[:, 1:] != documents[:, :-1]) | ~has_row[:, :-1]
        begin = np.maximum.accumulate(np.where(new, place, 0), axis=1)
        first = (((place - begin) % window == 0) & has_row).reshape(-1)
        self.starts = np.flatnonzero(first)
        self.window_of = np.where(has_row.reshape(-1), first.cumsum() - 1, -1).astype(np.int64)
        self.lengths = np.bincount(self.window_of[self.places], minlength=len(self.starts))
        self.good = self.lengths >= SHORTEST
        self.documents = documents.reshape(-1)[self.starts].astype(np.int64)
        drawn = random_scores(np.zeros_like(self.documents), self.documents, self.seed)
        self.half = np.where(drawn < 0.5, EXPLAINED, JUDGED)

    @torch.no_grad()
    def fire(self, sae: Dictionary, progress: Progress, device: torch.device, title: str) -> Iterator[tuple]:
        """(place, latent, magnitude) of what fires, each [n], a batch of rows at a time."""
        progress.start(title, len(self.kept), "rows")
        chunk = self.dataset.inputs[0].chunk_rows
        try:
            with judging(sae):
                for begin in range(0, self.rows, chunk):
                    low, high = np.searchsorted(self.kept, (begin, begin + chunk))
                    if low == high:
                        continue
                    rows = self.dataset.read(begin, min(begin + chunk, self.rows))[self.kept[low:high] - begin]
                    for at in range(0, len(rows), BATCH_ROWS):
                        found = firings(sae, rows[at : at + BATCH_ROWS].to(device))
                        yield self.places[low + at + found.row], found.latent, np.abs(found.value)
                    progress.advance(int(high - low))
        finally:
            progress.finish()

    def candidates(self, sae: Dictionary, progress: Progress, device: torch.device) -> np.ndarray:
        """Latents that fire on some tokens of both halves and not on most, in a seeded random order."""
        fired = np.zeros((2, sae.d_sae), np.int64)
        for place, latent, _ in self.fire(sae, progress, device, "explain: which latents fire"):
            half = self.half[self.window_of[place]]
            for side in (EXPLAINED, JUDGED):
                fired[side] += np.bincount(latent[half == side], minlength=sae.d_sae)
        enough = (fired >= LEAST).all(axis=0) & (fired.sum(axis=0) <= DENSEST * max(1, len(self.kept)))
        return np.random.default_rng(self.seed).permutation(np.flatnonzero(enough))

    def materials(
        self, sae: Dictionary, latents: Sequence[int], sizes: tuple[int, int, int], progress: Progress,
        device: torch.device,
    ) -> list[Material]:  # fmt: skip
        """What each of some latents is explained from and judged on; `sizes`: examples, active and silent windows."""
        wanted = np.zeros(sae.d_sae, bool)
        wanted[[*latents]] = True
        parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        for found in self.fire(sae, progress, device, "explain: contexts"):
            keep = wanted[found[1]]
            parts.append(tuple(column[keep] for column in found))
        place, latent, value = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.lexsort((place, latent))
        place, latent, value = place[order], latent[order], value[order]
        bounds = {one: np.searchsorted(latent, (one, one + 1)) for one in latents}
        return [self._material(one, place[slice(*bounds[one])], value[slice(*bounds[one])], sizes) for one in latents]

    def _material(self, latent: int, place: np.ndarray, value: np.ndarray, sizes: tuple[int, int, int]) -> Material:
        random = np.random.default_rng((self.seed, latent))
        strength = np.zeros(len(self.starts), np.float32)
        np.maximum.at(strength, self.window_of[place], value)
        on = (strength > 0) & self.good
        values = dict(zip(place.tolist(), value.tolist(), strict=True))
        shown: set[bytes] = set()
        chosen = []
        for half, size in ((EXPLAINED, sizes[0]), (JUDGED, sizes[1])):
            order = self._order(np.flatnonzero(on & (self.half == half)), strength, size, random)
            picked = self._different(order, size, shown)
            chosen.append(sorted(picked, key=lambda i: (-strength[i], i)))
        quiet = random.permutation(np.flatnonzero((strength == 0) & self.good & (self.half == JUDGED)))
        silent = self._different(self._as_long_as(chosen[JUDGED], quiet), sizes[2], shown)
        made = [tuple(self._window(int(i), values) for i in each) for each in (*chosen, silent)]
        return Material(latent, len(place) / max(1, len(self.kept)), *made)

    def _order(
        self, windows: np.ndarray, strength: np.ndarray, size: int, random: np.random.Generator
    ) -> Iterable[int]:
        """Windows in which a latent fires: half as many as are wanted its strongest, one a document; then any."""
        ranked = windows[np.lexsort((windows, -strength[windows]))]
        _, first = np.unique(self.documents[ranked], return_index=True)
        strongest = ranked[np.sort(first)][: size // 2]
        return [*strongest.tolist(), *random.permutation(np.setdiff1d(windows, strongest)).tolist()]

    def _different(self, order: Iterable[int], size: int, shown: set[bytes]) -> list[int]:
        """The first windows of an order whose tokens were not shown yet."""
        picked: list[int] = []
        for i in order:
            text = self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]].tobytes()
            if text not in shown:
                shown.add(text)
                picked.append(int(i))
            if len(picked) == size:
                break
        return picked

    def _as_long_as(self, others: Sequence[int], windows: np.ndarray) -> Iterator[int]:
        """Windows, each of about the length of another: in a longer one, any token is likelier to be."""
        left = np.ones(len(windows), bool)
        for i in range(len(windows) if others else 0):
            off = np.abs(self.lengths[windows] - self.lengths[others[i % len(others)]])
            at = int(np.where(left, off, np.iinfo(np.int64).max).argmin())
            left[at] = False
            yield int(windows[at])

    def _window(self, i: int, values: dict[int, float]) -> Window:
        start, stop = int(self.starts[i]), int(self.starts[i] + self.lengths[i])
        ids = self.tokens[start:stop].tolist()
        if ids and max(ids) >= len(self.vocabulary):
            raise DamagedStore(f"{self.source}: its vocabulary has no token {max(ids)}; tokenize again to restore it")
        activations = tuple(values.get(place, 0.0) for place in range(start, stop))
        texts = spelled([self.vocabulary[token] for token in ids])
        return Window(tuple(ids), texts, activations, int(self.documents[i]), start)


def spelled(tokens: Sequence[bytes]) -> tuple[str, ...]:
    """Each token as text; what is no UTF-8 becomes the sign for that."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(tokens) - 1
    return tuple(decoder.decode(token, final=i == last) for i, token in enumerate(tokens))
