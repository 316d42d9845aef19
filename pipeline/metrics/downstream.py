"""What replacing activations costs the language model: cross-entropy and KL on held-out tokens.

Losses are kept as sums per context. Means weigh every token the same; intervals come from resampling whole contexts
(tokens of one context are not independent), the same contexts for every quantity, so that a difference's interval is
not that of two unrelated means.

Baselines: the site set to zero, and to its mean over the *training* rows. Share recovered is
(CE_baseline - CE) / (CE_baseline - CE_clean): 1 for an identity, 0 for the baseline itself. Zero-ablating a residual
stream is so harmful that anything "recovers" most of it; read the raw cross-entropies beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Metric, Places, Value, register

SAE, ZERO, MEAN, AT = "sae", "zero", "mean", " at "
MIN_COST = 1e-3  # nats a token: a baseline that costs less than this leaves nothing to recover
CONFIDENCE = 0.95
_CLEAN = ("clean", "ce")
_AT_ONCE = 2**22  # context counts drawn at a time

Sums = Mapping[tuple[str, str], np.ndarray]  # (name, "ce" or "kl") -> sums over resamples, and ("", "tokens")


@dataclass(frozen=True)
class Estimate:
    """A value and the bootstrap interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DownstreamScores:
    """One replacement, over `tokens` predictions in `contexts` contexts. Nats a token.

    None: the baseline was not run, or costs too little (under 0.001 nats, or not for certain) to speak of recovery.
    """

    contexts: int
    tokens: int
    ce_clean: Estimate
    ce: Estimate
    ce_zero: Estimate | None
    ce_mean: Estimate | None
    degradation: Estimate  # ce - ce_clean
    recovered_zero: Estimate | None
    recovered_mean: Estimate | None
    kl: Estimate  # KL(clean || replaced)
    kl_recovered_zero: Estimate | None  # 1 - kl / kl_zero


@register
class Downstream(Metric):
    """What splicing reconstructions into the language model costs it. `count` accumulates contexts for `scores`.

    Replacements named "zero" and "mean" are the baselines; the others are scored against them. One named "sae at 3.mlp_out"
    is at that point alone, and has the baselines of that point, "zero at 3.mlp_out", where those are there.
    """

    name = "downstream"
    needs = ("model",)
    figures = (
        Figure("ce_clean", "CE, model as it is", "cross-entropy of the model as it is, nats a token", None, "evaluation" ),
        Figure("ce_spliced", "CE, spliced", "with the reconstruction in place", "low", "evaluation"),
        Figure("ce_degradation", "cross-entropy added, nats a token", "what the reconstruction adds to it, nats a token", "low"),
        Figure("ce_zero", "CE, zero-ablated", "with zeros in place", None, "evaluation"),
        Figure("ce_mean", "CE, mean-ablated", "with the training mean in place", None, "evaluation"),
        Figure("ce_recovered_zero", "CE recovered, of zero", "share of what zeros cost that the reconstruction recovers", "high", share=True),
        Figure("ce_recovered_mean", "CE recovered, of mean", "share of what the mean costs that the reconstruction recovers", "high", share=True),
        Figure("kl", "KL", "KL(clean || spliced), nats a token", "low", "evaluation"),
        Figure("kl_score", "KL score, of zero", "1 - KL with the reconstruction / KL with zeros in place", "high", "evaluation", share=True),
        Figure("tokens", "held-out predictions", "held-out predictions judged", amount=True),
    )  # fmt: skip

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], list[Tensor]] = {}
        self._found: dict[str, DownstreamScores] | None = None

    def splice(self, clean: Tensor, spliced: Mapping[str, tuple[Tensor, Tensor]], mask: Tensor, places: Places) -> None:
        self.count(clean, spliced, mask)
        self._found = None

    def result(self) -> dict[str, Value]:
        down = self._of_reconstruction()
        found = {
            "ce_clean": down.ce_clean, "ce_spliced": down.ce, "ce_degradation": down.degradation,
            "ce_zero": down.ce_zero, "ce_mean": down.ce_mean, "ce_recovered_zero": down.recovered_zero,
            "ce_recovered_mean": down.recovered_mean, "kl": down.kl, "kl_score": down.kl_recovered_zero,
        }  # fmt: skip
        return {key: None if each is None else each.value for key, each in found.items()} | {"tokens": down.tokens}

    def details(self) -> dict[str, Any]:
        found = {"downstream": asdict(self._of_reconstruction())}
        if alone := {
            name.removeprefix(f"{SAE}{AT}"): asdict(one) for name, one in self._scores().items() if AT in name
        }:
            found["downstream_alone"] = alone
        return found

    def _of_reconstruction(self) -> DownstreamScores:
        return self._scores()[SAE]

    def _scores(self) -> dict[str, DownstreamScores]:
        """The scores of what is spliced in, resampled once."""
        self._found = self._found or self.scores()
        return self._found

    def count(self, clean: Tensor, spliced: Mapping[str, tuple[Tensor, Tensor]], mask: Tensor | None = None) -> None:
        """Count a batch: clean cross-entropies [B, P] and, for each replacement, its cross-entropies and KLs [B, P].

        `mask` bool [B, P] keeps the predictions that count (no padding, no position whose activations were left
        alone); all when None. The replacements are the same in every batch.
        """
        assert clean.ndim == 2 and all(part.shape == clean.shape for both in spliced.values() for part in both)
        kept = torch.ones_like(clean, dtype=torch.bool) if mask is None else mask.to(clean.device)
        found = {("", "tokens"): kept.double(), _CLEAN: clean}
        for name, (ce, kl) in spliced.items():
            assert name not in {"", _CLEAN[0]}, name
            found[name, "ce"], found[name, "kl"] = ce, kl
        assert not self._sums or set(self._sums) == set(found), "every batch has the same replacements"
        for key, values in found.items():
            self._sums.setdefault(key, []).append(torch.where(kept, values.double(), 0.0).sum(1))

    def scores(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, DownstreamScores]:
        """Scores of every replacement (the baselines too). Raises ValueError when there were no tokens."""
        per_context = {key: torch.cat(parts).cpu().numpy() for key, parts in self._sums.items()}
        tokens = per_context.get(("", "tokens"), np.zeros(0))
        if not tokens.sum():
            raise ValueError("no tokens to score")
        full = {key: values.sum(keepdims=True) for key, values in per_context.items()}
        drawn = _resample(per_context, resamples, seed)
        names = dict.fromkeys(name for name, kind in per_context if kind == "kl")
        return {name: _scores(name, full, drawn, len(tokens), int(tokens.sum())) for name in names}


def _resample(per_context: Sums, resamples: int, seed: int) -> Sums:
    """Sums over as many contexts as there are, drawn with replacement, `resamples` times."""
    contexts = len(per_context["", "tokens"])
    table = np.stack(list(per_context.values()), axis=1)  # [contexts, quantities]
    random = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // contexts)
    even = np.full(contexts, 1 / contexts)
    parts = [
        random.multinomial(contexts, even, size=min(step, resamples - at)) @ table for at in range(0, resamples, step)
    ]
    drawn = np.concatenate(parts)
    drawn = drawn[drawn[:, list(per_context).index(("", "tokens"))] > 0]  # a draw may hit contexts without any token
    return {key: drawn[:, column] for column, key in enumerate(per_context)}


def _scores(name: str, full: Sums, drawn: Sums, contexts: int, tokens: int) -> DownstreamScores:
    both = _Quantities(full), _Quantities(drawn)
    _, at, point = name.partition(AT)
    named = (baseline + at + point for baseline in (ZERO, MEAN))
    zero, mean = (baseline if (baseline, "ce") in full else None for baseline in named)
    return DownstreamScores(
        contexts=contexts,
        tokens=tokens,
        ce_clean=_estimate([q.mean(*_CLEAN) for q in both]),
        ce=_estimate([q.mean(name, "ce") for q in both]),
        ce_zero=_estimate([q.mean(zero, "ce") for q in both]) if zero else None,
        ce_mean=_estimate([q.mean(mean, "ce") for q in both]) if mean else None,
        degradation=_estimate([q.cost(name) for q in both]),
        recovered_zero=_recovered([(q.cost(zero), q.cost(name)) for q in both]) if zero else None,
        recovered_mean=_recovered([(q.cost(mean), q.cost(name)) for q in both]) if mean else None,
        kl=_estimate([q.mean(name, "kl") for q in both]),
        kl_recovered_zero=_recovered([(q.mean(zero, "kl"), q.mean(name, "kl")) for q in both]) if zero else None,
    )


@dataclass(frozen=True)
class _Quantities:
    """Means per token, from sums over one or many draws of contexts."""

    sums: Sums

    def mean(self, name: str, kind: str) -> np.ndarray:
        return self.sums[name, kind] / self.sums["", "tokens"]

    def cost(self, name: str) -> np.ndarray:
        return (self.sums[name, "ce"] - self.sums[_CLEAN]) / self.sums["", "tokens"]


def _estimate(value_and_draws: Sequence[np.ndarray]) -> Estimate:
    (value,), draws = value_and_draws
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(value), float(low), float(high))


def _recovered(costs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate | None:
    """1 - cost / baseline cost, from the (baseline, replacement) costs of all contexts and of the draws."""
    baseline = _estimate([costs[0][0], costs[1][0]])
    if baseline.value < MIN_COST or baseline.low <= 0:
        return None
    sound = costs[1][0] > 0
    return _estimate([1 - costs[0][1] / costs[0][0], 1 - costs[1][1][sound] / costs[1][0][sound]])
