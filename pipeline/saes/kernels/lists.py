"""Lists of the entries of a dense [B, m] that exceed a bound, in shapes that nobody has to count for.

A list has room for a part of what it could have to hold. Where there is more, it says so, and whoever reads it goes
through all members in its place: exact at any number, on the device alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import covering, launch

ROOM = 16
"""A list has room for this part of a group's members."""

MEMBERS = 4096
"""Numbers of a row that are looked at together."""

STRIP = 64
"""Latents that are looked at together, and rows."""


@triton.jit
def above(value, bound):
    """Whether a value exceeds a bound, which what is no number does."""
    return (value.to(tl.float32) <= bound) == 0


@triton.jit
def members(counts, group, all_of_them, room):
    """How many members of a group are to be gone through, and how many of these a list names: all, or else none."""
    count = tl.load(counts + group)
    return tl.where(count <= room, count, all_of_them), tl.where(count <= room, count, 0)


@triton.jit
def member(lists, group, place, named, room):
    """The members of a group at some places, as a list names them, or one after the other where it does not."""
    listed = tl.load(lists + group * room + place, mask=place < named, other=0)
    return tl.where(place < named, listed, place).to(tl.int64)


@triton.jit
def _list(p, bounds, lists, counts, groups, members, room, group_stride, member_stride, BY_ROW: tl.constexpr,
          GROUPS: tl.constexpr, MEMBERS: tl.constexpr):  # fmt: skip
    """The members of some groups (a row's latents, or a latent's rows) that are above their bound, ascending.

    counts says how many there are, even where there is no room for them.
    """
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)).to(tl.int64)
    found = tl.zeros([GROUPS], tl.int32)
    for start in range(0, members, MEMBERS):
        at_hand = start + tl.arange(0, MEMBERS)
        within = (group < groups)[:, None] & (at_hand < members)[None, :]
        at = group[:, None] * group_stride + at_hand.to(tl.int64)[None, :] * member_stride
        if BY_ROW:
            bound = tl.load(bounds + at_hand, mask=at_hand < members, other=0.0)[None, :]
        else:
            bound = tl.load(bounds + group, mask=group < groups, other=0.0)[:, None]
        take = above(tl.load(p + at, mask=within, other=0.0), bound) & within
        place = found[:, None] + tl.cumsum(take.to(tl.int32), 1) - 1
        here = lists + group[:, None] * room + place
        tl.store(here, tl.broadcast_to(at_hand[None, :], [GROUPS, MEMBERS]), mask=take & (place < room))
        found += tl.sum(take.to(tl.int32), axis=1)
    tl.store(counts + group, found, mask=group < groups)


def listed(p: Tensor, bounds: Tensor, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """int32 [B, room] and [B]: the latents of each row at which p [B, m] exceeds the latent's bound [m], and how many
    they are; or the rows of each latent, [m, room] and [m]. Of more than there is room for the list says nothing.
    """
    rows, m = p.shape
    groups, of_each = (rows, m) if by_row else (m, rows)
    room = min(of_each, max(STRIP, of_each // ROOM))
    lists, counts = bounds.new_empty(groups, room, dtype=torch.int32), bounds.new_empty(groups, dtype=torch.int32)
    together, looked_at = (1, covering(m, 16, MEMBERS)) if by_row else (STRIP, STRIP)
    launch(
        _list, (triton.cdiv(groups, together),), p, bounds, lists, counts, groups, of_each, room,
        m if by_row else 1, 1 if by_row else m, BY_ROW=by_row, GROUPS=together, MEMBERS=looked_at, num_warps=8,
    )  # fmt: skip
    return lists, counts
