"""A dictionary on held-out rows and on held-out tokens: what `pipeline.evaluate` and the studies judge by.

Where a run left rows out by their norm, everything is counted twice: over all held-out rows, and over those that it
would have been trained on (`largest`: the largest norm of such a row). In the second a language model's tokens whose
rows are left out are treated as those that never become rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cache.activations import ActivationStore, norms_of
from cache.errors import SaeError
from cache.loader import Loader
from cache.outliers import kept_rows, outlier_rows
from cache.tokens import TokenStore
from configs.base import Amount, Settings
from pipeline.language_model import LanguageModel, Point
from pipeline.metrics import Downstream, DownstreamScores, Reconstruction, Sparsity
from pipeline.progress import Progress
from pipeline.rows import rule_of
from pipeline.saes import SAE


class EvalConfig(Settings):
    """How much to judge on."""

    rows: Amount = Field("all", description="held-out rows for reconstruction and sparsity, or all")
    tokens: Amount = Field(65_536, description="held-out tokens for cross-entropy, or all")
    dead_rows: int = Field(262_144, ge=0, description="training rows that are searched, too, for latents that fire")
    mean_rows: int = Field(65_536, ge=1, description="training rows whose mean is the mean ablation")
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass, rows in one batch")

    def rows_of(self, store: ActivationStore) -> int:
        """Rows of a held-out store that are judged."""
        return store.n_rows if self.rows == "all" else min(self.rows, store.n_rows)

    def contexts_of(self, tokens: TokenStore) -> int:
        """Contexts of held-out tokens that are judged: whole ones, as many as the tokens begin."""
        whole = tokens.n_contexts
        return whole if self.tokens == "all" else min(whole, -(-self.tokens // tokens.context_length))


@dataclass(frozen=True)
class Scores:
    """What is counted over some rows."""

    reconstruction: Reconstruction
    sparsity: Sparsity

    def count(self, x: Tensor, latents: Any, x_hat: Tensor) -> None:
        self.reconstruction.update(x, x_hat)
        _count(self.sparsity, latents)


def mean_row(store: ActivationStore, rows: int, largest: float | None = None) -> Tensor:
    """float32 [d]: the mean of a store's first rows (of those kept), one chunk in memory at a time."""
    total, count = torch.zeros(store.d, dtype=torch.float64), 0
    for start in range(0, rows, store.chunk_rows):
        found = kept_rows(store, start, min(start + store.chunk_rows, rows), largest)
        total, count = total + found.sum(0, dtype=torch.float64), count + len(found)
    if not count:
        raise SaeError(f"eval.mean_rows = {rows}: training left all of them out for their norm; give more")
    return (total / count).float()


def judge_rows(
    sae: SAE, store: ActivationStore, rows: int, batch: int, progress: Progress, largest: float | None = None
) -> list[Scores]:
    """Reconstruction and sparsity over a store's first rows; with a largest norm, over those kept as well."""
    scores = [Scores(Reconstruction(), Sparsity(sae.d_sae)) for _ in range(1 if largest is None else 2)]

    def judge(x: Tensor, kept: bool) -> None:
        latents = sae.encode(x)
        x_hat = sae.decode(latents)
        for one in scores if kept else scores[:1]:
            one.count(x, latents, x_hat)

    _each_batch(sae, store, rows, batch, "eval rows", judge, progress, largest)
    if not scores[-1].sparsity.rows:
        raise SaeError(f"--rows {rows}: training would have left all of them out for their norm; judge on more")
    return scores


def firing(
    sae: SAE, store: ActivationStore, rows: int, batch: int, progress: Progress, largest: float | None = None
) -> list[Sparsity]:
    """How often latents fire in a store's first rows; with a largest norm, in those kept as well."""
    counts = [Sparsity(sae.d_sae) for _ in range(1 if largest is None else 2)]

    def count(x: Tensor, kept: bool) -> None:
        latents = sae.encode(x)
        for one in counts if kept else counts[:1]:
            _count(one, latents)

    _each_batch(sae, store, rows, batch, "eval dead latents", count, progress, largest)
    return counts


def _count(sparsity: Sparsity, latents: Any) -> None:
    if latents.entries is None:
        sparsity.update(latents.values)
    elif latents.values.dim() == 2:
        sparsity.update(latents.values, latents.indices)
    else:
        sparsity.update(latents.values, latents.indices, rows=latents.entries.rows, batch=latents.batch)


@torch.no_grad()
def _each_batch(
    sae: SAE,
    store: ActivationStore,
    rows: int,
    batch: int,
    title: str,
    call: Callable[[Tensor, bool], None],
    progress: Progress,
    largest: float | None,
) -> None:
    """Call with every batch of a store's first rows, and with whether they are kept: those first, then the others."""
    if not rows:
        return
    progress.start(title, rows, "rows")
    try:
        with Loader(store, batch, epochs=1, rows=rows, device=sae.W_dec.device, largest=largest) as loader:
            for x in loader:
                call(x, True)
                progress.advance(len(x))
        for x in () if largest is None else outlier_rows(store, rows, largest, batch):
            call(x.to(sae.W_dec.device), False)
            progress.advance(len(x))
    finally:
        progress.finish()


def judge_tokens(
    sae: Callable[[Tensor], Tensor], model: LanguageModel, tokens: TokenStore, store: ActivationStore, mean: Tensor,
    config: EvalConfig, progress: Progress, largest: float | None = None,
) -> DownstreamScores:  # fmt: skip
    """Cross-entropy with the site of `store` replaced by `sae`'s reconstruction, by zero and by `mean` [d].

    With a largest norm, positions above it keep their own activations, and what they predict does not count.
    """
    point = Point(store.recipe["layer"], store.recipe["site"])
    rule = rule_of(store)
    begin = int(tokens.recipe["tokenizer"]["begin"])
    length = tokens.context_length
    contexts = config.contexts_of(tokens)
    downstream = Downstream()
    step = max(1, config.batch_tokens // length)
    mean = mean.to(model.device)
    progress.start("eval cross-entropy", contexts * length, "tokens")
    try:
        for start in range(0, contexts, step):
            stop = min(start + step, contexts)
            ids, lengths = tokens.contexts(start, stop), tokens.lengths(start, stop)
            rows = _Replaced(torch.from_numpy(rule.mask(ids, lengths, begin)).to(model.device), largest)
            found = model.compare(
                torch.from_numpy(ids),
                point,
                {
                    "sae": rows.by(sae),
                    "zero": rows.by(torch.zeros_like),
                    "mean": rows.by(lambda x: mean.to(x.dtype).expand_as(x)),
                },
            )
            if not all(bool(each.ce.isfinite().all()) for each in found.spliced.values()):
                raise SaeError(
                    f"{store.path}: with its rows' reconstruction or mean in place a cross-entropy is no number; they "
                    "are too large for the model"
                )
            real = torch.from_numpy(np.arange(1, length) < lengths[:, None])
            downstream.update(found.clean, found.spliced, rows.mask[:, :-1].cpu() & real)
            progress.advance((stop - start) * length)
    finally:
        progress.finish()
    try:
        return downstream.result()["sae"]
    except ValueError as error:
        raise SaeError(f"--tokens {config.tokens}: none of their predictions counts; judge on more") from error


@dataclass
class _Replaced:
    """The positions of a batch of contexts that are replaced: mask bool [B, T], without those above a largest norm.

    Norms are seen when the first replacement is asked for; each of them is given the same activations.
    """

    mask: Tensor
    largest: float | None

    def by(self, new: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A replacement of activations [B, T, d] at these positions, row by row; the others stay as they are."""

        def replace(value: Tensor) -> Tensor:
            if self.largest is not None:
                self.mask = self.mask & (norms_of(value) <= self.largest)
            out = value.clone()
            out[self.mask] = new(value[self.mask].float()).to(value.dtype)
            return out

        return replace
