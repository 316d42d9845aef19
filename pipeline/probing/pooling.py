"""Texts through the language model, each to one row: of activations, and of every dictionary's latents.

A text is laid out as the contexts were that a dictionary was trained on (the begin token first, where those have one),
and the tokens that would have become rows of its store are those that are pooled. Latents are pooled, not activations:
the mean over tokens of what each latent is there. One pass serves every dictionary and every place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import canonical
from sae.cache.errors import SaeError
from sae.cache.provenance import LanguageModelRows, provenance
from sae.pipeline.interpret.survey import firings, judging
from sae.pipeline.language_model import LanguageModel, Point, hints
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.probing.config import Pool
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.saes.contract import LatentCoder
from sae.pipeline.tokenize.encoding import encoded
from sae.pipeline.tokenizers.located import tokenizer_of
from sae.pipeline.tokenizers.tokenizer import Tokenizer

ELEMENTS = 1 << 26  # latents of rows that are held at a time
Points = tuple[Point, ...]


class Read(NamedTuple):
    """A text as tokens: ids [t] with the begin token, and which of them become rows, bool [t]."""

    ids: np.ndarray
    kept: np.ndarray


class Pooled(NamedTuple):
    """Rows of n texts: of activations [n, d] by their points, and of latents [n, d_sae], a matrix a dictionary."""

    activations: dict[Points, np.ndarray]
    latents: list[Any]


@dataclass(frozen=True)
class Reader:
    """The language model of a store and its way with text, both found when they are first needed."""

    store: ActivationStore
    source: LanguageModelRows
    root: Path
    progress: Progress
    model_at: str | None
    tokenizer_at: str | None
    device: str
    offline: bool

    @classmethod
    def of(cls, store: ActivationStore, *place: Any) -> Reader:
        """Raises SaeError for a store whose rows come from no language model."""
        source = provenance(store.recipe)
        if not isinstance(source, LanguageModelRows):
            raise SaeError(f"{store.key}: its rows come from no language model, which would have to read the texts")
        return cls(store, source, *place)

    @property
    def key(self) -> str:
        """What is alike for stores that one pass serves."""
        text = self.source.text.recipe
        parts = {"model": self.store.recipe["model"], "tokenizer": text["tokenizer"], "rows": self.source.rows}
        return canonical({**parts, "begin": text.get("begin", "document")})

    @cached_property
    def model(self) -> LanguageModel:
        with said_if_slow(self.progress, f"loading {self.source.model}"):
            return hints.boot(self.store, self.model_at, self.device, self.offline)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        place = {"given": self.tokenizer_at, "model": self.model_at}
        return tokenizer_of(self.root, self.source.text, self.store, offline=self.offline, **place)

    def read(self, texts: Sequence[str], most: int, pool: Pool) -> tuple[list[Read], int]:
        """The tokens of each text, at most so many of them, and how many texts were cut."""
        recipe, rule = self.source.text.recipe, rule_of(self.store)
        begin = np.array([recipe["tokenizer"]["begin"]], np.int64)
        lead = begin if recipe.get("begin", "document") != "none" else begin[:0]
        room = min(most, self.model.context_length) - len(lead)
        found, cut = [], 0
        for ids in encoded(self.tokenizer, list(texts)):
            cut += len(ids) > room
            part = ids[:room] if pool == "mean" else ids[max(0, len(ids) - room) :]
            row = np.concatenate([lead, part.astype(np.int64)])
            kept = rule.mask(row[None], np.array([len(row)]), int(begin[0]))[0]
            if pool == "last" and kept.any():
                kept &= np.arange(len(kept)) == np.flatnonzero(kept)[-1]
            found.append(Read(row, kept))
        return found, cut

    def pooled(
        self, texts: Sequence[Read], coders: Sequence[tuple[Points, LatentCoder]], batch_tokens: int, title: str
    ) -> Pooled:
        """One row a text, each of which has a token that is kept; latents in the order of the dictionaries.

        These are on the model's device.
        """
        order = np.argsort([-len(one.ids) for one in texts], kind="stable")  # of one length together, the longest first
        places = list(dict.fromkeys(points for points, _ in coders))
        activations: dict[Points, list[np.ndarray]] = {points: [] for points in places}
        latents: list[list[Any]] = [[] for _ in coders]
        self.progress.start(title, len(texts), "texts")
        try:
            first = 0
            while first < len(texts):
                count = max(1, batch_tokens // len(texts[order[first]].ids))
                part = [texts[i] for i in order[first : first + count]]
                rows, of_text = self._rows(part, places)
                weights = 1 / np.bincount(of_text, minlength=len(part))
                for points in places:
                    summed = sparse.csr_matrix((weights[of_text], (of_text, np.arange(len(of_text)))))
                    activations[points].append(np.asarray(summed @ rows[points].cpu().numpy(), np.float32))
                for found, (points, coder) in zip(latents, coders, strict=True):
                    found.append(_latents(coder, rows[points], of_text, weights))
                first += len(part)
                self.progress.advance(len(part))
        finally:
            self.progress.finish()
        back = np.argsort(order)
        return Pooled(
            {points: np.concatenate(each)[back] for points, each in activations.items()},
            [sparse.vstack(each).tocsr()[back] for each in latents],
        )

    def _rows(self, texts: Sequence[Read], places: Sequence[Points]) -> tuple[dict[Points, torch.Tensor], np.ndarray]:
        """The rows of texts [rows, d] by their points, and which text each is of. SaeError for what is no number."""
        longest = len(texts[0].ids)
        ids = np.zeros((len(texts), longest), np.int64)  # behind a text anything may stand: it is not looked back at
        kept = np.zeros(ids.shape, bool)
        for row, one in enumerate(texts):
            ids[row, : len(one.ids)], kept[row, : len(one.ids)] = one
        every = list(dict.fromkeys(point for points in places for point in points))
        with torch.no_grad():
            seen = self.model.activations(torch.from_numpy(ids), every)
        where = torch.from_numpy(kept).to(self.model.device)
        found = {points: torch.cat([seen[point][where].float() for point in points], dim=1) for points in places}
        for points, rows in found.items():
            if not rows.isfinite().all():
                names = " + ".join(f"{layer}.{site}" for layer, site in points)
                raise SaeError(
                    f"{self.store.key}: the model's activations at {names} are no finite numbers on these texts"
                )
        return found, kept.nonzero()[0]


def _latents(coder: LatentCoder, rows: torch.Tensor, of_text: np.ndarray, weights: np.ndarray) -> Any:
    """The mean over each text's rows of every latent, [texts, d_sae], stored sparsely."""
    step = max(1, ELEMENTS // coder.d_sae)
    total = sparse.csr_matrix((len(weights), coder.d_sae), dtype=np.float32)
    for low in range(0, len(rows), step):
        with judging(coder):
            found = firings(coder, rows[low : low + step])
        text = of_text[low : low + step][found.row]
        values = (found.value * weights[text]).astype(np.float32)
        total = total + sparse.csr_matrix(
            (values, (text, found.latent)), shape=total.shape
        )  # entries of one place add up
    return total
