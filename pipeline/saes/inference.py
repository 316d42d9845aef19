"""What a dictionary computes once it is trained, said in terms that every tool shares.

An architecture says its `Rule`: which latents are active at inference, and with what values. With the weights that is
its `Formula`, all that a file of a dictionary says; `pipeline.formats` puts it in each tool's names and back. So no
architecture knows a format, and no format an architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from .encoder import Preactivations
from .latents import Latents, RowScaling

RULES: dict[str, type[Rule]] = {}
"""Every rule by its name, one defined in an architecture's file included."""


@dataclass(frozen=True, eq=False)
class Rule(ABC):
    """How latents follow from pre-activations: a frozen dataclass of tensors [m] and of whole numbers of latents."""

    name: ClassVar[str]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        assert cls.name not in RULES, f"the name {cls.name!r} is taken"
        RULES[cls.name] = cls

    @abstractmethod
    def __call__(self, pre: Preactivations) -> Latents:
        """The active latents of pre-activations p [B, m]."""

    def values(self) -> dict[str, Any]:
        """Its tensors and numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class ReLURule(Rule):
    """f = ReLU(p)."""

    name = "relu"

    def __call__(self, pre: Preactivations) -> Latents:
        return pre.above_threshold(0.0).map(Tensor.relu)


@dataclass(frozen=True, eq=False)
class TopKRule(Rule):
    """f = ReLU(p) where p is among the k largest of its row."""

    name = "topk"
    k: int

    def __call__(self, pre: Preactivations) -> Latents:
        return pre.topk(self.k).map(Tensor.relu)


@dataclass(frozen=True, eq=False)
class ThresholdRule(Rule):
    """f = ReLU(p) where p > threshold [m]."""

    name = "threshold"
    threshold: Tensor

    def __call__(self, pre: Preactivations) -> Latents:
        chosen = pre.above_threshold(self.threshold)
        bounds = chosen.per_entry(self.threshold)
        return chosen.map(lambda p: p.relu() * (p > bounds))


@dataclass(frozen=True, eq=False)
class GatedRule(Rule):
    """f = ReLU(exp(r_mag) (p - b_enc) + b_mag) where p > 0; r_mag and b_mag [m], b_enc being the gate's bias."""

    name = "gated"
    r_mag: Tensor
    b_mag: Tensor

    def __call__(self, pre: Preactivations) -> Latents:
        gates = pre.above_threshold(0.0)
        pi, gain = gates.values, gates.per_entry(self.r_mag.exp())
        magnitudes = gain * (pi - gates.per_entry(pre.bias)) + gates.per_entry(self.b_mag)
        return replace(gates, values=magnitudes.relu() * (pi > 0), preactivations=pi)


@dataclass(frozen=True, eq=False)
class Formula:
    """A trained dictionary written out, in the data's units: y_hat = out(rule(p) @ W_dec + b_dec), where
    p = (in(x) - b_dec) @ W_enc + b_enc.

    W_enc [d_in, m], b_enc [m], W_dec [m, d_out], b_dec [d_out]. centred: whether b_dec is subtracted from the input.
    row_scaling: how `in` scales each row by itself, which `out` undoes (but for a transcoder: its outputs are others).
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rule: Rule
    centred: bool = True
    row_scaling: RowScaling = "none"
    transcoder: bool = False

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]
