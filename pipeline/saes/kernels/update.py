"""Adam and all that goes with it, in one pass over every parameter: a program owns a row of one of them, or a stretch.

The gradient of a row that is kept at norm 1 first loses what lies along the row; then gradients are scaled to the norm
they may have, moments and weights follow, and rows come back to norm 1. Where gradients are clipped a pass before has
each program's sum of squares, which are added in their order; nothing of it is known to the host. Of the optimiser's
state all is kept as torch keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import covering, launch

COLUMNS = 1024
"""Columns of a row that a program takes at least, and of what has no rows, numbers."""

MOST_COLUMNS = 4096
"""Columns of a row that a program holds at once; of a longer one it takes so many at a time, twice."""

TOGETHER = 16
"""Tables that are updated by one launch, which bounds what it is given."""

PARTS = 8192
"""Sums of squares that are added at once."""

LITTLE = tl.constexpr(1e-6)  # beside a gradient's norm, as torch's clipping has it
FREE, UNIT, LONG_UNIT, NOT_NEGATIVE = (tl.constexpr(code) for code in range(4))
CODES = {"free": FREE, "unit": UNIT, "not negative": NOT_NEGATIVE}


class Table(NamedTuple):
    """A parameter, its gradient, what Adam remembers, its learning rate, and what holds of it after each step.

    All float32 and contiguous. step: a number, of steps taken. kept: as a parameter group says it.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    rate: float
    kept: Literal["free", "unit", "not negative"]


@triton.jit
def _along(weight, grad, row, width, COLUMNS: tl.constexpr):
    """The inner product of a row and its gradient."""
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        g = tl.load(grad + row + at, mask=at < width, other=0.0)
        total += g * tl.load(weight + row + at, mask=at < width, other=0.0)
    return tl.sum(total)


@triton.jit
def _tangent(weight, grad, at, there, along, KEPT: tl.constexpr):
    """Weights, and their gradient without what lies along the row, if that is kept at norm 1."""
    w = tl.load(weight + at, mask=there, other=0.0)
    g = tl.load(grad + at, mask=there, other=0.0)
    if (KEPT == UNIT) | (KEPT == LONG_UNIT):
        g -= along * w
    return w, g


@triton.jit
def _squares(out, tables, places, KEPT: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of squares of each program's gradient."""
    program = tl.program_id(0)
    for i in tl.static_range(len(KEPT)):
        begin, end, length, size = places[i]
        if (program >= begin) & (program < end):
            weight, grad = tables[i]
            row = (program - begin).to(tl.int64) * length
            width = tl.minimum(length, size - row)
            along = 0.0
            if (KEPT[i] == UNIT) | (KEPT[i] == LONG_UNIT):
                along = _along(weight, grad, row, width, COLUMNS)
            total = tl.zeros([COLUMNS], tl.float32)
            for start in range(0, width, COLUMNS):
                at = start + tl.arange(0, COLUMNS)
                g = _tangent(weight, grad, row + at, at < width, along, KEPT[i])[1]
                total += g * g
            tl.store(out + program, tl.sum(total))


@triton.jit
def _prepare(numbers, squares, count, clip, rates, steps, log_beta1, log_beta2, CLIP: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    """numbers: what gradients are to be multiplied by; of each table, its rate and the root of the second moments'
    share, both corrected for the steps it has taken, of which this is one more.
    """
    factor = 1.0
    if CLIP:
        total = tl.zeros([PARTS], tl.float32)
        for start in range(0, count, PARTS):
            at = start + tl.arange(0, PARTS)
            total += tl.load(squares + at, mask=at < count, other=0.0)
        factor = clip / (tl.sqrt_rn(tl.sum(total)) + LITTLE)
        factor = tl.where(factor > 1, 1.0, factor)  # what is no number stays none
    tl.store(numbers, factor)
    for i in tl.static_range(len(rates)):
        taken = tl.load(steps[i]) + 1
        tl.store(steps[i], taken)
        long = taken.to(tl.float64)  # 1 - beta is small
        rest1 = (1 - tl.exp2(long * log_beta1)).to(tl.float32)
        rest2 = (1 - tl.exp2(long * log_beta2)).to(tl.float32)
        tl.store(numbers + 1 + 2 * i, rates[i] / rest1)
        tl.store(numbers + 2 + 2 * i, tl.sqrt_rn(rest2))


@triton.jit
def _moved(table, moments, at, there, along, numbers, i, rest1, beta2, rest2, eps, KEPT: tl.constexpr):
    """Weights after Adam's step, whose moments are written."""
    w, g = _tangent(table[0], table[1], at, there, along, KEPT)
    g *= tl.load(numbers)
    m = tl.load(moments[0] + at, mask=there, other=0.0)
    v = tl.load(moments[1] + at, mask=there, other=0.0)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    tl.store(moments[0] + at, m, mask=there)
    tl.store(moments[1] + at, v, mask=there)
    rate = tl.load(numbers + 1 + 2 * i)
    root = tl.load(numbers + 2 + 2 * i)
    w -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    if KEPT == NOT_NEGATIVE:
        w = tl.where(w < 0, 0.0, w)
    return tl.where(there, w, 0.0)


@triton.jit
def _update(numbers, tables, moments, places, rest1, beta2, rest2, eps, KEPT: tl.constexpr, COLUMNS: tl.constexpr):
    """One step of Adam on the rows of each table, which stay of norm 1 where they are kept so."""
    program = tl.program_id(0)
    for i in tl.static_range(len(KEPT)):
        begin, end, length, size = places[i]
        if (program >= begin) & (program < end):
            table = tables[i]
            weight, grad = table
            row = (program - begin).to(tl.int64) * length
            width = tl.minimum(length, size - row)
            along = 0.0
            if (KEPT[i] == UNIT) | (KEPT[i] == LONG_UNIT):
                along = _along(weight, grad, row, width, COLUMNS)
            if KEPT[i] == LONG_UNIT:
                total = tl.zeros([COLUMNS], tl.float32)
                for start in range(0, width, COLUMNS):
                    at = start + tl.arange(0, COLUMNS)
                    w = _moved(
                        table, moments[i], row + at, at < width, along, numbers, i, rest1, beta2, rest2, eps, KEPT[i]
                    )
                    tl.store(weight + row + at, w, mask=at < width)
                    total += w * w
                norm = tl.sqrt_rn(tl.sum(total))
                tl.debug_barrier()  # what is read here other threads have written
                for start in range(0, width, COLUMNS):
                    at = start + tl.arange(0, COLUMNS)
                    w = tl.load(weight + row + at, mask=at < width, other=0.0)
                    tl.store(weight + row + at, tl.div_rn(w, norm), mask=at < width)
            else:
                at = tl.arange(0, COLUMNS)
                w = _moved(
                    table, moments[i], row + at, at < width, along, numbers, i, rest1, beta2, rest2, eps, KEPT[i]
                )
                if KEPT[i] == UNIT:
                    w = tl.div_rn(w, tl.sqrt_rn(tl.sum(w * w)))
                tl.store(weight + row + at, w, mask=at < width)


def adam(tables: Sequence[Table], clip: float | None, betas: tuple[float, float], eps: float) -> None:
    """Take Adam's step of parameters in place, with gradients whose norm over all of them is at most `clip`."""
    bunches = [_Bunch(tables[i : i + TOGETHER]) for i in range(0, len(tables), TOGETHER)]
    ends = [*accumulate((bunch.programs for bunch in bunches), initial=0)]
    squares = tables[0].weight.new_empty(ends[-1] if clip is not None else 0)
    if clip is not None:
        for begin, end, bunch in zip(ends, ends[1:], bunches, strict=False):
            launch(_squares, (bunch.programs,), squares[begin:end], bunch.pairs, bunch.places, **bunch.constants)
    logs = [math.log2(beta) if beta else -math.inf for beta in betas]
    for bunch in bunches:
        numbers = squares.new_empty(1 + 2 * len(bunch.rates))
        launch(
            _prepare, (1,), numbers, squares, len(squares), clip or 0.0, bunch.rates, bunch.steps, *logs,
            CLIP=clip is not None, PARTS=PARTS, num_warps=16,
        )  # fmt: skip
        launch(
            _update, (bunch.programs,), numbers, bunch.pairs, bunch.moments, bunch.places, 1 - betas[0], betas[1],
            1 - betas[1], eps, **bunch.constants,
        )  # fmt: skip


class _Bunch:
    """Tables that are updated together, cut into rows, as kernels are given them.

    places: of each table the first program and the one after its last, numbers of a row, and of the table.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        widest = max((table.weight.shape[1] for table in tables if table.kept == "unit"), default=1)
        columns = covering(widest, COLUMNS, MOST_COLUMNS)
        self.pairs = tuple((table.weight, table.grad) for table in tables)
        self.moments = tuple((table.exp_avg, table.exp_avg_sq) for table in tables)
        self.steps, self.rates = tuple(table.step for table in tables), tuple(table.rate for table in tables)
        self.programs, places, kept = 0, [], []
        for table in tables:
            length = table.weight.shape[1] if table.kept == "unit" else columns
            size, begin = table.weight.numel(), self.programs
            self.programs += -(-size // length)
            places.append((begin, self.programs, length, size))
            kept.append((LONG_UNIT if length > columns else CODES[table.kept]).value)
        self.places = tuple(places)
        self.constants = {"KEPT": tuple(kept), "COLUMNS": columns, "num_warps": max(4, min(16, columns // 256))}
