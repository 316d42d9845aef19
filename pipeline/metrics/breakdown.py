"""Reconstruction and cross-entropy by where a token stands in its context, and by how common it is.

Variance is taken around the mean of all rows, as FVU takes it, so that the buckets' errors and variances add up to those of
all. Positions are in buckets that double in length; how common a token is, is its share of the held-out tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.downstream import MIN_COST, SAE, ZERO
from sae.pipeline.metrics.metric import Encoded, Metric, Places, Value, register
from sae.pipeline.metrics.reconstruction import in_float64
from sae.pipeline.saes import Latents

FREQUENCIES = (1e-2, 1e-3, 1e-4, 1e-5)  # shares of the held-out tokens
POSITIONS = 26  # buckets: 0, 1, 2 to 3, 4 to 7, ... to the longest context


@register
class Breakdown(Metric):
    """Reconstruction and cross-entropy by position, and by how common the token is: tables among the details."""

    name = "breakdown"
    needs = ("rows", "text")
    figures = ()

    def __init__(self) -> None:
        self._centre: Tensor | None = None
        self._sides = {"by_position": _Buckets(POSITIONS), "by_frequency": _Buckets(len(FREQUENCIES) + 1)}

    def update(self, batch: Encoded) -> None:
        if batch.places is None or not len(batch.y):
            return
        y = in_float64(batch.y)
        if self._centre is None:
            self._centre = y.mean(0)
        errors, away = (y - in_float64(batch.y_hat)).square().sum(1), y - self._centre
        l0 = batch.codes.l0().double() if isinstance(batch.codes, Latents) else None
        for one, buckets in self._in(batch.places):
            one.count_rows(buckets, away, errors, l0)

    def splice(self, clean: Tensor, spliced: Mapping[str, tuple[Tensor, Tensor]], mask: Tensor, places: Places) -> None:
        ce, kl = spliced[SAE]
        values = torch.stack([in_float64(one).flatten() for one in (clean, ce, kl, spliced[ZERO][0])], 1)
        for one, buckets in self._in(places):
            one.count_predictions(torch.where(mask, buckets, -1).flatten(), values)

    def result(self) -> dict[str, Value]:
        return {}

    def details(self) -> dict[str, Any]:
        return {
            "by_position": self._sides["by_position"].table(_positions),
            "by_frequency": self._sides["by_frequency"].table(_shares),
        }

    def _in(self, places: Places) -> list[tuple[_Buckets, Tensor]]:
        """The buckets of each table, and which of them each token is in; -1 for none."""
        doubling = torch.frexp(places.position.double()).exponent.long()
        return [*zip(self._sides.values(), (doubling, places.rarity.long()), strict=True)]


class _Buckets:
    """Sums over the rows, and over the predictions, of each of `count` buckets, and of one more for those in none."""

    def __init__(self, count: int) -> None:
        self._count, self._with_l0 = count, True
        self._rows = self._zeros(4)  # 1, squared error, |y - centre|^2, L0
        self._away: Tensor | None = None  # [count + 1, d], y - centre
        self._predictions = self._zeros(5)  # 1, CE clean, CE, KL, CE with zeros

    def count_rows(self, buckets: Tensor, away: Tensor, errors: Tensor, l0: Tensor | None) -> None:
        self._with_l0 = l0 is not None
        values = [torch.ones_like(errors), errors, away.square().sum(1), torch.zeros_like(errors) if l0 is None else l0]
        if self._away is None:
            self._away = self._zeros(away.shape[1])
        self._rows = self._added(self._rows, buckets, torch.stack(values, 1))
        self._away = self._added(self._away, buckets, away)

    def count_predictions(self, buckets: Tensor, values: Tensor) -> None:
        both = torch.cat([values.new_ones(len(values), 1), values], 1)
        self._predictions = self._added(self._predictions, buckets, both)

    def _zeros(self, width: int) -> Tensor:
        return torch.zeros(self._count + 1, width, dtype=torch.float64)

    def _added(self, sums: Tensor, buckets: Tensor, values: Tensor) -> Tensor:
        """Sums [count + 1, w] with those of values [n, w] in buckets [n], where they are; -1 is none."""
        there = torch.where(buckets >= 0, buckets, self._count)
        return sums.to(values.device).index_add_(0, there.to(values.device), values)

    def table(self, named: Any) -> list[dict[str, Any]]:
        """A line for each bucket that has rows or predictions."""
        lines = []
        of_rows, predictions = self._rows.cpu()[:-1], self._predictions.cpu()[:-1]
        rows, tokens = of_rows[:, 0], predictions[:, 0]
        away = None if self._away is None else self._away.cpu()[:-1]
        mean = None if away is None else away.sum(0) / rows.sum().clamp_min(1)
        for bucket in ((rows > 0) | (tokens > 0)).nonzero().flatten().tolist():
            line = {**named(bucket), "rows": int(rows[bucket]), "fvu": None, "l0": None}
            if away is not None and mean is not None and rows[bucket] > 0:
                count, error, square, l0 = of_rows[bucket].tolist()
                variance = square - 2 * (mean @ away[bucket]).item() + count * mean.square().sum().item()
                line["fvu"] = error / variance if variance > 0 else None
                line["l0"] = l0 / count if self._with_l0 else None
            if tokens[bucket] > 0:
                count, *sums = predictions[bucket].tolist()
                clean, ce, kl, zero = (one / count for one in sums)
                recovered = (zero - ce) / (zero - clean) if zero - clean >= MIN_COST else None
                line |= {
                    "tokens": int(count), "ce_clean": clean, "ce_degradation": ce - clean, "kl": kl,
                    "ce_recovered_zero": recovered,
                }  # fmt: skip
            lines.append(line)
        return lines


def _positions(bucket: int) -> dict[str, float]:
    return {"from": 0, "to": 0} if bucket == 0 else {"from": 1 << bucket - 1, "to": (1 << bucket) - 1}


def _shares(bucket: int) -> dict[str, float]:
    """The share of the held-out tokens that a token of a bucket has: at least `from`, below `below`."""
    edges = (1.0, *FREQUENCIES, 0.0)
    return {"from": edges[bucket + 1], "below": edges[bucket]}
