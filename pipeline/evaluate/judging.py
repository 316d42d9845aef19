"""Dictionaries on held-out rows and on held-out tokens: what `pipeline.evaluate.stage` and the studies judge by.

Several are judged at once: what they have in common is read and computed once (held-out rows, training rows, passes of
the language model as it is and with zeros or the mean in place), and what is found of each is what it is by itself.

Where rows lie far out by their norm (the limits of the datasets: those that a run left out, or would have if it had not
been told to keep all), everything is counted twice: over all held-out rows, and over the others. In the second a
language model's tokens whose rows are left out are treated as those that never become rows.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.config import EvalConfig
from sae.pipeline.evaluate.places import TokenPlaces
from sae.pipeline.evaluate.rows_passes import compare_rows, judge_rows, mean_target, search_rows
from sae.pipeline.evaluate.subjects import Judged, Site, Splice, alive, grouped, needs_of, same, together
from sae.pipeline.evaluate.token_passes import judge_tokens
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.metrics.figures import amounts
from sae.pipeline.metrics.figures import figures as figures_of
from sae.pipeline.metrics.metric import Metric, Subject, Value
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Coder
from sae.pipeline.worlds.making import Making

__all__ = ["EvalConfig", "Evaluation", "judge", "judge_all", "needs_of"]


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
    tokens: TokenStore | None = None, model: LanguageModel | None = None, making: Making | None = None,
) -> Evaluation:  # fmt: skip
    """Show a dictionary's held-out rows, training rows and, given one, language model to every metric they suffice.

    `making` is that of the held-out rows' (targets'), `tokens` those that they come from.

    Where the datasets have limits everything that depends on rows is counted over those kept as well.
    """
    one = Judged(subject=subject, training=training, held_out=held_out, making=making, tokens=tokens)
    judge_all([one], config, progress, model)
    if one.error is not None:
        raise one.error
    return evaluation(one)


def judge_all(every: Sequence[Judged], config: EvalConfig, progress: Progress, model: LanguageModel | None) -> None:
    """Show dictionaries of one language model, or of none, to their metrics; `evaluation` has what these found.

    One that fails has its error, and the others go on.
    """
    for one in every:
        with one.failing():
            one.begin(model)
    batch, places = config.batch_tokens, _Places()
    for group in grouped(alive(every), lambda one: (same(one.held_out), len(one.sides))):
        rows = config.rows_of(group[0].held_out)
        with together(group):
            judge_rows(group, rows, batch, progress, places.of(group[0].tokens))
            if known := [one for one in alive(group) if _with_coefficients(one)]:
                compare_rows(known, rows, batch, progress)
    coders = [one for one in alive(every) if isinstance(one.subject.sae, Coder)]
    for group in grouped(coders, lambda one: (same(one.training), len(one.sides))):
        with together(group):
            search_rows(group, min(config.dead_rows, group[0].training.n_rows), batch, progress)
    if model is None:
        return
    for group in grouped(alive(every), lambda one: None if one.tokens is None else str(one.tokens.path)):
        if (tokens := group[0].tokens) is not None:
            splices = _splices(group, config)
            with together(group):
                judge_tokens([splice for _, splice in splices], model, tokens, config, progress, places.of(tokens))
            for owner, splice in splices:
                owner.error = owner.error or splice.error


def evaluation(one: Judged) -> Evaluation:
    """Collect what was found of a dictionary that has been through all passes."""
    every, *kept = [Evaluation.of(side) for side in one.sides]
    # what has no codes or directions has no figures of them
    every.figures.update({each.key: None for each in figures_of(needs=one.needs) if each.key not in every.figures})
    return replace(every, kept=kept[0], limits=_named_limits(one.held_out)) if kept else every


class _Places:
    """The places of tokens, by their store."""

    def __init__(self) -> None:
        self._of: dict[str, TokenPlaces] = {}

    def of(self, tokens: TokenStore | None) -> TokenPlaces | None:
        return None if tokens is None else self._of.setdefault(str(tokens.path), TokenPlaces(tokens))


def _with_coefficients(one: Judged) -> bool:
    return one.making is not None and one.making.coefficients is not None and isinstance(one.subject.sae, Coder)


def _splices(group: Sequence[Judged], config: EvalConfig) -> list[tuple[Judged, Splice]]:
    """What is spliced into a model, for each side of each dictionary; those at one place share their `Site`."""
    sites: dict[Hashable, Site] = {}
    found = []
    for one in group:
        for side, limits in zip(one.sides, (None, one.held_out.limits), strict=False):
            with one.failing():
                held_out, training = (each.kept_up_to(limits) for each in (one.held_out, one.training))
                key = same(held_out), same(training)
                if key not in sites:
                    sites[key] = Site(held_out, mean_target(training, min(config.mean_rows, training.n_rows)))
                found.append((one, Splice(sae=one.subject.sae, site=sites[key], metrics=side)))
    return [(owner, one) for owner, one in found if owner.error is None]


def _named_limits(dataset: Dataset) -> dict[str, float | None]:
    """The norms above which rows of each store are not kept, by the name that they have beside figures."""
    names = ["largest_norm", "largest_norm_target"]
    if len(dataset.inputs) > 1 or len(dataset.targets) > 1:
        names = [f"largest_norm_{number}" for number in range(1, len(dataset.stores) + 1)]
    return dict(zip(names, dataset.limits or (), strict=False))
