"""The encoder's pre-activations (x - centre) @ W.T + b and their gradients: dense, and at chosen entries alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels, placement, sparse
from .sparse import SparsePattern, of_each


class _CentredLinear(torch.autograd.Function):
    """(x - centre) @ W.T + b, dense: x [B, d], centre [d], W [m, d], b [m] -> [B, m].

    Its own function because autograd would pay a whole [B, m] x [m, d] product for the centre's gradient, which is a
    matrix-vector product; and centring before the product, not after, keeps the digits when x has a large mean.
    Under autocast the product is in the reduced precision; those of the gradients are so, too, where they are many
    times as quick, on a device that runs ahead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        centred = x - centre
        ctx.save_for_backward(weight, centred)
        ctx.dtype, ctx.stack = placement.reduced(x) or weight.dtype, len(weight) if weight.dim() > 2 else None
        given = centred, weight, bias
        p = F.linear(*given) if ctx.stack is None else of_each(F.linear, *given)
        return p.to(weight.dtype)  # which under autocast it is not

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, centred = ctx.saved_tensors
        wants_x, wants_centre, wants_weight, wants_bias = ctx.needs_input_grad
        added: Callable[[Tensor], Tensor] = partial(torch.sum, dim=0)
        product = torch.mm
        if ctx.stack is not None:
            added, product = partial(of_each, added), partial(of_each, product)
        per_latent = added(grad) if wants_bias or wants_centre else None
        of_centre = _towards_centre(per_latent, weight, ctx.stack) if wants_centre and per_latent is not None else None
        grad, to, of = grad.to(ctx.dtype), weight.to(ctx.dtype), centred.to(ctx.dtype)
        return (
            product(grad, to).to(weight.dtype) if wants_x else None,
            of_centre,
            product(grad.mT, of).to(weight.dtype) if wants_weight else None,
            per_latent if wants_bias else None,
        )


class _WithGradient(torch.autograd.Function):
    """Values already computed without a graph, given the gradient of (x - centre) @ W.T + b at their entries.

    `centred` is x - centre, computed by the caller; x and centre come along only to receive gradients. The centre's
    is a matrix-vector product, and x's is computed only where x asks, so training pays for neither [B, d_in] result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        x: Tensor,
        centre: Tensor,
        weight: Tensor,
        bias: Tensor,
        centred: Tensor,
        at: SparsePattern,
    ) -> Tensor:
        ctx.save_for_backward(weight, centred)
        ctx.entries, ctx.stack = at, len(centre) if centre.dim() > 1 else None
        return values.clone()  # an input returned as it is would share its identity with the result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, centred = ctx.saved_tensors
        entries, grad = ctx.entries, grad.contiguous()
        _, wants_x, wants_centre, wants_weight, wants_bias, _, _ = ctx.needs_input_grad
        of_weight, per_latent = None, None
        if wants_weight and kernels.usable(centred):
            of_weight, per_latent = sparse.spmm_t_and_sums(entries, grad, centred)
        elif wants_weight:
            of_weight = sparse.spmm_t(entries, grad, centred)
        if per_latent is None and (wants_bias or wants_centre):
            per_latent = sparse.sum_by_latent(entries, grad)
        return (
            None,
            sparse.spmm(entries, grad, weight) if wants_x else None,
            _towards_centre(per_latent, weight, ctx.stack) if wants_centre and per_latent is not None else None,
            of_weight,
            per_latent if wants_bias else None,
            None,
            None,
        )


def _towards_centre(per_latent: Tensor, weight: Tensor, stack: int | None = None) -> Tensor:
    """The gradient of a centre [d] from those of the latents [m]; of a stack's [N, 1, d] from those of [N m]."""
    if stack is None:
        return -(per_latent @ weight)
    each = of_each(torch.mv, weight.view(stack, -1, weight.shape[-1]).mT, per_latent.view(stack, -1))
    return -each.unsqueeze(1)


def with_gradient(
    values: Tensor, x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor, centred: Tensor, at: SparsePattern
) -> Tensor:
    """The same values [n], differentiable in x [B, d], centre [d], weight [m, d] and bias [m]; see _WithGradient.

    Of a stack, in what its pre-activations are made from.
    """
    x, weight, centred = (one.flatten(0, -2) for one in (x, weight, centred))
    return _WithGradient.apply(values, x, centre, weight, bias.flatten(), centred, at)


def centred_linear(x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - centre) @ weight.T + bias -> [B, m]; see _CentredLinear."""
    return _CentredLinear.apply(x, centre, weight, bias)
