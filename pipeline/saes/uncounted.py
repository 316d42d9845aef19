"""Latents of which there are as many as turn out active, on a device that nobody waits for.

What a batch's loss takes from them are sums: their mixture of the decoder's rows, and a penalty of each row. Where few
are active, kernels compute these and their gradients from the entries alone (`kernels.uncounted`), in shapes that do
not depend on how many there are; where many are, that would take longer than dense products do. Either is exact at any
number, so which of them is taken is a matter of time alone, and the last look at the device decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kernels, placement
from .encoder import Preactivations
from .latents import Latents, RowStats

FEW = 0.02
"""Share of the latents that are active up to which entries are cheaper than dense products, by bytes and operations."""

MOST_COLUMNS = 8192
"""Columns up to which a row of x, and of what is decoded, is held at once."""


class Asked(NamedTuple):
    """What is asked of latents: of f = gain p + offset where p > theta, else 0. Vectors are [m].

    theta: 0 if None. gain and offset: 1 and 0 if None; either both or none. gates: whether f is cut at 0, and max(p, 0)
    decoded, too, through a decoder that is taken as given, and summed in place of f.
    summed: of each row's latents that are not 0, f times its weight (linear), how many there are (steps), tanh of f
    times its weight (tanh), or (f + smallest)^power - smallest^power (power); weights are 1 if None.
    width: of the kernel through which theta gets a straight-through gradient (0: none), which p gets, too, with the
    other sign, where to_p is True. pulls: weights of a further sum, that of max(p - theta, 0).
    """

    summed: Literal["none", "linear", "steps", "tanh", "power"] = "none"
    theta: Tensor | None = None
    gain: Tensor | None = None
    offset: Tensor | None = None
    gates: bool = False
    weights: Tensor | None = None
    power: float = 1.0
    smallest: float = 0.0
    width: float = 0.0
    to_p: bool = False
    pulls: Tensor | None = None


class Sums(NamedTuple):
    """What was asked for, the rest being None: mixtures [B, d_out] by f and by gates, sums [B] of both kinds, and how
    many f are not 0 in each row, int32 [B], and in the batch, int32 [m].
    """

    mixture: Tensor
    gates: Tensor | None
    sums: Tensor | None
    pulled: Tensor | None
    active: Tensor
    fired: Tensor


class Uncounted(Latents):
    """Latents of which `found` is known. Their values are computed, densely, where somebody asks for them."""

    found: Sums
    table: Tensor
    of_values: Callable[[], Latents] | None

    def __init__(
        self, found: Sums, table: Tensor, of_values: Callable[[], Latents] | None, row_stats: RowStats | None = None,
        bypass: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.__dict__.update(
            found=found, table=table, of_values=of_values, entries=None, d_sae=len(table), row_stats=row_stats,
            bypass=bypass, lead=None,
        )  # fmt: skip

    @classmethod
    def of(cls, pre: Preactivations, table: Tensor, asked: Asked, of_values: Callable[[], Latents]) -> Uncounted:
        """Those of pre-activations, to be decoded by a table [m, d_out]."""
        return cls(sums(pre, table, asked), table, of_values)

    @cached_property
    def plain(self) -> Latents:
        """The same with their values."""
        if self.of_values is None:
            raise RuntimeError("values of latents were asked for after their step; ask before it is observed")
        return self.of_values().beside(self.row_stats, self.bypass)

    def close(self) -> None:
        """From now on weights may have changed, and values that nobody asked for are not to be had."""
        self.__dict__["of_values"] = None

    @property
    def values(self) -> Tensor:
        return self.plain.values

    @property
    def preactivations(self) -> Tensor | None:
        return self.plain.preactivations

    @property
    def sums(self) -> Tensor:
        """[B]: the sums that were asked for."""
        assert self.found.sums is not None
        return self.found.sums

    @property
    def gates(self) -> Tensor:
        """[B, d_out]: the gates' mixture, which was asked for."""
        assert self.found.gates is not None
        return self.found.gates

    @property
    def batch(self) -> int:
        return len(self.found.active)

    def beside(self, row_stats: RowStats | None, bypass: Tensor | None) -> Latents:
        return Uncounted(self.found, self.table, self.of_values, row_stats, bypass)

    def map(self, function: Callable[[Tensor], Tensor]) -> Latents:
        return self.plain.map(function)

    def detach(self) -> Latents:
        return self.plain.detach()

    def led(self, lead: tuple[int, ...]) -> Latents:
        return self.plain.led(lead)

    def l0(self) -> Tensor:
        return self.found.active.long()

    def fired(self) -> Tensor:
        return self.found.fired.long()

    def decoded(self, table: Tensor) -> Tensor:
        return self.found.mixture if table is self.table else self.plain.decoded(table)


def usable(pre: Preactivations, table: Tensor) -> bool:
    """Return True if kernels can sum latents of these pre-activations and mix rows of a table [m, d_out]."""
    there = all(kernels.usable(one) for one in (pre.weight, pre.bias, table, pre.centred))
    narrow = max(pre.weight.shape[1], table.shape[1]) <= MOST_COLUMNS
    return placement.runs_ahead(pre.x) and there and narrow and not pre.x.requires_grad


def sums(pre: Preactivations, table: Tensor, asked: Asked) -> Sums:
    """What is asked of the latents, which mix the rows of a table [m, d_out]; differentiable in all but x."""
    theta = torch.zeros_like(pre.bias) if asked.theta is None else asked.theta
    p = pre.whole()
    again = p.dtype != pre.weight.dtype or placement.rounds(pre.x)
    return Sums(
        *_Summed.apply(
            pre.centre, pre.weight, pre.bias, table, theta, asked.gain, asked.offset, asked.weights, asked.pulls,
            pre.centred, p, asked, again,
        )
    )  # fmt: skip


class _Summed(torch.autograd.Function):
    """`sums`: p and the batch, less the centre, come along with what they are made of, which gets the gradients."""

    @staticmethod
    def forward(
        ctx: Any, centre: Tensor, weight: Tensor, bias: Tensor, table: Tensor, theta: Tensor, gain: Tensor | None,
        offset: Tensor | None, weights: Tensor | None, pulls: Tensor | None, centred: Tensor, p: Tensor, asked: Asked,
        again: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        bounds = theta - asked.width / 2
        held = p, bounds, centred, weight, bias, table, theta, gain, offset, weights, pulls
        ctx.save_for_backward(*held)
        ctx.asked, ctx.again = asked._replace(theta=None, gain=None, offset=None, weights=None, pulls=None), again
        found = _kernels().forward(*_given(held, asked, again))
        ctx.mark_non_differentiable(found.active, found.fired)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of = [None if one is None else one.contiguous() for one in grads[:4]]
        found = _kernels().backward(*_given(ctx.saved_tensors, ctx.asked, ctx.again), *of)
        weight = ctx.saved_tensors[3]
        of_centre = -(found.bias @ weight) if ctx.needs_input_grad[0] else None
        each = (
            of_centre, found.weight, found.bias, found.table, found.theta, found.gain, found.offset, found.weights,
            found.pulls,
        )  # fmt: skip
        wanted = (one if needed else None for one, needed in zip(each, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


def _kernels() -> Any:
    return kernels.family("uncounted")


def _given(held: tuple[Any, ...], asked: Asked, again: bool) -> tuple[Any, ...]:
    """What the kernels of both passes take: tensors, in the order in which they are saved."""
    *given, theta, gain, offset, weights, pulls = held
    return *given, asked._replace(theta=theta, gain=gain, offset=offset, weights=weights, pulls=pulls), again
