"""A weight matrix as a sum of rank-one components, and how important each of them is for what the matrix reads.

    W ~ sum_c u_c v_c^T         h_c = v_c . x         g_c = gate_c(h_c), or gate_c(x)

With a mask m [..., C] the product W x becomes sum_c m_c h_c u_c, plus (with a delta component) the mask of what the
components leave of W times that. Where a model has a matrix and its transpose (tied weights), the components of one are
those of the other turned round, v_c u_c^T, under gates of their own. Several instances of a model are decomposed side
by side: then every tensor has their number I in front, and none knows of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu

from sae.pipeline.decompose.gates import ScalarGates

Gate = Literal["scalar", "vector"]
FACTORS = ("V", "U")  # names of what a component reads by and writes, in a state_dict
LEAK = 0.01  # slope of the hard sigmoids where they would have none


def lower_leaky(x: Tensor) -> Tensor:
    """x between 0 and 1; a hundredth of it below 0, so that what is off can come back; 1 above."""
    return leaky_relu(x, LEAK).clamp(max=1)


def upper_leaky(x: Tensor) -> Tensor:
    """0 below 0; x between 0 and 1; above 1 and a hundredth of the rest, so that what is on feels its price."""
    return torch.add(x.clamp(0, 1), torch.relu(x - 1), alpha=LEAK)


class Mask(NamedTuple):
    """What masks a product. components: [..., C]. delta: [..., 1], of what the components leave; None: left out."""

    components: Tensor
    delta: Tensor | None = None


class Components(nn.Module):
    """The components of one matrix, of one model or of several side by side."""

    weight: Tensor

    def __init__(self, weight: Tensor, count: int, gate: Gate, hidden: int, generator: torch.Generator) -> None:
        """weight: [d_out, d_in], or [I, d_out, d_in] of I instances. hidden: width of a gate's hidden layer."""
        super().__init__()
        self.register_buffer("weight", weight.detach().float().clone())
        *lead, _, d_in = weight.shape
        self.count, self.gate = count, gate
        self._make_factors(generator)
        reads = d_in if gate == "vector" else 1

        def normal(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*lead, *shape, generator=generator) * gain / fan_in**0.5)

        self.gate_in = normal(count, reads, hidden, fan_in=reads, gain=2**0.5)
        self.gate_in_bias = nn.Parameter(torch.zeros(*lead, count, hidden))
        self.gate_out = normal(count, hidden, fan_in=hidden)
        self.gate_out_bias = nn.Parameter(torch.zeros(*lead, count))

    def _make_factors(self, generator: torch.Generator) -> None:
        *lead, d_out, d_in = self.weight.shape
        self.V = nn.Parameter(torch.randn(*lead, d_in, self.count, generator=generator) / d_in**0.5)
        self.U = nn.Parameter(torch.randn(*lead, self.count, d_out, generator=generator) / self.count**0.5)

    def factors(self) -> tuple[Tensor, Tensor]:
        """What components read by, [..., d_in, C], and what they write, [..., C, d_out]."""
        return self.V, self.U

    @property
    def gates(self) -> list[nn.Parameter]:
        """The parameters that say how important components are."""
        return [self.gate_in, self.gate_in_bias, self.gate_out, self.gate_out_bias]

    def sum(self) -> Tensor:
        """sum_c u_c v_c^T, [..., d_out, d_in]."""
        V, U = self.factors()
        return (V @ U).mT

    def importance(self, x: Tensor) -> Tensor:
        """How important each component is for what is read [..., d_in], before a hard sigmoid: [..., C]."""
        if self.gate == "scalar":
            return self._scalar(x)
        flat = self.gate_in.transpose(-3, -2).flatten(-2)  # [..., d_in, C * hidden]
        inner = (x @ flat).unflatten(-1, self.gate_in_bias.shape[-2:])
        inner = gelu(inner + self._beside(self.gate_in_bias, x))
        return (inner * self._beside(self.gate_out, x)).sum(-1) + self._beside(self.gate_out_bias, x)

    def _scalar(self, x: Tensor) -> Tensor:
        rows = x if self.weight.ndim == 3 else x.reshape(-1, x.shape[-1])
        h = self.factors()[0].mT @ rows.mT  # [..., C, n]
        hidden = self.gate_in.shape[-1]
        gates = (part.reshape(-1, hidden) for part in (self.gate_in, self.gate_in_bias, self.gate_out))
        found = ScalarGates.apply(h.reshape(-1, h.shape[-1]), *gates)
        found = found.view(h.shape) + self.gate_out_bias[..., None]
        return found.mT.reshape(*x.shape[:-1], self.count)

    def product(self, x: Tensor, mask: Mask) -> Tensor:
        """What stands in the place of W x, [..., d_out], for x [..., d_in]."""
        V, U = self.factors()
        out = (x @ V * mask.components) @ U
        if mask.delta is not None:
            out = out + mask.delta * (x @ (self.weight - self.sum()).mT)
        return out

    def _beside(self, values: Tensor, x: Tensor) -> Tensor:
        """Something of every component, for every row of x: with instances an axis of rows has to be put in."""
        return values if self.weight.ndim == 2 else values.unsqueeze(1)


class Transposed(Components):
    """The components of a matrix that is the transpose of another: those of the other turned round, with own gates."""

    def __init__(
        self, weight: Tensor, of: Components, count: int, gate: Gate, hidden: int, generator: torch.Generator
    ) -> None:
        self._of = (of,)  # in a tuple, so that its parameters are its own alone
        super().__init__(weight, count, gate, hidden, generator)

    def _make_factors(self, generator: torch.Generator) -> None: ...

    def factors(self) -> tuple[Tensor, Tensor]:
        V, U = self._of[0].factors()
        return U.mT, V.mT


def components_of(
    weights: Mapping[str, Tensor], transposes: Mapping[str, str], count: int, gate: Gate, hidden: int,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Components]:  # fmt: skip
    """Untrained components of every matrix. transposes: which is the transpose of which other, by their names."""
    parts: dict[str, Components] = {}
    for name, weight in weights.items():
        if name in transposes:
            parts[name] = Transposed(weight, parts[transposes[name]], count, gate, hidden, generator(name))
        else:
            parts[name] = Components(weight, count, gate, hidden, generator(name))
    return parts
