"""What codes cost: bits a row, the parameters they bring into play, and how evenly a codebook is used.

Codes of every kind are counted alike, so that a few continuous ones, many sparse ones and discrete ones can be set beside
each other, where L0 could not. A row's values are rounded to a step, and the bits are the entropies of the rounded codes,
added up over codes as if each were coded by itself: a latent that fires in 1 % of the rows costs little when it is silent.
The step is a share of each code's deviation, the largest of a ladder with which FVU is at most 5 % worse than with the
values as they are. Codes of a codebook are numbers already: their bits are the entropies of those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.metrics.reconstruction import in_float64
from sae.pipeline.saes import Coder

ROWS = 4096  # held-out rows whose codes are rounded
VALUES = 2**24  # codes held; of wider ones fewer rows are
WORSE = 1.05  # FVU of rounded codes, over that of codes as they are
STEPS = [2.0**-power for power in range(-1, 11)]  # shares of a code's deviation
LOG2 = math.log(2)
SPEAKS = 0.01  # variance of a mean, in the prior's, from which on a unit is active


@register
class CodeRate(Metric):
    """What the codes of a row cost, and how evenly a codebook is used."""

    name = "code_rate"
    needs = ("rows", "codes")
    figures = (
        Figure("bits", "bits a row", "entropy of a row's codes, rounded until FVU is 5 % worse, each coded by itself", "low"),
        Figure("active_parameters", "parameters in play", "parameters that the codes of a row bring into play", "low"),
        Figure("codebook_usage", "codebook used", "share of a codebook's codes that are used at all", "high", "studies", share=True),
        Figure("perplexity", "perplexity of codes", "exp of the entropy of a group's codes: as many, used evenly", "high", "studies"),
        Figure("active_units", "active units", "Gaussian codes whose means vary by more than 0.01 of the prior's variance", None, "studies"),
    )  # fmt: skip

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self._rows = 0
        self._parameters = torch.zeros((), dtype=torch.float64)
        self._counts = torch.zeros(coder.width, dtype=torch.int64)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._left = max(1, min(ROWS, VALUES // max(1, coder.width)))

    @classmethod
    def of(cls, subject: Subject) -> CodeRate:
        return cls(subject.coder)

    def update(self, batch: Encoded) -> None:
        assert batch.codes is not None
        self._rows += batch.codes.batch
        parameters = self.coder.active_parameters(batch.codes).double().sum()
        self._parameters = self._parameters.to(parameters.device) + parameters
        if self.coder.codebooks:
            fired = batch.codes.fired()
            self._counts = self._counts.to(fired.device) + fired
        elif self._left:
            self._held.append((batch.x[: self._left], batch.y[: self._left]))
            self._left -= len(self._held[-1][0])

    def result(self) -> Mapping[str, Value]:
        bits: float | None
        usage = perplexity = None
        if books := self.coder.codebooks:
            used = self._counts.cpu().split([*books])
            each = [entropy(counts) for counts in used]
            bits = sum(each) / LOG2
            usage = sum(int((counts > 0).sum()) for counts in used) / sum(books)
            perplexity = float(torch.tensor(each).mean().exp())
        else:
            bits = self._rounded_bits()
        return {
            "bits": bits, "active_parameters": self._parameters.item() / self._rows if self._rows else None,
            "codebook_usage": usage, "perplexity": perplexity, "active_units": self._active_units(),
        }  # fmt: skip

    def details(self) -> dict[str, Any]:
        return {"code_rate": {"rows": sum(len(x) for x, _ in self._held) or self._rows}}

    @torch.no_grad()
    def _rounded_bits(self) -> float | None:
        """Bits of codes rounded by the largest step that costs little; None where no step does, or there are no rows."""
        if not self._held:
            return None
        x, y = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        codes = self.coder.encode(x)
        values = codes.dense()
        deviations = values.std(0, correction=0)
        error = _error(self.coder.decode(codes), y)
        for share in STEPS:
            step = torch.where(deviations > 0, deviations * share, 1.0)
            numbers = (values / step).round()
            if _error(self.coder.decode(codes.edited(numbers * step)), y) <= WORSE * error:
                return entropies(numbers) / LOG2
        return None

    @torch.no_grad()
    def _active_units(self) -> int | None:
        means = self.coder.unit_means(torch.cat([rows for rows, _ in self._held])) if self._held else None
        return None if means is None else int((means.var(0) > SPEAKS).sum())


def entropy(counts: Tensor) -> float:
    """The entropy of a distribution in nats, from counts."""
    shares = counts[counts > 0].double() / counts.sum()
    return -(shares * shares.log()).sum().item()


def entropies(numbers: Tensor) -> float:
    """The entropies of the columns of whole numbers [n, m] in nats, added up; most of them may be 0."""
    n, m = numbers.shape
    rows, columns = numbers.nonzero(as_tuple=True)
    others = numbers[rows, columns].long()
    zeros = n - torch.bincount(columns, minlength=m)
    lowest, highest = (int(each) for each in others.aminmax()) if len(others) else (0, 0)
    _, counts = (columns * (highest - lowest + 1) + (others - lowest)).unique(return_counts=True)
    every = torch.cat([zeros[zeros > 0], counts]).double() / n
    return -(every * every.log()).sum().item()


def _error(y_hat: Tensor, y: Tensor) -> float:
    return (in_float64(y_hat) - in_float64(y)).square().sum().item()
