"""A dictionary on held-out rows and on held-out tokens: what `pipeline.evaluate.stage` and the studies judge by.

Where a run left rows out by their norm, everything is counted twice: over all held-out rows, and over those that it
would have been trained on (`largest`: the largest norm of such a row). In the second a language model's tokens whose
rows are left out are treated as those that never become rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sae.cache.activations import ActivationStore, norms_of
from sae.cache.errors import SaeError
from sae.cache.loader.loader import Loader
from sae.cache.outliers import kept_rows, outlier_rows
from sae.cache.tokens import TokenStore
from sae.configs.base import Amount, Settings
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.metrics.figures import OF_ROWS, amounts, available
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, metrics_of
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import SAE


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
class Evaluation:
    """What was found: figures by key, everything else under `details`, and what is known of each latent [d_sae].

    kept: the same over the rows up to the norm above which training left rows out (`largest_norm`), where it did.
    """

    figures: dict[str, Value]
    details: dict[str, Any]
    latents: dict[str, Tensor]
    kept: "Evaluation | None" = None
    largest_norm: float | None = None

    @classmethod
    def of(cls, metrics: Sequence[Metric]) -> "Evaluation":
        """What metrics that have been shown everything say; results first, then on how much they were judged."""
        figures: dict[str, Value] = {}
        details: dict[str, Any] = {}
        latents: dict[str, Tensor] = {}
        for metric in metrics:
            found = metric.result()
            assert {*found} == {one.key for one in metric.figures}, f"metric {metric.name}: tells {[*found]}"
            figures |= found
            details |= metric.details()
            latents |= metric.latents()
        judged_on = {one.key for one in amounts()}
        return cls({key: figures[key] for key in sorted(figures, key=judged_on.__contains__)}, details, latents)

    def as_json(self) -> dict[str, Any]:
        """The figures by name, and everything else under `details`. Undefined ones are null."""
        kept = {} if self.kept is None else {"kept": {"largest_norm": self.largest_norm, **self.kept.as_json()}}
        return {**self.figures, **kept, "details": self.details}

    def tensors(self) -> dict[str, Tensor]:
        """What is known of each latent, by name; over the kept rows with `_kept` behind it."""
        kept = {} if self.kept is None else self.kept.latents
        return {**self.latents, **{f"{name}_kept": values for name, values in kept.items()}}


def judge(
    subject: Subject, training: ActivationStore, held_out: ActivationStore, config: EvalConfig, progress: Progress,
    *, largest: float | None = None, text: tuple[TokenStore, LanguageModel] | None = None,
) -> Evaluation:  # fmt: skip
    """Show a dictionary's held-out rows, training rows and, given one, language model to every metric they suffice.

    With a largest norm everything that depends on rows is counted over those kept as well.
    """
    needs = available(model=text is not None, truth=subject.truth is not None)
    sides = [metrics_of(subject, needs)]
    if largest is not None:  # of what does not depend on rows there is one value
        sides.append([one for one in metrics_of(subject, needs) if {*one.needs} & {*OF_ROWS, "model"}])
    sae, batch = subject.sae, config.batch_tokens
    judge_rows(sae, held_out, config.rows_of(held_out), batch, progress, sides, largest)
    search_rows(sae, training, min(config.dead_rows, training.n_rows), batch, progress, sides, largest)
    for side, limit in zip(sides, (None, largest), strict=False):
        if text is not None:
            mean = mean_row(training, min(config.mean_rows, training.n_rows), limit)
            judge_tokens(sae, text[1], text[0], held_out, mean, config, progress, side, limit)
    every, *kept = [Evaluation.of(side) for side in sides]
    return replace(every, kept=kept[0], largest_norm=largest) if kept else every


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
    sae: SAE, store: ActivationStore, rows: int, batch: int, progress: Progress, sides: Sequence[Sequence[Metric]],
    largest: float | None = None,
) -> None:  # fmt: skip
    """Show metrics a store's first rows; with a largest norm, the second side only those kept."""
    seen = [0 for _ in sides]

    def show(x: Tensor, kept: bool) -> None:
        codes = sae.encode(x)
        encoded = Encoded(x, x, codes, sae.decode(codes))
        for i, side in enumerate(sides if kept else sides[:1]):
            seen[i] += len(x)
            for metric in side:
                metric.update(encoded)

    _each_batch(sae, store, rows, batch, "eval rows", show, progress, largest)
    if not seen[-1]:
        raise SaeError(f"--rows {rows}: training would have left all of them out for their norm; judge on more")


def search_rows(
    sae: SAE, store: ActivationStore, rows: int, batch: int, progress: Progress, sides: Sequence[Sequence[Metric]],
    largest: float | None = None,
) -> None:  # fmt: skip
    """Show metrics the latents that fire in a store's first rows; with a largest norm, the second side those kept."""

    def show(x: Tensor, kept: bool) -> None:
        codes = sae.encode(x)
        for side in sides if kept else sides[:1]:
            for metric in side:
                metric.search(codes)

    _each_batch(sae, store, rows, batch, "eval dead latents", show, progress, largest)


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
    config: EvalConfig, progress: Progress, metrics: Sequence[Metric], largest: float | None = None,
) -> None:  # fmt: skip
    """Show metrics the cross-entropies with the site of `store` replaced by a reconstruction, zero and `mean` [d].

    With a largest norm, positions above it keep their own activations, and what they predict does not count.
    """
    point = Point(store.recipe["layer"], store.recipe["site"])
    rule = rule_of(store)
    begin = int(tokens.recipe["tokenizer"]["begin"])
    length = tokens.context_length
    contexts = config.contexts_of(tokens)
    counted = 0
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
                {
                    "sae": {point: rows.by(sae)},
                    "zero": {point: rows.by(torch.zeros_like)},
                    "mean": {point: rows.by(lambda x: mean.to(x.dtype).expand_as(x))},
                },
            )
            if not all(bool(each.ce.isfinite().all()) for each in found.spliced.values()):
                raise SaeError(
                    f"{store.path}: with its rows' reconstruction or mean in place a cross-entropy is no number; they "
                    "are too large for the model"
                )
            real = torch.from_numpy(np.arange(1, length) < lengths[:, None])
            mask = rows.mask[:, :-1].cpu() & real
            counted += int(mask.sum())
            for metric in metrics:
                metric.splice(found.clean, found.spliced, mask)
            progress.advance((stop - start) * length)
    finally:
        progress.finish()
    if not counted:
        raise SaeError(f"--tokens {config.tokens}: none of their predictions counts; judge on more")


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
