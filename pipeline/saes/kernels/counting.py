"""What is counted after a batch, each in one launch; what it means is said in `counting`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import covering, launch

BLOCK = 1024
"""Entries, or latents, of a program."""

VALUES = 8192
"""Values that the least is sought among at once."""


@triton.jit
def _fired(values, latents, out, entries, BLOCK: tl.constexpr):
    """Add one to the latent of each entry that is not 0; whole numbers add up to the same in any order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < entries, other=0.0)
    latent = tl.load(latents + at, mask=at < entries, other=0)
    one = tl.full([BLOCK], 1, tl.int64)
    tl.atomic_add(out + latent, one, mask=(at < entries) & (value != 0), sem="relaxed")


@triton.jit
def _follow(since, rate, fired, rows, all_rows, newest, latents, BLOCK: tl.constexpr):
    """Rows since each latent fired, and how often it does, after `rows` more; all_rows: the same as a float."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < latents
    count = tl.load(fired + at, mask=there, other=0)
    waited = tl.load(since + at, mask=there, other=0) + rows
    tl.store(since + at, tl.where(count > 0, 0, waited), mask=there)
    known = tl.load(rate + at, mask=there, other=0.0)
    tl.store(rate + at, known + newest * (tl.div_rn(count.to(tl.float32), all_rows) - known), mask=there)


@triton.jit
def _least(values, out, entries, VALUES: tl.constexpr):
    """The least value above 0 that is finite, or what is no number."""
    best = tl.full([VALUES], float("inf"), tl.float32)
    for start in range(0, entries, VALUES):
        at = start + tl.arange(0, VALUES)
        value = tl.load(values + at, mask=at < entries, other=0.0)
        best = tl.minimum(best, tl.where(value > 0, value, float("inf")))
    least = tl.min(best)
    tl.store(out, tl.where(least == float("inf"), float("nan"), least))


@triton.jit
def _lead(threshold, batches, seen, counts, least_weight):
    """A threshold after one more batch, if its least value is a number, and how many batches there were."""
    new = tl.load(seen)
    old = tl.load(threshold)
    there = new == new
    count = tl.load(batches) + tl.where(there, counts, 0)
    weight = tl.maximum(tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32)), least_weight)
    tl.store(batches, count)
    tl.store(threshold, tl.where(there, old + weight * (new - old), old))


def fired(values: Tensor, latents: Tensor, d_sae: int) -> Tensor:
    out = latents.new_zeros(d_sae)
    launch(_fired, (-(-len(values) // BLOCK),), values, latents, out, len(values), BLOCK=BLOCK)
    return out


def follow_(since: Tensor, rate: Tensor, fired: Tensor, rows: int, newest: float) -> None:
    block = covering(since.numel(), 16, BLOCK)
    grid = (-(-since.numel() // block),)
    launch(_follow, grid, since, rate, fired, rows, float(rows), newest, since.numel(), BLOCK=block)


def least(values: Tensor) -> Tensor:
    out = values.new_empty(1)
    launch(_least, (1,), values, out, values.numel(), VALUES=covering(values.numel(), 16, VALUES))
    return out


def lead_(threshold: Tensor, batches: Tensor, seen: Tensor, counts: bool, least_weight: float) -> None:
    launch(_lead, (1,), threshold, batches, seen, int(counts), least_weight)
