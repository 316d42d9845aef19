"""How far a replacement of a layer changes its outputs with its inputs as the layer itself does.

J = dy/dx of the layer and of what stands in its place, at the same rows; the cosine of the two as vectors, and its mean
over rows. It tells a replacement that computes what the layer computes from one that has the right values for other
reasons. Choices among latents are held as they are at each row, as a derivative has them.

Neither matrix is formed: <J, K> is the sum over a basis of (q^T J) . (q^T K). A row's y depends on that row alone, so one
backward pass gives q^T J of all rows. Beyond `PROBES` dimensions each row has that many random directions instead, whose
errors are its own, and average out over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sae.cache.device import landing
from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.metrics.reconstruction import in_float64
from sae.pipeline.saes.dictionary import Dictionary, FixedDictionary

ROWS = 512  # held-out rows it is taken at
PROBES = 128  # directions of the outputs for each row
AT_ONCE = 2**18  # values of rows given at a time; what is in between them and the outputs is several times as much

Function = Callable[[Tensor], Tensor]


@register
class JacobianCosine(Metric):
    """How far a layer's replacement has the derivatives of the layer."""

    name = "jacobian"
    needs = ("rows", "mlp")
    figures = (
        Figure("jacobian_cosine", "cosine of Jacobians", "mean over rows of the cosine between the layer's dy/dx and its replacement's", "high"),
    )  # fmt: skip

    def __init__(self, layer: Function, replacement: Function) -> None:
        self.layer, self.replacement = layer, replacement
        self._cosines: list[Tensor] = []
        self._left = ROWS

    @classmethod
    def of(cls, subject: Subject) -> JacobianCosine:
        assert subject.mlp is not None, "`metrics_of` sees to it"
        sae = subject.sae
        # by its rule alone: training's gradients of thresholds are no derivatives
        return cls(subject.mlp, FixedDictionary(sae.formula()) if isinstance(sae, Dictionary) else sae)

    def update(self, batch: Encoded) -> None:
        x, self._left = batch.x[: self._left], max(0, self._left - len(batch.x))
        for part in x.split(max(1, AT_ONCE // x.shape[1])) if len(x) else ():
            self._cosines.append(cosines(self.layer, self.replacement, part))

    def result(self) -> Mapping[str, Value]:
        found = self._found()
        return {"jacobian_cosine": found.mean().item() if len(found) else None}

    def details(self) -> dict[str, Any]:
        return {"jacobian": {"rows": len(self._found()), "probes": PROBES}}

    def _found(self) -> Tensor:
        """The cosines of rows that have one."""
        every = torch.cat(self._cosines).cpu() if self._cosines else torch.empty(0, dtype=torch.float64)
        return every[~every.isnan()]


def cosines(layer: Function, replacement: Function, x: Tensor) -> Tensor:
    """float64 [n]: of each of the rows x [n, d_in], the cosine of vec dy/dx of two functions of rows.

    0 where the replacement's is zero there, NaN where the layer's own is, or the replacement has steps for outputs.
    """
    with torch.enable_grad():
        at = x.detach().float().requires_grad_()
        sides = [function(at) for function in (layer, replacement)]
    if not all(side.requires_grad for side in sides):
        return in_float64(x.new_full((len(x),), torch.nan))
    sums = in_float64(x.new_zeros(3, len(x)))
    for probe in _directions(*sides[0].shape):
        mine, its = (_pulled_back(side, at, probe) for side in sides)
        sums += torch.stack([torch.linalg.vecdot(*pair) for pair in ((mine, its), (mine, mine), (its, its))])
    dot, own, other = sums
    return torch.where(other > 0, dot / (own * other).sqrt(), torch.where(own > 0, 0.0, torch.nan))


def _pulled_back(y: Tensor, x: Tensor, probe: Tensor) -> Tensor:
    """float64 [n, d_in]: q^T dy/dx of each row."""
    probe = landing.moved(probe, y.device).to(y.dtype)
    (found,) = torch.autograd.grad(y, x, probe, retain_graph=True, materialize_grads=True)
    return in_float64(found)


def _directions(rows: int, width: int) -> Iterator[Tensor]:
    """Directions of the outputs [rows, width], one after the other and the same every time: a basis, or random ones."""
    if width <= PROBES:
        yield from (one.expand(rows, width) for one in torch.eye(width))
    else:
        generator = torch.Generator().manual_seed(0)
        yield from (torch.randn(rows, width, generator=generator) for _ in range(PROBES))
