"""The Johnson-Lindenstrauss penalty: dictionary directions pushed towards right angles, and its settings.

It is computed in blocks of rows and its gradient with it, so that no [m, m] matrix is ever held: at 8192 latents that
would be 256 MiB, several times over. What it gives up: no double backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.cache.device import landing

from .config import Clock, Config, Steps, anneal

Form = Literal["abs", "abs_squared", "relu", "relu_squared"]

LARGEST = 1 - 1e-6
"""Cosines are cut here in size; atanh(1) is infinite."""

BLOCK_ELEMENTS = 2**21
"""Cosines held at a time, so that the passes over them stay in the processor's cache."""


class CoherenceConfig(Config):
    """Settings of the Johnson-Lindenstrauss penalty."""

    jl_form: Form = Field(
        "abs",
        description="what is averaged over pairs of latents: atanh of their cosine's size (abs) or of its positive "
        "part (relu), as it is or squared",
    )
    jl_on: Literal["decoder", "encoder", "both"] = Field("decoder", description="whose directions are spread")
    jl_coefficient: float = Field(0.5, ge=0, description="weight of the penalty after its warm-up")
    jl_start: float = Field(2.5, ge=0, description="weight of the penalty at the first step")
    jl_warmup: Steps = Field(
        2000,
        ge=0,
        description="steps of the quarter-cosine from jl_start to jl_coefficient; below 1, a share of the training",
    )
    jl_rows: int | None = Field(
        None, ge=1, description="latents compared with all others at a step, drawn anew each time; unset: all"
    )


def jl_term(config: CoherenceConfig, W_dec: Tensor, W_enc: Tensor, generator: torch.Generator, clock: Clock) -> Tensor:
    """The weighted penalty on rows W_dec [m, d_out], rows W_enc [m, d_in] or both (added); the generator draws."""
    m, rows = config.d_sae, None
    if config.jl_rows is not None and config.jl_rows < m:
        rows = landing.moved(torch.randperm(m, generator=generator)[: config.jl_rows], W_dec.device)
    weight = anneal(config.jl_start, config.jl_coefficient, config.jl_warmup, clock)
    tables = {"decoder": [W_dec], "encoder": [W_enc], "both": [W_dec, W_enc]}[config.jl_on]
    if weight == 0:
        return W_dec.new_zeros(())
    return weight * torch.stack([jl(table, config.jl_form, rows) for table in tables]).sum()


def jl(table: Tensor, form: Form = "abs", rows: Tensor | None = None) -> Tensor:
    """sqrt(d) / m^2 * the sum over ordered pairs i != j of a function of the cosine of rows i and j of [m, d].

    0 for orthonormal rows, sqrt(2 / pi) for many random ones under `abs`. rows: int64 [s], restricts i, and the sum is
    scaled by m / s. In float32 whatever autocast says.
    """
    with torch.autocast(table.device.type, enabled=False):
        unit = F.normalize(table, dim=1)
        return _Coherence.apply(unit, form, rows)


class _Coherence(torch.autograd.Function):
    """The penalty on unit rows, its gradient computed on the way."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, form: Form, rows: Tensor | None) -> Tensor:
        m, d = unit.shape
        gradient = torch.zeros_like(unit) if ctx.needs_input_grad[0] else None
        total = _every_pair(unit, form, gradient) if rows is None else _pairs_of(unit, form, rows, gradient)
        factor = scale(d, m * (m if rows is None else len(rows)))
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(factor))
        return (total * factor).to(unit.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


def _every_pair(unit: Tensor, form: Form, gradient: Tensor | None) -> Tensor:
    """The sum over ordered pairs; each is looked at once, by the block of its first row, and counts for both orders."""
    total = unit.new_zeros((), dtype=torch.float64)
    for start, cosines in triangle(unit):
        total += over_ordered_pairs(of_pairs(cosines, form))
        if gradient is not None:
            slope, stop = _slope(cosines, form), start + len(cosines)
            gradient[start:stop].addmm_(slope, unit[start:], alpha=2)
            gradient[stop:].addmm_(slope[:, len(cosines) :].T, unit[start:stop], alpha=2)
    return total


def triangle(unit: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the cosines of unit rows [m, d] with themselves and with those that come after, some rows n at a time: the
    first one's number, and [n, m - first], 0 where a row meets itself.
    """
    start = 0
    while start < len(unit):
        stop = min(len(unit), start + max(1, BLOCK_ELEMENTS // (len(unit) - start)))
        cosines = unit[start:stop] @ unit[start:].T
        cosines[:, : stop - start].fill_diagonal_(0)
        yield start, cosines
        start = stop


def over_ordered_pairs(values: Tensor) -> Tensor:
    """float64: the sum over ordered pairs of what a block of `triangle` has once for both orders."""
    own = len(values)
    return values[:, :own].sum(dtype=torch.float64) + 2 * values[:, own:].sum(dtype=torch.float64)


def scale(d: int, pairs: int) -> float:
    """What a sum over so many ordered pairs of directions in d dimensions is to be multiplied by."""
    return math.sqrt(d) / pairs


def _pairs_of(unit: Tensor, form: Form, rows: Tensor, gradient: Tensor | None) -> Tensor:
    """The sum over pairs of one of `rows` and any other, which may be one of them as well."""
    total = unit.new_zeros((), dtype=torch.float64)
    for who in rows.split(max(1, BLOCK_ELEMENTS // len(unit))):
        cosines = unit[who] @ unit.T
        cosines[torch.arange(len(who), device=unit.device), who] = 0
        total += of_pairs(cosines, form).sum(dtype=torch.float64)
        if gradient is not None:
            slope = _slope(cosines, form)
            gradient.index_add_(0, who, slope @ unit).addmm_(slope.T, unit[who])
    return total


def of_pairs(cosines: Tensor, form: Form) -> Tensor:
    """The function of each cosine."""
    value = _size(cosines, form).clamp_max_(LARGEST).atanh_()
    return value.square_() if form.endswith("squared") else value


def _slope(cosines: Tensor, form: Form) -> Tensor:
    """Its derivative, 0 beyond LARGEST."""
    size = _size(cosines, form)
    inside = size < LARGEST
    size = size.clamp_max_(LARGEST)
    slope = inside * (cosines.sign() if form.startswith("abs") else size > 0) / (1 - size * size)
    return 2 * size.atanh() * slope if form.endswith("squared") else slope


def _size(cosines: Tensor, form: Form) -> Tensor:
    return cosines.abs() if form.startswith("abs") else cosines.relu()
