"""Latents whose number nobody knows beforehand: everything that a batch's loss takes from them, and its gradient.

p [B, m] are pre-activations, as a product gave them. An entry matters where p exceeds its latent's bound. Entries are
listed row by row, and latent by latent, in as much room as a list has; where there are more, all of the row (or of the
latent) is gone through, which takes longer and gives the same. So nothing is left out and nobody has to count.

What is asked of entries is said in `..uncounted`. A program that owns a row mixes the table's rows and sums; one that
owns a latent has all of its gradients. Both take ENTRIES entries at a time, in ascending order, so that sums are always
the same. AGAIN: p is computed again, from x and the weights, in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..uncounted import Asked, Sums
from . import covering, launch
from .lists import above, listed, member, members

TILE = 8192
"""Numbers of several rows that are taken together, where a row has fewer."""

KINDS = {"none": 0, "linear": 1, "steps": 2, "tanh": 3, "power": 4}
"""What is summed over a row's entries, by its name."""

STEPS, TANH, POWER = (tl.constexpr(KINDS[name]) for name in ("steps", "tanh", "power"))


def _constants(asked: Asked, again: bool, d_in: int, d_out: int) -> dict[str, int]:
    """What a kernel is compiled for."""
    into, out = (covering(d, 16, 1 << 16) for d in (d_in, d_out))
    return {
        "AFFINE": asked.gain is not None, "GATES": asked.gates, "KIND": KINDS[asked.summed],
        "WEIGHED": asked.weights is not None, "PULLS": asked.pulls is not None, "AGAIN": again, "IN": into, "OUT": out,
        "ENTRIES": max(1, TILE // max(into, out)), "num_warps": 8,
    }  # fmt: skip


@triton.jit
def _positive(value):
    """max(value, 0), and what is no number as it is."""
    return tl.where(value <= 0, 0.0, value)


@triton.jit
def _raised(value, power, smallest):
    return tl.exp(power * tl.log(value + smallest))


@triton.jit
def _tanh(value):
    small = tl.exp(-2 * tl.abs(value))
    size = (1 - small) / (1 + small)
    return tl.where(value < 0, -size, size)


@triton.jit
def _by_row(p, lists, counts, bounds, x, weight, bias, theta, gain, offset, table, weights, pulls, mixture, mixed_gates,
            sums, pulled, active, fired, m, d_in, d_out, room, power, smallest, AFFINE: tl.constexpr,
            GATES: tl.constexpr, KIND: tl.constexpr, WEIGHED: tl.constexpr, PULLS: tl.constexpr, AGAIN: tl.constexpr,
            IN: tl.constexpr, OUT: tl.constexpr, ENTRIES: tl.constexpr):  # fmt: skip
    """A row's mixtures of the table's rows and sums, and how many of its values are not 0, of which `fired` is told."""
    row = tl.program_id(0).to(tl.int64)
    many, named = members(counts, row, m, room)
    ins = tl.arange(0, IN)
    outs = tl.arange(0, OUT)
    total = tl.zeros([OUT], tl.float32)
    total_of_gates = tl.zeros([OUT], tl.float32)
    summed = tl.zeros([ENTRIES], tl.float32)
    pulling = tl.zeros([ENTRIES], tl.float32)
    on = tl.zeros([ENTRIES], tl.int32)
    if AGAIN:
        own = tl.load(x + row * d_in + ins, mask=ins < d_in, other=0.0)
    for start in range(0, many, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        latent = member(lists, row, place, named, room)
        there = place < many
        value = tl.load(p + row * m + latent, mask=there, other=0.0).to(tl.float32)
        there = there & above(value, tl.load(bounds + latent, mask=there, other=0.0))
        if AGAIN:
            its = tl.load(weight + latent[:, None] * d_in + ins[None, :], mask=there[:, None] & (ins < d_in)[None, :],
                          other=0.0)  # fmt: skip
            value = tl.sum(its * own[None, :], axis=1) + tl.load(bias + latent, mask=there, other=0.0)
        threshold = tl.load(theta + latent, mask=there, other=0.0)
        over = there & above(value, threshold)
        line = value
        if AFFINE:
            line = tl.load(gain + latent, mask=there, other=0.0) * value
            line += tl.load(offset + latent, mask=there, other=0.0)
        if GATES:
            line = _positive(line)
        f = tl.where(over, line, 0.0)
        its = tl.load(table + latent[:, None] * d_out + outs[None, :], mask=over[:, None] & (outs < d_out)[None, :],
                      other=0.0)  # fmt: skip
        total += tl.sum(f[:, None] * its, axis=0)
        on += (f != 0).to(tl.int32)
        tl.atomic_add(fired + latent, 1, mask=f != 0, sem="relaxed")
        v = f
        if GATES:
            v = tl.where(over, _positive(value), 0.0)
            total_of_gates += tl.sum(v[:, None] * its, axis=0)
        scaled = v
        if WEIGHED:
            scaled = v * tl.load(weights + latent, mask=there, other=0.0)
        if KIND == STEPS:
            scaled = over.to(tl.float32)
        if KIND == TANH:
            scaled = _tanh(scaled)
        if KIND == POWER:
            least = _raised(tl.zeros([ENTRIES], tl.float32), power, smallest)
            scaled = tl.where(over, _raised(v, power, smallest) - least, 0.0)
        summed += scaled
        if PULLS:
            pull = tl.load(pulls + latent, mask=there, other=0.0)
            pulling += pull * tl.where(over, value - threshold, 0.0)
    tl.store(mixture + row * d_out + outs, total, mask=outs < d_out)
    tl.store(active + row, tl.sum(on))
    if GATES:
        tl.store(mixed_gates + row * d_out + outs, total_of_gates, mask=outs < d_out)
    if KIND != 0:
        tl.store(sums + row, tl.sum(summed))
    if PULLS:
        tl.store(pulled + row, tl.sum(pulling))


@triton.jit
def _by_latent(p, lists, counts, bounds, x, weight, bias, theta, gain, offset, table, weights, pulls, of_mixture,
               of_gates, of_sums, of_pulled, order, to_weight, to_table, to_bias, to_theta, to_gain, to_offset,
               to_weights, to_pulls, rows, m, d_in, d_out, room, power, smallest, width, AFFINE: tl.constexpr,
               GATES: tl.constexpr, KIND: tl.constexpr, WEIGHED: tl.constexpr, PULLS: tl.constexpr,
               AGAIN: tl.constexpr, LEARNS: tl.constexpr, TO_P: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
               ENTRIES: tl.constexpr):  # fmt: skip
    """A latent's gradients, its rows of both weights' among them. LEARNS: whether its threshold has a kernel."""
    latent = tl.load(order + tl.program_id(0))
    many, named = members(counts, latent, rows, room)
    ins = tl.arange(0, IN)
    outs = tl.arange(0, OUT)
    bound = tl.load(bounds + latent)
    threshold = tl.load(theta + latent)
    slope = 1.0
    shift = 0.0
    scale = 1.0
    pull = 0.0
    if AFFINE:
        slope = tl.load(gain + latent)
        shift = tl.load(offset + latent)
    if WEIGHED:
        scale = tl.load(weights + latent)
    if PULLS:
        pull = tl.load(pulls + latent)
    if AGAIN:
        own_in = tl.load(weight + latent * d_in + ins, mask=ins < d_in, other=0.0)
    own_out = tl.load(table + latent * d_out + outs, mask=outs < d_out, other=0.0)
    sum_in = tl.zeros([IN], tl.float32)
    sum_out = tl.zeros([OUT], tl.float32)
    sum_p = tl.zeros([ENTRIES], tl.float32)
    sum_theta = tl.zeros([ENTRIES], tl.float32)
    sum_gain = tl.zeros([ENTRIES], tl.float32)
    sum_offset = tl.zeros([ENTRIES], tl.float32)
    sum_scale = tl.zeros([ENTRIES], tl.float32)
    sum_pull = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, many, ENTRIES):
        place = start + tl.arange(0, ENTRIES)
        row = member(lists, latent, place, named, room)
        there = place < many
        value = tl.load(p + row * m + latent, mask=there, other=0.0).to(tl.float32)
        there = there & above(value, bound)
        read = tl.load(x + row[:, None] * d_in + ins[None, :], mask=there[:, None] & (ins < d_in)[None, :], other=0.0)
        if AGAIN:
            value = tl.sum(read * own_in[None, :], axis=1) + tl.load(bias + latent)
        within = there[:, None] & (outs < d_out)[None, :]
        over = there & above(value, threshold)
        line = slope * value + shift
        on = over
        if GATES:
            on = over & above(line, 0.0)
        f = tl.where(on, line, 0.0)
        error = tl.load(of_mixture + row[:, None] * d_out + outs[None, :], mask=within, other=0.0)
        sum_out += tl.sum(f[:, None] * error, axis=0)
        of_f = tl.sum(error * own_out[None, :], axis=1)
        v = f
        of_v = tl.zeros([ENTRIES], tl.float32)
        if GATES:
            v = tl.where(over, _positive(value), 0.0)
            error = tl.load(of_gates + row[:, None] * d_out + outs[None, :], mask=within, other=0.0)
            of_v = tl.sum(error * own_out[None, :], axis=1)
        of_sum = tl.zeros([ENTRIES], tl.float32)
        if KIND != 0:
            of_sum = tl.load(of_sums + row, mask=there, other=0.0)
            if KIND == TANH:
                bent = _tanh(scale * v)
                of_scaled = of_sum * (1 - bent * bent)
                of_v += of_scaled * scale
                sum_scale += of_scaled * v
            elif KIND == POWER:
                of_v += of_sum * power * _raised(v, power - 1, smallest)
            elif KIND != STEPS:
                of_v += of_sum * scale
                sum_scale += of_sum * v
        of_p = tl.zeros([ENTRIES], tl.float32)
        if GATES:
            of_p += tl.where(over, of_v, 0.0)
        else:
            of_f += of_v
        sum_gain += tl.where(on, of_f * value, 0.0)
        sum_offset += tl.where(on, of_f, 0.0)
        of_p += tl.where(on, of_f * slope, 0.0)
        if LEARNS:
            of_theta = of_f * threshold
            if KIND == STEPS:
                of_theta += of_sum
            near = there & (tl.abs(value - threshold) < width / 2)
            of_theta = tl.where(near, -of_theta / width, 0.0)
            sum_theta += of_theta
            if TO_P:
                of_p -= of_theta
        if PULLS:
            of_pull = tl.where(over, tl.load(of_pulled + row, mask=there, other=0.0), 0.0)
            of_p += pull * of_pull
            sum_theta -= pull * of_pull
            sum_pull += of_pull * (value - threshold)
        sum_p += of_p
        sum_in += tl.sum(of_p[:, None] * read, axis=0)
    tl.store(to_weight + latent * d_in + ins, sum_in, mask=ins < d_in)
    tl.store(to_table + latent * d_out + outs, sum_out, mask=outs < d_out)
    tl.store(to_bias + latent, tl.sum(sum_p))
    tl.store(to_theta + latent, tl.sum(sum_theta))
    if AFFINE:
        tl.store(to_gain + latent, tl.sum(sum_gain))
        tl.store(to_offset + latent, tl.sum(sum_offset))
    if WEIGHED:
        tl.store(to_weights + latent, tl.sum(sum_scale))
    if PULLS:
        tl.store(to_pulls + latent, tl.sum(sum_pull))


class Gradients(NamedTuple):
    """What each of them is the gradient of: of both weights, [m, d], and of vectors [m]."""

    weight: Tensor
    table: Tensor
    bias: Tensor
    theta: Tensor
    gain: Tensor
    offset: Tensor
    weights: Tensor
    pulls: Tensor


def forward(
    p: Tensor, bounds: Tensor, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor, asked: Asked, again: bool
) -> Sums:
    """The sums of pre-activations p [B, m] of rows x [B, d_in], which are less the centre already."""
    (rows, m), d_out = p.shape, table.shape[1]
    lists, counts = listed(p, bounds, by_row=True)
    mixture, sums, pulled = table.new_empty(rows, d_out), table.new_empty(rows), table.new_empty(rows)
    gates = table.new_empty(rows, d_out) if asked.gates else mixture
    active, fired = counts.new_empty(rows), counts.new_zeros(m)
    launch(
        _by_row, (rows,), p, lists, counts, bounds, x, weight, bias, *_vectors(asked, table), mixture, gates, sums,
        pulled, active, fired, m, x.shape[1], d_out, lists.shape[1], asked.power, asked.smallest,
        **_constants(asked, again, x.shape[1], d_out),
    )  # fmt: skip
    return Sums(
        mixture, gates if asked.gates else None, sums if asked.summed != "none" else None,
        pulled if asked.pulls is not None else None, active, fired,
    )  # fmt: skip


def backward(
    p: Tensor, bounds: Tensor, x: Tensor, weight: Tensor, bias: Tensor, table: Tensor, asked: Asked, again: bool,
    of_mixture: Tensor, of_gates: Tensor | None, of_sums: Tensor | None, of_pulled: Tensor | None,
) -> Gradients:  # fmt: skip
    """The gradients, given those of the sums. What was not asked for has none that means anything."""
    (rows, m), d_out = p.shape, table.shape[1]
    lists, counts = listed(p, bounds, by_row=False)
    order = counts.argsort(descending=True)  # latents with many entries take long, and are to begin first
    found = Gradients(torch.empty_like(weight), torch.empty_like(table), *(torch.empty_like(bias) for _ in range(6)))
    launch(
        _by_latent, (m,), p, lists, counts, bounds, x, weight, bias, *_vectors(asked, table), of_mixture,
        *(_some(one, of_mixture) for one in (of_gates, of_sums, of_pulled)), order, *found, rows, m, x.shape[1], d_out,
        lists.shape[1], asked.power, asked.smallest, asked.width, LEARNS=asked.width > 0, TO_P=asked.to_p,
        **_constants(asked, again, x.shape[1], d_out),
    )  # fmt: skip
    return found


def _vectors(asked: Asked, table: Tensor) -> tuple[Tensor, ...]:
    """theta, gain, offset, the table, weights and pulls, as kernels take them."""
    theta, gain, offset, weights, pulls = (
        _some(one, table) for one in (asked.theta, asked.gain, asked.offset, asked.weights, asked.pulls)
    )
    return theta, gain, offset, table, weights, pulls


def _some(one: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, contiguous, or where there is none another that is not looked at."""
    return other if one is None else one.contiguous()
