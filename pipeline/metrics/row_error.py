"""The relative error of the usual row, which the few largest rows do not decide as they do sums over all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Value, register
from sae.pipeline.metrics.reconstruction import in_float64


@register
class RowError(Metric):
    """The relative error of the usual row. A row of zeros has none."""

    name = "row_error"
    needs = ("rows",)
    figures = (
        Figure("row_error", "relative error of a row", "median over rows of squared error / squared norm", "low"),
    )

    def __init__(self) -> None:
        self._errors: list[Tensor] = []  # float32 [B] of each batch, and bool [B], which have one: 5 bytes a row
        self._there: list[Tensor] = []

    def update(self, batch: Encoded) -> None:
        y, y_hat = in_float64(batch.y), in_float64(batch.y_hat)
        squares = y.square().sum(1)
        self._errors.append(((y - y_hat).square().sum(1) / squares).float())
        self._there.append(squares > 0)

    def result(self) -> Mapping[str, Value]:
        errors = torch.cat(self._errors)[torch.cat(self._there)] if self._errors else torch.empty(0)
        return {"row_error": errors.median().item() if len(errors) else None}
