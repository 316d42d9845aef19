"""A weight matrix as a sum of rank-one components, and how important each of them is for what the matrix reads.

    W ~ sum_c u_c v_c^T         h_c = v_c . x         g_c = gate_c(h_c), or gate_c(x)

With a mask m [..., C] the product W x becomes sum_c m_c h_c u_c, plus (with a delta component) the mask of what the
components leave of W times that. Several instances of a model are decomposed side by side: then every tensor has their
number I in front, and none knows of the others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu

from sae.pipeline.decompose.gates import ScalarGates

Gate = Literal["scalar", "vector"]
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
        *lead, d_out, d_in = weight.shape
        self.count, self.gate = count, gate
        reads = d_in if gate == "vector" else 1

        def normal(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*lead, *shape, generator=generator) * gain / fan_in**0.5)

        self.V = normal(d_in, count, fan_in=d_in)
        self.U = normal(count, d_out, fan_in=count)
        self.gate_in = normal(count, reads, hidden, fan_in=reads, gain=2**0.5)
        self.gate_in_bias = nn.Parameter(torch.zeros(*lead, count, hidden))
        self.gate_out = normal(count, hidden, fan_in=hidden)
        self.gate_out_bias = nn.Parameter(torch.zeros(*lead, count))

    @property
    def gates(self) -> list[nn.Parameter]:
        """The parameters that say how important components are."""
        return [self.gate_in, self.gate_in_bias, self.gate_out, self.gate_out_bias]

    def sum(self) -> Tensor:
        """sum_c u_c v_c^T, [..., d_out, d_in]."""
        return (self.V @ self.U).mT

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
        h = self.V.mT @ rows.mT  # [..., C, n]
        hidden = self.gate_in.shape[-1]
        gates = (part.reshape(-1, hidden) for part in (self.gate_in, self.gate_in_bias, self.gate_out))
        found = ScalarGates.apply(h.reshape(-1, h.shape[-1]), *gates)
        found = found.view(h.shape) + self.gate_out_bias[..., None]
        return found.mT.reshape(*x.shape[:-1], self.count)

    def product(self, x: Tensor, mask: Mask) -> Tensor:
        """What stands in the place of W x, [..., d_out], for x [..., d_in]."""
        out = (x @ self.V * mask.components) @ self.U
        if mask.delta is not None:
            out = out + mask.delta * (x @ (self.weight - self.sum()).mT)
        return out

    def _beside(self, values: Tensor, x: Tensor) -> Tensor:
        """Something of every component, for every row of x: with instances an axis of rows has to be put in."""
        return values if self.weight.ndim == 2 else values.unsqueeze(1)
