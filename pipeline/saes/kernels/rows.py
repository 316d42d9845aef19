"""What is done to every row of a table by itself."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import covering, launch

COLUMNS = 1024


@triton.jit
def _tangent(grad, rows, d, COLUMNS: tl.constexpr):
    """grad -= (grad . row) row"""
    row = tl.program_id(0).to(tl.int64) * d
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        g = tl.load(grad + row + at, mask=at < d, other=0.0)
        total += g * tl.load(rows + row + at, mask=at < d, other=0.0)
    along = tl.sum(total)
    for start in range(0, d, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        g = tl.load(grad + row + at, mask=at < d, other=0.0)
        tl.store(grad + row + at, g - along * tl.load(rows + row + at, mask=at < d, other=0.0), mask=at < d)


@triton.jit
def _unit(rows, d, COLUMNS: tl.constexpr):
    """row /= |row|"""
    row = tl.program_id(0).to(tl.int64) * d
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(rows + row + at, mask=at < d, other=0.0)
        total += value * value
    norm = tl.sqrt_rn(tl.sum(total))
    for start in range(0, d, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(rows + row + at, mask=at < d, other=0.0)
        tl.store(rows + row + at, tl.div_rn(value, norm), mask=at < d)


def tangent_(grad: Tensor, rows: Tensor) -> None:
    """Take from each row of the gradient [m, d] what lies along the row (of norm 1) itself."""
    launch(_tangent, (len(rows),), grad, rows, rows.shape[1], COLUMNS=covering(rows.shape[1], 16, COLUMNS))


def unit_(rows: Tensor) -> None:
    """Bring each row [m, d] to norm 1."""
    launch(_unit, (len(rows),), rows, rows.shape[1], COLUMNS=covering(rows.shape[1], 16, COLUMNS))
