"""Products with a sparse matrix, row by row and latent by latent; what they mean is said in `sparse`.

A program owns one row, or one latent, and a stretch of its columns. It takes ENTRIES entries at a time, so that their
loads do not wait for one another: a latent that fires on every row has thousands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import covering, launch

ENTRIES = 32
COLUMNS = 128
MOST_COLUMNS = 8192
"""Columns up to which `compared` holds a row at once."""


@triton.jit
def _mix(starts, first, second, weights, table, out, totals, groups, n, d,
         ORDERED: tl.constexpr, TOTALS: tl.constexpr, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """out[g] = the sum over a group's entries of weight times a row of the table.

    ORDERED: a group's entries are first[starts[g]:], the table's rows second[entry]; else entries follow one another,
    and the rows are first[entry].
    """
    group = tl.program_id(0)
    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1, mask=group + 1 < groups, other=n)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < d
    total = tl.zeros([COLUMNS], tl.float32)
    weighed = tl.zeros([ENTRIES], tl.float32)
    for at in range(begin, end, ENTRIES):
        places = at + tl.arange(0, ENTRIES)
        there = places < end
        entries = places
        rows = tl.load(first + places, mask=there, other=0)
        if ORDERED:
            entries = rows
            rows = tl.load(second + entries, mask=there, other=0)
        weight = tl.load(weights + entries, mask=there, other=0.0)
        held = there[:, None] & within[None, :]
        values = tl.load(table + rows[:, None] * d + columns[None, :], mask=held, other=0.0)
        total += tl.sum(tl.where(held, weight[:, None] * values.to(tl.float32), 0.0), axis=0)
        weighed += weight
    tl.store(out + group.to(tl.int64) * d + columns, total, mask=within)
    if TOTALS:
        tl.store(totals + group, tl.sum(weighed), mask=tl.program_id(1) == 0)


@triton.jit
def _dots(starts, indices, rows, table, out, groups, n, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """out[entry] = the inner product of its batch row and its latent's row."""
    group = tl.program_id(0)
    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1, mask=group + 1 < groups, other=n)
    for at in range(begin, end, ENTRIES):
        places = at + tl.arange(0, ENTRIES)
        there = places < end
        latents = tl.load(indices + places, mask=there, other=0)
        total = tl.zeros([ENTRIES], tl.float32)
        for start in range(0, d, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            within = columns < d
            row = tl.load(rows + group.to(tl.int64) * d + columns, mask=within, other=0.0)
            held = there[:, None] & within[None, :]
            values = tl.load(table + latents[:, None] * d + columns[None, :], mask=held, other=0.0)
            total += tl.sum(tl.where(held, row[None, :] * values, 0.0), axis=1)
        tl.store(out + places, total, mask=there)


@triton.jit
def _compare(starts, indices, weights, table, rest, aim, y_hat, error, squares, dots, groups, n, d, alike,
             ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """A row's mixture and what is beside it, its error, the error's square, and its inner products with the entries.

    alike: how many rows, one after another, have the same beside them.
    """
    group = tl.program_id(0)
    begin = tl.load(starts + group)
    end = tl.load(starts + group + 1, mask=group + 1 < groups, other=n)
    columns = tl.arange(0, COLUMNS)
    within = columns < d
    row = group.to(tl.int64) * d + columns
    total = tl.zeros([COLUMNS], tl.float32)
    for at in range(begin, end, ENTRIES):
        places = at + tl.arange(0, ENTRIES)
        there = places < end
        latents = tl.load(indices + places, mask=there, other=0)
        weight = tl.load(weights + places, mask=there, other=0.0)
        held = there[:, None] & within[None, :]
        values = tl.load(table + latents[:, None] * d + columns[None, :], mask=held, other=0.0)
        total += tl.sum(tl.where(held, weight[:, None] * values, 0.0), axis=0)
    total += tl.load(rest + (group // alike).to(tl.int64) * d + columns, mask=within, other=0.0)
    off = tl.where(within, total - tl.load(aim + row, mask=within, other=0.0), 0.0)
    tl.store(y_hat + row, total, mask=within)
    tl.store(error + row, off, mask=within)
    tl.store(squares + group, tl.sum(off * off))
    for at in range(begin, end, ENTRIES):
        places = at + tl.arange(0, ENTRIES)
        there = places < end
        latents = tl.load(indices + places, mask=there, other=0)
        held = there[:, None] & within[None, :]
        values = tl.load(table + latents[:, None] * d + columns[None, :], mask=held, other=0.0)
        tl.store(dots + places, tl.sum(tl.where(held, off[None, :] * values, 0.0), axis=1), mask=there)


def mixed(starts: Tensor, indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """[B, d]: for each row, whose entries begin at starts [B], the weighted sum of the rows `indices` of the table."""
    out = table.new_empty(len(starts), table.shape[1], dtype=torch.float32)
    return _mixed(starts, indices, None, weights, table, out, None)


def by_latent(starts: Tensor, order: Tensor, row_ids: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """([m, d], [m]): for each latent, whose entries are order[starts[m]:], the weighted sum of the batch rows of these,
    and of the weights alone.
    """
    out = rows.new_empty(len(starts), rows.shape[1], dtype=torch.float32)
    totals = rows.new_empty(len(starts), dtype=torch.float32)
    return _mixed(starts, order, row_ids, weights, rows, out, totals), totals


def _mixed(
    starts: Tensor, first: Tensor, second: Tensor | None, weights: Tensor, table: Tensor, out: Tensor,
    totals: Tensor | None,
) -> Tensor:  # fmt: skip
    d = table.shape[1]
    columns = covering(d, 16, COLUMNS)
    launch(
        _mix, (len(starts), triton.cdiv(d, columns)), starts, first, first if second is None else second,
        weights.contiguous(), table.contiguous(), out, out if totals is None else totals, len(starts), len(first), d,
        ORDERED=second is not None, TOTALS=totals is not None, ENTRIES=ENTRIES, COLUMNS=columns,
    )  # fmt: skip
    return out


def dots(starts: Tensor, indices: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """[n]: for each entry the inner product of its batch row [B, d] and its latent's row of the table [m, d]."""
    out, d = rows.new_empty(len(indices), dtype=torch.float32), table.shape[1]
    launch(
        _dots, (len(starts),), starts, indices, rows.contiguous(), table.contiguous(), out, len(starts), len(indices),
        d, ENTRIES=ENTRIES, COLUMNS=covering(d, 16, COLUMNS),
    )  # fmt: skip
    return out


def compared(
    starts: Tensor, indices: Tensor, weights: Tensor, table: Tensor, rest: Tensor, aim: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y_hat [B, d] = the mixture + rest ([r, d], each of B / r rows), its error y_hat - aim, the error's squares [B],
    and the inner products [n] of a row's error with the table's rows that it mixed: d is at most MOST_COLUMNS.
    """
    d = table.shape[1]
    y_hat, error = torch.empty_like(aim), torch.empty_like(aim)
    squares, products = aim.new_empty(len(aim)), aim.new_empty(len(indices))
    columns = covering(d, 16, MOST_COLUMNS)
    launch(
        _compare, (len(starts),), starts, indices, weights.contiguous(), table.contiguous(), rest.contiguous(),
        aim.contiguous(), y_hat, error, squares, products, len(starts), len(indices), d,
        len(aim) // len(rest), ENTRIES=max(1, 8192 // columns), COLUMNS=columns, num_warps=8,
    )  # fmt: skip
    return y_hat, error, squares, products
