"""The computation of a trained dictionary, said in terms that every tool shares.

An architecture says its `Rule`: which latents are active at inference, and with what values. With the weights that is
its `Formula`, all that a file of a dictionary says; `pipeline.formats` puts it in each tool's names and back. So no
architecture knows a format, and no format an architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .encoder import Preactivations
from .latents import Latents, RowScaling

RULES: dict[str, type[Rule]] = {}
"""Every rule by its name, one defined in an architecture's file included."""


@dataclass(frozen=True, eq=False)
class Rule(ABC):
    """The rule from pre-activations to latents: a frozen dataclass of tensors [m] and of whole numbers of latents."""

    name: ClassVar[str]

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        assert cls.name not in RULES, f"the name {cls.name!r} is taken"
        RULES[cls.name] = cls

    @abstractmethod
    def __call__(self, pre: Preactivations) -> Latents:
        """The active latents of pre-activations p [B, m]."""

    def scaled(self, by: Tensor) -> Rule:
        """The rule where latents, and their pre-activations, are `by` [m] times as large."""
        return self

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

    def scaled(self, by: Tensor) -> Rule:
        return replace(self, threshold=self.threshold * by)

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

    def scaled(self, by: Tensor) -> Rule:
        return replace(self, b_mag=self.b_mag * by)

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
    W_skip [d_in, d_out]: x @ W_skip is added to y_hat, past the latents. widths_in, widths_out: the widths of stores
    whose rows lie side by side in x and in y; none where they are of one.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    rule: Rule
    centred: bool = True
    row_scaling: RowScaling = "none"
    transcoder: bool = False
    W_skip: Tensor | None = None
    widths_in: tuple[int, ...] = ()
    widths_out: tuple[int, ...] = ()

    @property
    def of_several_stores(self) -> bool:
        return max(len(self.widths_in), len(self.widths_out)) > 1

    def recentred(self, centred: bool) -> Formula:
        """The same function with b_dec subtracted from the input, or not: b_enc takes up the difference."""
        if centred == self.centred:
            return self
        assert self.d_in == self.d_out, "b_dec is of the outputs, and can be taken from inputs that are as wide alone"
        shift = (self.b_dec.double() @ self.W_enc.double()) * (1 if centred else -1)
        return replace(self, b_enc=(self.b_enc.double() + shift).to(self.b_enc.dtype), centred=centred)

    @property
    def has_unit_rows(self) -> bool:
        """Return True if the rows of W_dec have norm 1, as far as float32 can say it."""
        return bool(((torch.linalg.vector_norm(self.W_dec, dim=1) - 1).abs() < 1e-5).all())

    def unit_rows(self) -> Formula:
        """The function with unit rows of W_dec, each latent times the norm that its row had; a topk chooses by that.

        ValueError where a norm is 0.
        """
        norms = torch.linalg.vector_norm(self.W_dec, dim=1)
        if not bool((norms > 0).all()):
            raise ValueError("the norms of the decoder's rows are divided by, and some are 0")
        W_enc, b_enc, W_dec = self.W_enc * norms, self.b_enc * norms, self.W_dec / norms[:, None]
        return replace(self, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, rule=self.rule.scaled(norms))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]
