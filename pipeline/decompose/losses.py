"""The four terms of a decomposition's loss, and the masks that they are computed under.

    faithfulness   sum ||W - sum_c u_c v_c^T||^2 over matrices, as a share of sum ||W||^2
    stochastic     D(output with every matrix masked, output of the model itself)
    layerwise      the mean over matrices of the same with that matrix alone masked
    importance     sum_c upper(g_c)^p over matrices, a mean over rows

Masks are m = g + (1 - g) r with r uniform between 0 and 1, drawn anew for every row and component: what is said not
to be important must not matter, however much of it is left. D is the subject's own divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sae.pipeline.decompose.components import Components, Mask, lower_leaky, upper_leaky
from sae.pipeline.language_model.matrices import Product

Divergence = Callable[[Mapping[str, Product]], Tensor]
"""How far the output with these products in the place of the matrices' is from the model's own, a scalar."""

EPSILON = 1e-12  # inside the power: below p = 1 its slope at 0 has no end


class Decomposition(nn.Module):
    """The components of some matrices, by the names of these (in which a state_dict's keys have / for .)."""

    def __init__(self, parts: Mapping[str, Components]) -> None:
        super().__init__()
        self.parts = dict(parts)
        self._modules_by_key = nn.ModuleDict({name.replace(".", "/"): part for name, part in parts.items()})

    def importances(self, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How important components are for what each matrix reads, before a hard sigmoid."""
        return {name: part.importance(read[name]) for name, part in self.parts.items()}

    def products(self, masks: Mapping[str, Mask]) -> dict[str, Product]:
        """The masked products of the matrices that masks are given for."""
        return {name: partial(_masked, self.parts[name], mask) for name, mask in masks.items()}


def _masked(part: Components, mask: Mask, x: Tensor) -> Tensor:
    return part.product(x.float(), mask)


def faithfulness(parts: Iterable[Components]) -> Tensor:
    """Squared error of the sums of components as a share of the weights' squares; with instances, the sum of theirs."""
    parts = list(parts)
    error = torch.stack([(part.weight - part.sum()).square().sum((-2, -1)) for part in parts]).sum(0)
    return (error / torch.stack([part.weight.square().sum((-2, -1)) for part in parts]).sum(0)).sum()


def minimality(
    importances: Iterable[Tensor], p: float, *, instances: bool = False, rows: Tensor | None = None
) -> Tensor:
    """sum_c upper(g_c)^p over matrices, a mean over rows; with instances [I, n, C], the sum of theirs.

    rows: bool, which rows of [..., C] count; None: all.
    """
    every = [(upper_leaky(one) + EPSILON).pow(p).sum(-1) for one in importances]
    total = torch.stack(every).sum(0)
    if rows is not None:
        return total[rows].mean()
    return total.flatten(1).mean(1).sum() if instances else total.mean()


def stochastic(importances: Mapping[str, Tensor], generator: torch.Generator, *, delta: bool) -> dict[str, Mask]:
    """Masks of every matrix, drawn at random between how important a component is and 1."""
    return {name: _drawn(lower_leaky(one), generator, delta=delta) for name, one in importances.items()}


def _drawn(g: Tensor, generator: torch.Generator, *, delta: bool) -> Mask:
    r = torch.rand(g.shape, generator=generator, device=g.device)
    left = torch.rand(*g.shape[:-1], 1, generator=generator, device=g.device) if delta else None
    return Mask(g + (1 - g) * r, left)


def reconstruction(decomposition: Decomposition, masks: Mapping[str, Mask], divergence: Divergence) -> Tensor:
    """The divergence with every matrix masked."""
    return divergence(decomposition.products(masks))


def layerwise(decomposition: Decomposition, masks: Mapping[str, Mask], divergence: Divergence) -> Tensor:
    """The mean over matrices of the divergence with one of them masked."""
    return torch.stack([divergence(decomposition.products({name: mask})) for name, mask in masks.items()]).mean()
