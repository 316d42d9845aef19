"""A dictionary on held-out rows and on held-out tokens: what `pipeline.evaluate.stage` and the studies judge by.

Where rows lie far out by their norm (the limits of the datasets: those that a run left out, or would have if it had not
been told to keep all), everything is counted twice: over all held-out rows, and over the others. In the second a
language model's tokens whose rows are left out are treated as those that never become rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.tokens import TokenStore
from sae.configs.base import Amount, Settings
from sae.pipeline.evaluate.splicing import point_of, spliced
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.metrics.coefficients import KEPT, most_rows
from sae.pipeline.metrics.figures import OF_ROWS, Need, amounts, available
from sae.pipeline.metrics.figures import figures as figures_of
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, metrics_of
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Coder, Predictor
from sae.pipeline.worlds.making import Making


class EvalConfig(Settings):
    """Amounts to judge on."""

    rows: Amount = Field("all", description="held-out rows to judge reconstruction and sparsity on")
    tokens: Amount = Field(65_536, description="held-out tokens to judge cross-entropy on")
    dead_rows: int = Field(262_144, ge=0, description="training rows that are searched, too, for latents that fire")
    mean_rows: int = Field(65_536, ge=1, description="training rows whose mean is the mean ablation")
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass, rows in one batch")

    def rows_of(self, dataset: Dataset) -> int:
        """Rows of a held-out dataset that are judged."""
        return dataset.n_rows if self.rows == "all" else min(self.rows, dataset.n_rows)

    def contexts_of(self, tokens: TokenStore) -> int:
        """Contexts of held-out tokens that are judged: whole ones, as many as the tokens begin."""
        whole = tokens.n_contexts
        return whole if self.tokens == "all" else min(whole, -(-self.tokens // tokens.context_length))


@dataclass(frozen=True)
class Evaluation:
    """The result of judging: figures by key, everything else under `details`, and what is known of each latent [d_sae].

    kept: the same over the rows up to the norms above which they lie far out (`limits`), where there are such.
    """

    figures: dict[str, Value]
    details: dict[str, Any]
    latents: dict[str, Tensor]
    kept: "Evaluation | None" = None
    limits: dict[str, float | None] | None = None

    @classmethod
    def of(cls, metrics: Sequence[Metric]) -> "Evaluation":
        """Collect what metrics found that have been shown everything; results first, then on how much they were
        judged.
        """
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
        found: dict[str, Any] = {**self.figures}
        if self.kept is not None:
            found["kept"] = {**(self.limits or {}), **self.kept.as_json()}
        return {**found, "details": self.details}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is known of each latent, by name; over the kept rows with `_kept` behind it."""
        kept = {} if self.kept is None else self.kept.latents
        return {**self.latents, **{f"{name}_kept": values for name, values in kept.items()}}


def judge(
    subject: Subject, training: Dataset, held_out: Dataset, config: EvalConfig, progress: Progress, *,
    text: tuple[TokenStore, LanguageModel] | None = None, making: Making | None = None,
) -> Evaluation:  # fmt: skip
    """Show a dictionary's held-out rows, training rows and, given one, language model to every metric they suffice.

    `making` is that of the held-out rows' (targets').

    Where the datasets have limits everything that depends on rows is counted over those kept as well.
    """
    needs = needs_of(held_out, making, model=text is not None, truth=subject.truth is not None)
    subject = subject._replace(stores=_names(training.written))
    if making is not None:
        subject = subject._replace(effect=making.effect, pairs=making.pairs)
    if text is not None and (layer := _layer_between(held_out)) is not None:
        subject = subject._replace(mlp=text[1].mlp(layer))
    sides = [metrics_of(subject, needs)]
    if held_out.limits is not None:  # of what does not depend on rows there is one value
        sides.append([one for one in metrics_of(subject, needs) if {*one.needs} & {*OF_ROWS, "model"}])
    sae, batch = subject.sae, config.batch_tokens
    judge_rows(sae, held_out, config.rows_of(held_out), batch, progress, sides)
    if making is not None and making.coefficients is not None and isinstance(sae, Coder):
        compare_rows(sae, held_out, making, config.rows_of(held_out), batch, progress, sides[0])
    if isinstance(sae, Coder):
        search_rows(sae, training, min(config.dead_rows, training.n_rows), batch, progress, sides)
    for side, limits in zip(sides, (None, held_out.limits), strict=False):
        if text is not None:
            mean = mean_target(training.kept_up_to(limits), min(config.mean_rows, training.n_rows))
            judge_tokens(sae, text[1], text[0], held_out.kept_up_to(limits), mean, config, progress, side)
    every, *kept = [Evaluation.of(side) for side in sides]
    # what has no codes or directions has no figures of them
    every.figures.update({one.key: None for one in figures_of(needs=needs) if one.key not in every.figures})
    return replace(every, kept=kept[0], limits=_named_limits(held_out)) if kept else every


def _named_limits(dataset: Dataset) -> dict[str, float | None]:
    """The norms above which rows of each store are not kept, by the name that they have beside figures."""
    names = ["largest_norm", "largest_norm_target"]
    if len(dataset.inputs) > 1 or len(dataset.targets) > 1:
        names = [f"largest_norm_{number}" for number in range(1, len(dataset.stores) + 1)]
    return dict(zip(names, dataset.limits or (), strict=False))


def _names(stores: Sequence[ActivationStore]) -> tuple[str, ...]:
    """How figures of several stores are called: by points, or by keys where stores have none or several have one."""
    of_model = all(isinstance(provenance(store.recipe), LanguageModelRows) for store in stores)
    names = tuple(str(point_of(store)) if of_model else store.key for store in stores)
    return names if len({*names}) == len(names) else tuple(store.key for store in stores)


def needs_of(dataset: Dataset, making: Making | None, *, model: bool, truth: bool) -> frozenset[Need]:
    """Return what there is to judge a dictionary of a dataset by.

    Pairs are tried on rows of one feature alone, which a transcoder does not read.
    """
    pairs = making is not None and bool(making.pairs) and not dataset.targets
    known = making is not None and making.coefficients is not None
    mlp = model and _layer_between(dataset) is not None
    stores = len(dataset.written) > 1
    return available(model=model, truth=truth, coefficients=known, pairs=pairs, mlp=mlp, stores=stores)


def _layer_between(dataset: Dataset) -> int | None:
    """The layer whose MLP makes the targets of the inputs; None where that is not what they are."""
    stores = dataset.stores
    points = [point_of(one) for one in stores if isinstance(provenance(one.recipe), LanguageModelRows)]
    if len(points) != 2 or len(dataset.targets) != 1 or points[0].layer != points[1].layer:
        return None
    return points[0].layer if [point.site for point in points] == ["mlp_in", "mlp_out"] else None


def mean_target(dataset: Dataset, rows: int) -> Tensor:
    """float32 [d_out]: the mean of the kept ones of the first target rows, one chunk in memory at a time."""
    total, count = torch.zeros(dataset.d_out, dtype=torch.float64), 0
    for batch in dataset.in_order(rows):
        total, count = total + batch.y.sum(0, dtype=torch.float64), count + len(batch.y)
    if not count:
        raise SaeError(f"eval.mean_rows = {rows}: training left all of them out for their norm; give more")
    return (total / count).float()


def judge_rows(
    sae: Predictor, dataset: Dataset, rows: int, batch: int, progress: Progress, sides: Sequence[Sequence[Metric]]
) -> None:
    """Show metrics a dataset's first rows; where there is a second side it is shown those kept alone."""
    seen = [0 for _ in sides]

    def show(part: Batch, kept: bool) -> None:
        codes = sae.encode(part.x) if isinstance(sae, Coder) else None
        y_hat = sae.decode(codes) if isinstance(sae, Coder) else sae(part.x)
        encoded = Encoded(part.x, part.y, codes, y_hat)
        for i, side in enumerate(sides if kept else sides[:1]):
            seen[i] += len(part.x)
            for metric in side:
                metric.update(encoded)

    _each_batch(sae, dataset, rows, batch, "eval rows", show, progress)
    if not seen[-1]:
        raise SaeError(f"rows = {rows}: training would have left all of them out for their norm; judge on more")


@torch.no_grad()
def compare_rows(
    sae: Coder, dataset: Dataset, making: Making, rows: int, batch: int, progress: Progress, metrics: Sequence[Metric]
) -> None:
    """Show metrics a dataset's first rows, in stored order, with the coefficients of the true features."""
    features = len(making.effect)
    rows = min(rows, most_rows(features))
    step = max(1, min(batch, KEPT // max(features, sae.width)))
    progress.start("eval coefficients", rows, "rows")
    try:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = dataset.rows(start, stop).to(_device(sae))
            codes = sae.encode(part.x)
            encoded = Encoded(part.x, part.y, codes, sae.decode(codes))
            coefficients = making.coefficients(start, stop) if making.coefficients else None
            assert coefficients is not None
            for metric in metrics:
                metric.compare(encoded, coefficients)
            progress.advance(stop - start)
    finally:
        progress.finish()


def search_rows(
    sae: Coder, dataset: Dataset, rows: int, batch: int, progress: Progress, sides: Sequence[Sequence[Metric]]
) -> None:
    """Show metrics the latents that fire in a dataset's first rows; a second side is shown those of kept rows alone."""

    def show(part: Batch, kept: bool) -> None:
        codes = sae.encode(part.x)
        for side in sides if kept else sides[:1]:
            for metric in side:
                metric.search(codes)

    _each_batch(sae, dataset, rows, batch, "eval dead latents", show, progress)


@torch.no_grad()
def _each_batch(
    sae: Predictor, dataset: Dataset, rows: int, batch: int, title: str, call: Callable[[Batch, bool], None],
    progress: Progress,
) -> None:  # fmt: skip
    """Call with every batch of a dataset's first rows, and with whether they are kept: those first, then the others."""
    if not rows:
        return
    progress.start(title, rows, "rows")
    try:
        with dataset.first(rows).batches(batch, epochs=1, device=_device(sae)) as loader:
            for part in loader:
                call(part, True)
                progress.advance(len(part.x))
        for part in dataset.left_out(rows, batch):
            call(part.to(_device(sae)), False)
            progress.advance(len(part.x))
    finally:
        progress.finish()


def _device(sae: Predictor) -> torch.device:
    """Return the device of its numbers."""
    return next(chain(sae.parameters(), sae.buffers())).device


def judge_tokens(
    sae: Callable[[Tensor], Tensor], model: LanguageModel, tokens: TokenStore, dataset: Dataset, mean: Tensor,
    config: EvalConfig, progress: Progress, metrics: Sequence[Metric],
) -> None:  # fmt: skip
    """Show metrics the cross-entropies with the targets' sites replaced by a reconstruction, zero and `mean` [d_out].

    The reconstruction is of what is read at the inputs' sites (`splicing`). Where the dataset has limits, positions
    above them keep their own activations, and what they predict does not count.
    """
    rule = rule_of(dataset.inputs[0])
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
            into = torch.from_numpy(ids)
            rows = torch.from_numpy(rule.mask(ids, lengths, begin)).to(model.device)
            interventions, replaced = spliced(sae, model, into, rows, dataset, mean)
            found = model.compare(into, interventions)
            if not all(bool(each.ce.isfinite().all()) for each in found.spliced.values()):
                raise SaeError(
                    f"{dataset.key}: with its rows' reconstruction or mean cross-entropy is not a number; they "
                    "are too large for the model"
                )
            real = torch.from_numpy(np.arange(1, length) < lengths[:, None])
            mask = replaced()[:, :-1].cpu() & real
            counted += int(mask.sum())
            for metric in metrics:
                metric.splice(found.clean, found.spliced, mask)
            progress.advance((stop - start) * length)
    finally:
        progress.finish()
    if not counted:
        raise SaeError(f"tokens = {config.tokens}: none of their predictions counts; judge on more")
