"""A run opened for looking: its dictionary, the language model at whose activations it belongs, and their tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.provenance import LanguageModelRows
from sae.cache.runs import Run
from sae.pipeline.evaluate.splicing import point_of
from sae.pipeline.evaluate.stage import expect_one_model
from sae.pipeline.formats import trained
from sae.pipeline.interpret.attached import Attached, attach
from sae.pipeline.language_model import LanguageModel, Point, hints
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.tokenizers.located import tokenizer_of
from sae.pipeline.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """A dictionary at its place in its language model.

    dataset: what it was trained on. reads, writes: the points of the model. rows: which tokens it has learned of.
    """

    run: Run
    dictionary: Dictionary
    model: LanguageModel
    tokenizer: Tokenizer
    dataset: Dataset
    reads: Point
    writes: Point
    rows: LanguageModelRows

    @cached_property
    def attached(self) -> Attached:
        return attach(self.model, self.dictionary, self.reads, writes=self.writes)

    @cached_property
    def vocabulary(self) -> list[bytes]:
        return self.tokenizer.vocabulary()

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text, or begin another."""
        end = self.tokenizer.end
        return frozenset({self.tokenizer.begin} if end is None else {self.tokenizer.begin, end})

    def text(self, ids: list[int]) -> str:
        """The text that tokens stand for; what is no UTF-8 is replaced."""
        return b"".join(self.vocabulary[i] if i < len(self.vocabulary) else b"" for i in ids).decode(errors="replace")

    def encoded(self, text: str, what: str) -> Tensor:
        """Token ids int64 [T] of a text, laid out as the run's own text was: behind a begin token, where that was so.

        Raises SaeError, which begins with `what`, for a text without tokens and for one that the model cannot read.
        """
        found = np.array(self._ids(text, what), np.int64)
        if not len(found):
            raise SaeError(f"{what}: is empty; give some text")
        begin = [] if self.rows.text.recipe.get("begin") == "none" else [self.tokenizer.begin]
        ids = torch.from_numpy(np.concatenate([np.array(begin, np.int64), found]))
        self.expect_room(len(ids), what)
        return ids

    def expect_room(self, tokens: int, what: str) -> None:
        if tokens > self.model.context_length:
            raise SaeError(
                f"{what}: is {tokens:,} tokens; {self.model.name} reads at most "
                f"{self.model.context_length:,}; give less"
            )

    def token(self, text: str, what: str) -> int:
        """The one token that a text is. Raises SaeError where it is none or several."""
        found = [i for i, token in enumerate(self.vocabulary) if token == text.encode(errors="surrogatepass")]
        if not found:
            ids = self._ids(text, f"{what} = ...")
            parts = " + ".join(repr(self.text([i])) for i in ids[:8])
            raise SaeError(f"{what} = {text!r}: is {len(ids)} tokens ({parts}); give one, with its blank, as ' the'")
        return found[-1]  # of two the first is a single byte, which stands in for letters that the vocabulary lacks

    def _ids(self, text: str, what: str) -> list[int]:
        """Token ids of a text. Raises SaeError for letters that are none: bytes of a command line that are no UTF-8."""
        if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
            raise SaeError(f"{what}: is not text in UTF-8; give it as the terminal writes letters")
        return [int(i) for i in self.tokenizer.encode_batch([text])[0]]

    def learned(self, ids: Tensor, first: int = 0) -> Tensor:
        """bool [..., T]: which of some tokens [..., T], the first at position `first`, are such as became rows."""
        place = torch.arange(first, first + ids.shape[-1])
        begins, ends = self.rows.positions
        kept = (place >= begins) & ~torch.isin(ids, torch.tensor(self.rows.left_out, dtype=ids.dtype))
        return kept if ends is None else kept & (place < ends)

    def known(self, feature: int) -> int:
        """A latent's number. Raises SaeError for one that the dictionary has not."""
        if not 0 <= feature < self.dictionary.d_sae:
            raise SaeError(
                f"feature = {feature}: {self.run.name} has latents 0 to {self.dictionary.d_sae - 1}; give one of these"
            )
        return feature


def opened(
    run: Run, root: Path, progress: Progress, *, activations: str | None = None, model: str | None = None,
    device: str = "auto", offline: bool = False, language_model: LanguageModel | None = None,
) -> Opened:  # fmt: skip
    """Open a finished run in the language model that its rows are of.

    `model` says where that is, if not where the harvest found it; `language_model` is that model itself. Raises
    SaeError for what is no dictionary of one place in a model, and where the model or its tokenizer is not to be had.
    """
    dictionary = trained.load_run(run)
    dataset = trained.dataset_of(run, root, activations)
    trained.expect_fits(dataset, dictionary, run)
    rows = dataset.provenance
    if not isinstance(rows, LanguageModelRows):
        raise SaeError(f"{run.name}: its rows come from no language model, so there is none to look at it in")
    if len(dataset.inputs) > 1 or len(dataset.targets) > 1:
        raise SaeError(f"{run.name}: is of several places of the model at once; `evaluate()` splices it")
    expect_one_model(dataset.stores)
    store = dataset.written[0]
    with said_if_slow(progress, f"loading {rows.model}"):
        booted = language_model or hints.boot(store, model, device, offline)
    tok = tokenizer_of(root, rows.text, store, model=model, offline=offline)
    dictionary.to(booted.device)
    return Opened(run, dictionary, booted, tok, dataset, point_of(dataset.inputs[0]), point_of(store), rows)
