"""What a finished decomposition says: which components fire, and what is left of the model when the others are off."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.pipeline.decompose.components import Components, Mask, lower_leaky
from sae.pipeline.decompose.config import DecomposeConfig
from sae.pipeline.decompose.losses import Decomposition, faithfulness, stochastic
from sae.pipeline.decompose.subjects import Clean, Subject, ToyModels
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes.contract import generator_of

LISTED = 10  # components of a matrix that are listed, those that fire most
ONE = 0.75  # strength of the feature in a toy's sample of one feature

Masks = Mapping[str, Mask]


class Fired(NamedTuple):
    """Of each component of a matrix, [C] or [I, C]: the share of rows in which it is active, its mean importance."""

    rate: Tensor
    importance: Tensor


class Reading(NamedTuple):
    """The figures of a decomposition, as JSON has them, and what is known of every component."""

    figures: dict[str, Any]
    fired: dict[str, Fired]


@torch.no_grad()
def read(decomposition: Decomposition, subject: Subject, config: DecomposeConfig, progress: Progress) -> Reading:
    """Judge a decomposition on batches kept for it."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    rates: dict[str, list[Tensor]] = defaultdict(list)
    means: dict[str, list[Tensor]] = defaultdict(list)
    positive: dict[str, list[Tensor]] = defaultdict(list)
    feed, seen = subject.batches(held_out=True), 0
    count = min(config.judged, subject.held_out_batches)
    progress.start("judge", count, "batches")
    try:
        for number, batch in zip(range(count), feed, strict=False):
            clean = subject.clean(batch)
            importances = decomposition.importances(clean.read)
            for name, one in importances.items():
                rows = _rows(one, clean, subject.instances)
                rates[name].append((rows > config.threshold).float().mean(-2))
                positive[name].append((rows > 0).sum(-1).float().mean())
                means[name].append(lower_leaky(rows).clamp(min=0).mean(-2))
            seen += rows.shape[-2]
            for condition, masks in conditions(importances, config, number).items():
                products = {} if masks is None else decomposition.products(masks)
                for key, value in clean.measured(products).items():
                    sums[condition][key] += value.item() / count / (subject.instances or 1)
            progress.advance(1)
    finally:
        progress.finish()
        feed.close()
    fired = {name: Fired(torch.stack(rates[name]).mean(0), torch.stack(means[name]).mean(0)) for name in rates}
    figures: dict[str, Any] = {
        "kind": config.kind,
        "batches": count,
        "rows": seen,
        "components": config.components,
        "faithfulness": faithfulness(decomposition.parts.values()).item() / (subject.instances or 1),
        **{condition: dict(each) for condition, each in sums.items()},
        "matrices": {
            name: of_matrix(decomposition.parts[name], fired[name])
            | {"ci_l0_above_0": torch.stack(positive[name]).mean().item()}
            for name in fired
        },
    }
    if isinstance(subject, ToyModels):
        figures["toy"] = of_toys(decomposition, subject, fired["in"].rate > 0, config.threshold)
    return Reading(figures, fired)


def conditions(importances: Mapping[str, Tensor], config: DecomposeConfig, number: int) -> dict[str, Masks | None]:
    """The masks under which the model is looked at; None: the model itself.

    unmasked: all components. ci_masked: each as much as it is important. rounded: those that are active. stochastic: as
    in training. nothing: none.
    """

    def each(mask: Callable[[Tensor], Tensor]) -> dict[str, Mask]:
        return {name: Mask(mask(one)) for name, one in importances.items()}

    generator = generator_of(config.seed, "judged masks", number, next(iter(importances.values())).device)
    return {
        "itself": None,
        "unmasked": each(torch.ones_like),
        "ci_masked": each(lower_leaky),
        "rounded": each(lambda g: (g > config.threshold).float()),
        "stochastic": stochastic(importances, generator, delta=config.delta),
        "nothing": each(torch.zeros_like),
    }


def of_matrix(part: Components, fired: Fired) -> dict[str, Any]:
    """The figures of one matrix; with instances, means over them.

    ci_l0: components active in a row. alive: those active in any. bits: entropy of which are active, each by itself.
    """
    rate, importance = fired
    found: dict[str, Any] = {
        "ci_l0": rate.sum(-1).mean().item(),
        "bits": (torch.special.entr(rate) + torch.special.entr(1 - rate)).sum(-1).mean().item() / math.log(2),
        "alive": (rate > 0).sum(-1).float().mean().item(),
        "faithfulness": (
            (part.weight - part.sum()).square().sum((-2, -1)) / part.weight.square().sum((-2, -1))
        ).mean().item(),
        "shape": [*part.weight.shape[-2:]],
    }  # fmt: skip
    if rate.ndim == 1:
        first = rate.argsort(descending=True, stable=True)[:LISTED].tolist()
        found["most"] = [
            {"component": c, "rate": rate[c].item(), "importance": importance[c].item()} for c in first if rate[c] > 0
        ]
    return found


def of_toys(decomposition: Decomposition, subject: ToyModels, alive: Tensor, threshold: float) -> dict[str, Any]:
    """How far the components of toy models are the models' own columns: figures with their spread over instances.

    mmcs: the mean over features of the largest cosine of a component's part for that feature (u_c times its coordinate
    of v_c) and what the model has for it. ml2r: the mean ratio of the lengths of the two. one_hot: components of the
    first matrix active where one feature is there, a mean over features. alive: bool [I, C], the components of that
    matrix that are active in any row: no other is matched, since one that has come to nothing may point anywhere.
    """
    part, own = decomposition.parts["in"], subject.matrices["in"]  # own [I, d, G]
    columns = torch.einsum("igc,ico->icog", *part.factors())
    alike = cosine_similarity(columns, own[:, None], dim=2, eps=1e-12)
    cosine, matched = alike.masked_fill(~alive[..., None], -1.0).max(1)  # [I, G]
    ratio = torch.linalg.vector_norm(columns, dim=2).gather(1, matched[:, None])[:, 0] / torch.linalg.vector_norm(
        own, dim=1
    )
    x = ONE * torch.eye(own.shape[-1], device=own.device).expand(len(own), -1, -1)
    active = (part.importance(x) > threshold).sum(-1).float()
    figures = {"mmcs": cosine.mean(1), "ml2r": ratio.mean(1), "one_hot": active.mean(1)}
    spread = {f"{name}_sd": value.std().item() for name, value in figures.items()} if len(own) > 1 else {}
    return {name: value.mean().item() for name, value in figures.items()} | spread | {
        "exactly_one": (active == 1).float().mean().item(),
        "each": {name: value.tolist() for name, value in figures.items()},
    }  # fmt: skip


def _rows(importance: Tensor, clean: Clean, instances: int | None) -> Tensor:
    """Importances [n, C] of the rows that count, or [I, n, C]."""
    if clean.rows is not None:
        return importance[clean.rows]
    return importance if instances is not None else importance.flatten(0, -2)
