"""Gates that each read one number: how important components are, with no array of rows x components x hidden units.

    g_c = sum_j o_cj gelu(w_cj h_c + b_cj)

Written out, an MLP a component holds its hidden units for every row, several times over, until the backward pass.
Here a block of components is taken at a time, small enough for the processor's cache, and its hidden units are
computed a second time when their gradients are due. With s_cj = gelu'(w_cj h_c + b_cj) these are products of matrices:

    d/dh_c = g'_c sum_j o_cj w_cj s_cj        d/dw_cj = o_cj sum g'_c h_c s_cj
    d/do_cj = sum g'_c gelu(...)              d/db_cj = o_cj sum g'_c s_cj          (sums over rows)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

CACHED, LARGE = 1 << 18, 1 << 26  # hidden units in a block: on a CPU, whose cache holds them, and on a GPU


class ScalarGates(torch.autograd.Function):
    """The sums above, [C, n], for h [C, n] of n rows and w, b, o [C, hidden]."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, b: Tensor, o: Tensor) -> Tensor:
        ctx.save_for_backward(h, w, b, o)
        found = torch.empty_like(h)
        for at in _blocks(h, w.shape[1]):
            torch.bmm(o[at, None], gelu(_inner(h, w, b, at)), out=found[at, None])
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        h, w, b, o = ctx.saved_tensors
        of_h, of_w, of_b, of_o = (torch.empty_like(one) for one in (h, w, b, o))
        weighted = torch.stack([gradient * h, gradient], 2)
        one, slopes = h.new_ones(()), o * w
        for at in _blocks(h, w.shape[1]):
            inner = _inner(h, w, b, at)
            slope = torch.ops.aten.gelu_backward(one.expand_as(inner), inner)
            torch.bmm(slopes[at, None], slope, out=of_h[at, None])
            of_w[at], of_b[at] = (slope @ weighted[at]).unbind(2)
            torch.bmm(gelu(inner), gradient[at, :, None], out=of_o[at, :, None])
        return of_h.mul_(gradient), of_w.mul_(o), of_b.mul_(o), of_o


def _inner(h: Tensor, w: Tensor, b: Tensor, at: slice) -> Tensor:
    """What the hidden units of a block of components are given, [block, hidden, n]."""
    return torch.addcmul(b[at, :, None], w[at, :, None], h[at, None])


def _blocks(h: Tensor, hidden: int) -> Iterator[slice]:
    size = max(1, (CACHED if h.device.type == "cpu" else LARGE) // max(1, hidden * h.shape[1]))
    for first in range(0, len(h), size):
        yield slice(first, first + size)
