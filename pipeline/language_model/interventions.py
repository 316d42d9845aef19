"""Interventions: activations are changed while a model runs, the one way of splicing, ablating and steering."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from torch import Tensor

from sae.cache.errors import SaeError
from sae.pipeline.language_model.sites import Point

Change = Callable[[Tensor], Tensor | None]
"""Given activations [B, T, width] in the model's precision, returns what goes on in their place, of the same shape;
None where it has only looked at them."""

Intervention = Mapping[Point, Change]
"""What is done at each of some points, in one pass."""

Place = TypeVar("Place", bound=Hashable)


def predicting(predict: Callable[[Tensor, Tensor], Tensor], reads: Place, writes: Place) -> Mapping[Place, Change]:
    """The activations at `writes` replaced by `predict(written, read)`, given those at both points [B, T, width].

    So a transcoder is spliced in, which reads `mlp_in` and writes `mlp_out`. A pass raises SaeError where `reads` is
    not computed before `writes`.
    """
    if reads == writes:
        return {writes: lambda value: predict(value, value)}
    seen: list[Tensor] = []

    def look(value: Tensor) -> None:
        seen[:] = [value]

    def write(value: Tensor) -> Tensor:
        if not seen:
            raise SaeError(f"{reads} is computed after {writes}, so it cannot decide what goes there; swap them")
        return predict(value, seen.pop())

    return {reads: look, writes: write}


def changed(change: Change, value: Tensor, point: object) -> Tensor | None:
    """Apply a function to a value. Raises ValueError where it returns another shape."""
    new = change(value)
    if new is not None and new.shape != value.shape:
        raise ValueError(f"what replaces {point} must have its shape {list(value.shape)}, not {list(new.shape)}")
    return new
