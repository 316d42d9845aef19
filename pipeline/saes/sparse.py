"""Exact sparsity: products with a [batch, d_sae] matrix that is almost all zeros, without ever holding that matrix.

The one dense product a sparse dictionary cannot avoid is the encoder's (`linear`). Everything after it touches only the
active entries: the decoder mixes k rows of W_dec per input, and the gradients of both weight matrices are, for every
latent, a weighted sum of the few batch rows where it was active. All of these are *embedding bags* (weighted sums of
table rows), which torch has tuned kernels for on every device, so each costs a few hundredths of the encoder product
where the dense way costs one or two of it. On a CUDA device Triton kernels (`kernels`) take their place where they are
there.
What it gives up: no double backward, and entries are unique within a row.

Shapes in this package: B rows (batch), d_in and d_out widths, m = d_sae latents, n active entries in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels, placement


class SparsePattern:
    """The active latents of each row: the pattern of a sparse [B, m] matrix, without its values.

    indices: int64 [n], the latent of each entry, row after row. offsets: int64 [B], where each row's entries begin.
    The orderings derived from it are computed at most once: the decoder's and the encoder's backward share one sort.
    """

    def __init__(self, indices: Tensor, offsets: Tensor, d_sae: int) -> None:
        self.indices = indices
        self.offsets = offsets
        self.d_sae = d_sae

    @classmethod
    def per_row(cls, indices: Tensor, d_sae: int) -> SparsePattern:
        """The same number of entries in every row: indices [B, k]."""
        batch, k = indices.shape
        starts = torch.arange(0, batch * k, k, device=indices.device)
        found = cls(indices.reshape(-1), starts, d_sae)
        if placement.runs_ahead(indices):
            found.row_ids = torch.arange(batch * k, device=indices.device) // k
        return found

    @classmethod
    def following(cls, parts: Sequence[SparsePattern]) -> SparsePattern:
        """The rows of several patterns of the same latents, one pattern's after another's."""
        entries = [0, *accumulate(len(part.indices) for part in parts)]
        rows = [0, *accumulate(part.batch for part in parts)]
        starts = [part.offsets + before for part, before in zip(parts, entries, strict=False)]
        found = cls(torch.cat([part.indices for part in parts]), torch.cat(starts), parts[0].d_sae)
        found.row_ids = torch.cat([part.row_ids + before for part, before in zip(parts, rows, strict=False)])
        return found

    def regrouped(self, starts: Tensor) -> SparsePattern:
        """The same entries cut into other rows, which share the ordering by latent: starts int64 [B']."""
        other = SparsePattern(self.indices, starts, self.d_sae)
        other.by_latent = self.by_latent
        return other

    @property
    def batch(self) -> int:
        return self.offsets.shape[0]

    @cached_property
    def row_ids(self) -> Tensor:
        """int64 [n]: the row each entry belongs to."""
        ends = torch.cat([self.offsets[1:], self.offsets.new_full((1,), self.indices.shape[0])])
        numbers = torch.arange(self.batch, device=self.offsets.device)
        return numbers.repeat_interleave(ends - self.offsets, output_size=self.indices.shape[0])

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """(order [n], starts [m]): the entries rearranged latent after latent, rows ascending within each.

        The sort is stable so that sums run in a fixed order and a resumed run repeats them bit for bit.
        """
        ordered, order = torch.sort(self.indices, stable=True)
        if placement.runs_ahead(order):
            return order, torch.searchsorted(ordered, torch.arange(self.d_sae, device=order.device))
        counts = torch.bincount(self.indices, minlength=self.d_sae)
        return order, counts.cumsum(0) - counts


def spmm(entries: SparsePattern, weights: Tensor, table: Tensor) -> Tensor:
    """Sparse [B, m] with the given weights [n], times table [m, d]: [B, d]."""
    if kernels.usable(table):
        return _products().mixed(entries.offsets, entries.indices, weights, table)
    return F.embedding_bag(entries.indices, table, entries.offsets, mode="sum", per_sample_weights=weights)


def spmm_t(entries: SparsePattern, weights: Tensor, batch_rows: Tensor) -> Tensor:
    """Transpose of the sparse [B, m], times batch_rows [B, d]: [m, d] (the shape of a weight gradient)."""
    if kernels.usable(batch_rows):
        return spmm_t_and_sums(entries, weights, batch_rows)[0]
    order, starts = entries.by_latent
    return F.embedding_bag(entries.row_ids[order], batch_rows, starts, mode="sum", per_sample_weights=weights[order])


def sddmm(entries: SparsePattern, batch_rows: Tensor, table: Tensor) -> Tensor:
    """[n]: for each entry, the inner product of its batch row [B, d] and its latent's table row [m, d].

    Taken latent after latent, so that a table row is at hand for all its entries and only the batch, the smaller of
    the two, is read at random: half the time of going row after row.
    """
    if kernels.usable(table):
        return _products().dots(entries.offsets, entries.indices, batch_rows, table)
    order, _ = entries.by_latent
    ordered = _pair_dots(table, entries.indices[order], batch_rows, entries.row_ids[order])
    return torch.empty_like(ordered).index_copy_(0, order, ordered)


def _products() -> ModuleType:
    return kernels.family("products")


def spmm_t_and_sums(entries: SparsePattern, weights: Tensor, batch_rows: Tensor) -> tuple[Tensor, Tensor]:
    """`spmm_t` and, of the same weights, `sum_by_latent`."""
    order, starts = entries.by_latent
    return _products().by_latent(starts, order, entries.row_ids, weights, batch_rows)


def tangent_(grad: Tensor, rows: Tensor) -> None:
    """Take from each row of a gradient [m, d] what lies along the row itself, which is of norm 1."""
    if kernels.usable(rows) and kernels.usable(grad):
        kernels.family("rows").tangent_(grad, rows)
    else:
        grad.addcmul_(rows, row_dots(grad, rows)[:, None], value=-1)


def unit_(rows: Tensor) -> None:
    """Bring each row [m, d] to norm 1."""
    if kernels.usable(rows):
        kernels.family("rows").unit_(rows)
    else:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """[m]: the inner product of each row of a with that of b, both [m, d]; a third of the time of torch's vecdot."""
    each = torch.arange(a.shape[0], device=a.device)
    return _pair_dots(a, each, b, each)


def _pair_dots(a: Tensor, a_rows: Tensor, b: Tensor, b_rows: Tensor) -> Tensor:
    """[n]: a[a_rows[i]] . b[b_rows[i]], without gathering either.

    It is what embedding_bag's own backward computes for its weights; calling it directly saves building a graph
    around it. Tests compare it with the dense product, so a change in torch cannot pass unseen.
    """
    sum_mode, no_offsets = 0, b_rows
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, b_rows, no_offsets, a_rows, sum_mode)


def sum_by_latent(entries: SparsePattern, weights: Tensor) -> Tensor:
    """[m]: the weights [n] _added up per latent."""
    return weights.new_zeros(entries.d_sae).index_add_(0, entries.indices, weights)


def of_each(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """A function of tensors, of each dictionary of a stack by itself: sums and products then round as they do alone."""
    return torch.stack([function(*each) for each in zip(*given, strict=True)])


def _added(rows: Tensor) -> Tensor:
    return rows.sum(0)


class _Decode(torch.autograd.Function):
    """values [n], W_dec [m, d_out] -> [B, d_out], differentiable in both."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor, entries: SparsePattern) -> Tensor:
        ctx.save_for_backward(values, table)
        ctx.entries = entries
        return spmm(entries, values, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, table = ctx.saved_tensors
        entries, grad = ctx.entries, grad.contiguous()
        wants_values, wants_table, _ = ctx.needs_input_grad
        return (
            sddmm(entries, grad, table) if wants_values else None,
            spmm_t(entries, values, grad) if wants_table else None,
            None,
        )


class _Compare(torch.autograd.Function):
    """`decode` plus `rest`, and the sum of its squared errors, whose gradient at the values comes with it.

    Nothing but that sum is differentiated as a rule; where y_hat is, too, the inner products are taken once more.
    rest [r, d] is beside B / r rows each; of a stack of N there are N sums, each over B / N rows.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, table: Tensor, rest: Tensor, aim: Tensor, entries: SparsePattern, stack: int | None
    ) -> tuple[Tensor, Tensor]:
        y_hat, error, squares, dots = _products().compared(entries.offsets, entries.indices, values, table, rest, aim)
        ctx.save_for_backward(values, table, error, dots)
        ctx.entries, ctx.rests = entries, len(rest)
        ctx.set_materialize_grads(False)
        return y_hat, squares.sum() if stack is None else of_each(torch.sum, squares.view(stack, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y_hat: Tensor | None, of_total: Tensor | None) -> tuple[Tensor | None, ...]:
        values, table, error, dots = ctx.saved_tensors
        wants_values, wants_table, wants_rest, wants_aim, *_ = ctx.needs_input_grad
        twice = error.new_zeros(()) if of_total is None else 2 * of_total
        by_row, by_entry = twice, twice
        if twice.dim():  # a stack's, which as a rule are equal
            by_row = twice[:, None].expand(-1, len(error) // len(twice)).reshape(-1, 1)
            by_entry = by_row.view(-1).index_select(0, ctx.entries.row_ids)
        of_aim = -(error * by_row) if wants_aim else None
        if of_y_hat is None:  # the gradient at y_hat is the error times a number, so it is not made
            of_values = dots * by_entry if wants_values else None
            of_table = spmm_t(ctx.entries, values * by_entry, error) if wants_table else None
            by_rest = by_row if ctx.rests == len(error) else twice.view(-1, 1)
            of_rest = _summed(error, ctx.rests) * by_rest if wants_rest else None
        else:
            towards = of_y_hat + error * by_row
            of_values = sddmm(ctx.entries, towards, table) if wants_values else None
            of_table = spmm_t(ctx.entries, values, towards) if wants_table else None
            of_rest = _summed(towards, ctx.rests) if wants_rest else None
        return of_values, of_table, of_rest, of_aim, None, None


def _summed(rows: Tensor, count: int) -> Tensor:
    """[count, d]: the sums of stretches of rows [B, d] that are as long as one another."""
    if count == 1:
        return rows.sum(0, keepdim=True)
    return rows if count == len(rows) else of_each(_added, rows.view(count, -1, rows.shape[1]))


def decode(values: Tensor, entries: SparsePattern, table: Tensor) -> Tensor:
    """Weighted sums of the table's rows: values of any shape with n elements, table [m, d] -> [B, d].

    Of a stack's tables [N, m, d] -> [N, B, d].
    """
    found: Tensor = _Decode.apply(values.reshape(-1), table.flatten(0, -2), entries)
    return found if table.dim() == 2 else found.view(len(table), -1, table.shape[-1])


def comparable(table: Tensor, aim: Tensor) -> bool:
    """Return True if `compare` can take a table [..., m, d] and rows [..., B, d]."""
    usable = kernels.usable(table) and kernels.usable(aim)
    return usable and table.shape[-1] <= _products().MOST_COLUMNS


def compare(values: Tensor, entries: SparsePattern, table: Tensor, rest: Tensor, aim: Tensor) -> tuple[Tensor, Tensor]:
    """y_hat [B, d] = `decode` + rest ([d] or [B, d]), and the sum of (y_hat - aim)^2, in one pass over the rows.

    Of a stack's tables [N, m, d] and rows [N, B, d] there are N sums; rest is [N, 1, d] or [N, B, d].
    """
    stack = len(table) if table.dim() > 2 else None
    rows, rest = aim.flatten(0, -2), rest.reshape(-1, aim.shape[-1])
    y_hat, total = _Compare.apply(values.reshape(-1), table.flatten(0, -2), rest, rows, entries, stack)
    return y_hat.view_as(aim), total
