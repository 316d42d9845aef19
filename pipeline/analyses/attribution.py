"""What each latent does to the model's predictions: estimates from gradients, beside what ablating it does.

M is what is explained, a mean over predictions: the cross-entropy of the next token, or how far its logit is above that
of the strongest other token (of the model as it is). With x = what the dictionary makes of its latents + its error, the
error kept, a latent's effect is M - M with its activations at 0. Estimates of it:

gradient      sum over tokens of f dM/df (to first order; exact where M is linear in f)
integrated    the same with the gradient averaged on the way from no latents to all (10 points); over all latents
              these add up to M - M without latents
activation    mean activation; heuristic: that times the mean size of the latent's encoder weights

Where a dictionary reads one site and writes another, latents stay what they were read as. It needs the language model.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.cache import catalogue
from sae.cache.errors import SaeError
from sae.cache.provenance import LanguageModelRows
from sae.cache.tokens import TokenStore
from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, Value, register
from sae.pipeline.analyses.frequency import ranks
from sae.pipeline.evaluate.splicing import point_of
from sae.pipeline.language_model import LanguageModel, hints
from sae.pipeline.language_model.interventions import predicting
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.metrics.similarity import correlation
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.saes import Latents
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.studies.plots import Panel

POINTS = 10  # on the way from no latents to all of them
BATCH = 512  # tokens in one pass
ESTIMATES = ("gradient", "integrated", "activation", "heuristic")

Measure = Callable[[Tensor], Tensor]
"""The values of latents [n, m] -> M, a sum over predictions."""


@register
class Attribution(Analysis):
    """What ablating latents does to the model's predictions, and how well gradients foretell it."""

    name = "attribution"
    meanings: ClassVar[dict[str, str]] = {
        "measure_clean": "what is measured, a prediction, with all latents as they are",
        "measure_without_latents": "the same with all latents at 0",
        "integrated_sum": "sum over latents of integrated gradients, which should be the difference of these two",
        "ablated": "latents that were put to 0, each by itself",
        "predictions": "predictions that it was measured on",
        **{f"spearman_{name}": f"rank correlation of the sizes of effect and {name} estimate" for name in ESTIMATES},
        **{f"pearson_{name}": f"correlation of effect and {name} estimate" for name in ESTIMATES[:2]},
    }
    asked_for = True

    def find(self, subject: Analysed) -> Finding:
        batches = [*_batches(subject)]
        m = subject.sae.d_sae
        sums = {name: torch.zeros(m, dtype=torch.float64) for name in ("gradient", "integrated", "activation")}
        clean = without = 0.0
        subject.progress.start("attribution", len(batches), "passes")
        try:
            for batch in batches:
                values, zero = batch.values, torch.zeros_like(batch.values)
                at_all, gradient = derivative(batch.measure, values)
                sums["gradient"] += (values * gradient).double().sum(0).cpu()
                sums["integrated"] += (values * integrated(batch.measure, values)).double().sum(0).cpu()
                sums["activation"] += values.double().sum(0).cpu()
                clean += at_all
                without += float(batch.measure(zero))
                subject.progress.advance(1)
        finally:
            subject.progress.finish()
        predictions, rows = sum(batch.predictions for batch in batches), sum(len(batch.values) for batch in batches)
        scores = {name: sums[name] / predictions for name in ("gradient", "integrated")}
        scores["activation"] = sums["activation"] / rows
        scores["heuristic"] = scores["activation"] * subject.sae.W_enc.detach().double().cpu().abs().mean(0)
        chosen = chosen_of(scores["gradient"], sums["activation"] != 0, subject.config.ablated)
        effects = self._effects(subject, batches, chosen) / predictions
        told = [
            {"feature": i, "ablation": effect, **{name: scores[name][i].item() for name in ESTIMATES}}
            for i, effect in zip(chosen.tolist(), effects.tolist(), strict=True)
        ]
        figures: dict[str, Value] = {
            "measure_clean": clean / predictions, "measure_without_latents": without / predictions,
            "integrated_sum": scores["integrated"].sum().item(), "ablated": len(chosen), "predictions": predictions,
        }  # fmt: skip
        for name in ESTIMATES:
            figures[f"spearman_{name}"] = correlation(ranks(scores[name][chosen].abs()), ranks(effects.abs()))
        for name in ESTIMATES[:2]:
            figures[f"pearson_{name}"] = correlation(scores[name][chosen], effects)
        clouds = [(name, [*zip(scores[name][chosen].tolist(), effects.tolist(), strict=True)]) for name in ESTIMATES]
        return Finding(
            figures,
            {"measure": subject.config.measure, "latents": sorted(told, key=lambda one: -abs(one["ablation"]))},
            [Panel("effect of ablation", name, {"": cloud}, joined=False) for name, cloud in clouds],
        )

    @torch.no_grad()
    def _effects(self, subject: Analysed, batches: "list[_Batch]", chosen: Tensor) -> Tensor:
        """float64 [n]: M, a sum over predictions, less M with the activations of each chosen latent at 0."""
        effects = torch.zeros(len(chosen), dtype=torch.float64)
        subject.progress.start("ablation", len(chosen), "latents")
        try:
            whole = [float(batch.measure(batch.values)) for batch in batches]
            for place, latent in enumerate(chosen.tolist()):
                for batch, before in zip(batches, whole, strict=True):
                    if batch.values[:, latent].any():
                        effects[place] += before - float(batch.measure(ablated(batch.values, latent)))
                subject.progress.advance(1)
        finally:
            subject.progress.finish()
        return effects


def derivative(measure: Measure, values: Tensor) -> tuple[float, Tensor]:
    """M at values [n, m], and its gradient there [n, m]."""
    with torch.enable_grad():
        at = values.detach().clone().requires_grad_()
        found = measure(at)
    (gradient,) = torch.autograd.grad(found, at)
    return float(found.detach()), gradient


def integrated(measure: Measure, values: Tensor) -> Tensor:
    """[n, m]: the mean gradient on the straight way from 0 to values, at the middles of POINTS equal parts of it."""
    total = torch.zeros_like(values)
    for place in range(POINTS):
        total += derivative(measure, values * ((place + 0.5) / POINTS))[1]
    return total / POINTS


def ablated(values: Tensor, latent: int) -> Tensor:
    """Values [n, m] with one latent at 0."""
    found = values.clone()
    found[:, latent] = 0
    return found


def chosen_of(gradient: Tensor, fired: Tensor, count: int) -> Tensor:
    """int64 [n]: latents to ablate: half are those with the largest estimates, half evenly spread over the others."""
    order = torch.where(fired, gradient.abs(), -1.0).argsort(descending=True, stable=True)[: int(fired.sum())]
    first, rest = order[: -(-count // 2)], order[-(-count // 2) :]
    spread = torch.linspace(0, len(rest) - 1, min(len(rest), count // 2)).long() if len(rest) else rest
    return torch.cat([first, rest[spread]])


class _Batch(NamedTuple):
    """Some contexts: the latents of their rows [n, m], M of other values of these, and how many predictions it sums."""

    values: Tensor
    measure: Measure
    predictions: int


def _batches(subject: Analysed) -> Iterator[_Batch]:
    """The first held-out tokens, a few contexts at a time. Raises SaeError for rows without a language model."""
    dataset, config = subject.held_out, subject.config
    if not isinstance(dataset.provenance, LanguageModelRows) or len(dataset.inputs) != 1 or len(dataset.targets) > 1:
        raise SaeError(f"attribution: the rows of {dataset.key} are of no one place in a language model; leave it out")
    recipe = dataset.provenance.text.recipe if dataset.provenance.text is not None else None
    tokens = None if recipe is None else catalogue.of_recipe(subject.root, TokenStore, recipe)
    if tokens is None:
        raise SaeError(f"{subject.root}: the validation tokens of {dataset.key} are gone; run `tokenize()` again")
    source = dataset.written[0]
    with said_if_slow(subject.progress, f"loading {source.recipe['model']['model']}"):
        model = hints.boot(source, subject.model, str(subject.device), subject.offline)
    length = tokens.context_length
    contexts = min(tokens.n_contexts, -(-config.tokens // length))
    step = max(1, BATCH // length)
    found = 0
    for start in range(0, contexts, step):
        batch = _batch(subject, model, tokens, start, min(start + step, contexts))
        found += batch.predictions
        if batch.predictions:
            yield batch
    if not found:
        raise SaeError(f"analyze.tokens = {config.tokens}: none of their predictions counts; look at more")


def _batch(subject: Analysed, model: LanguageModel, tokens: TokenStore, start: int, stop: int) -> _Batch:
    dataset, sae = subject.held_out, subject.sae
    ids, lengths = tokens.contexts(start, stop), tokens.lengths(start, stop)
    mask = rule_of(dataset.inputs[0]).mask(ids, lengths, int(tokens.recipe["tokenizer"]["begin"]))
    counted = torch.from_numpy(mask[:, :-1] & (np.arange(1, ids.shape[1]) < lengths[:, None])).to(model.device)
    rows, into = torch.from_numpy(mask).to(model.device), torch.from_numpy(ids).to(model.device)
    reads, writes = point_of(dataset.inputs[0]), point_of(dataset.written[0])
    with torch.no_grad():
        latents = sae.encode(model.activations(into, [reads])[reads][rows].float())
        others = model.logits(into)[:, :-1].scatter(2, into[:, 1:, None], -torch.inf).argmax(2, keepdim=True)
    kind = subject.config.measure

    def measure(values: Tensor) -> Tensor:
        change = _difference(sae, latents, values)

        def put(written: Tensor, _: Tensor) -> Tensor:
            return written.index_put((rows,), written[rows] + change.to(written.dtype))

        with model.intervene(predicting(put, reads, writes)):
            logits = model.logits(into)[:, :-1]
        told = logits.gather(2, into[:, 1:, None])
        each = logits.logsumexp(2) - told[..., 0] if kind == "ce" else (told - logits.gather(2, others))[..., 0]
        return each[counted].cpu().double().sum()

    return _Batch(latents.dense().detach(), measure, int(counted.sum()))


def _difference(sae: Dictionary, latents: Latents, values: Tensor) -> Tensor:
    """What other values of latents add to what is decoded: [n, d_out], with a graph."""
    return sae.decode(latents.edited(values)) - sae.decode(latents).detach()
