"""Results of a loss, inputs of its terms, and statistics that are followed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .config import Clock
from .encoder import Preactivations
from .latents import Latents, RowStats


@dataclass(frozen=True, eq=False)
class Losses(ABC):
    """One batch's loss: named scalar terms with their coefficients in."""

    terms: dict[str, Tensor]
    clock: Clock

    @property
    def total(self) -> Tensor:
        """The terms added in their order, and nothing else."""
        return reduce(torch.add, self.terms.values())

    @property
    @abstractmethod
    def rows(self) -> int:
        """The number of rows of the batch."""

    @property
    @abstractmethod
    def x_hat(self) -> Tensor:
        """The prediction [B, d_out] in the data's units."""

    def l0(self) -> Tensor | None:
        """Return how many codes are active in each row, int64 [B]; None where there are none to count."""
        return None


class Counted(Protocol):
    """Codes of a batch, as far as they are counted."""

    def l0(self) -> Tensor:
        """Return how many are active in each row, int64 [B]."""

    def fired(self) -> Tensor:
        """In how many rows each is active, int64 [width]."""


@dataclass(frozen=True, eq=False)
class PlainLosses(Losses):
    """The loss of what has no sparse codes: its terms, and y_hat [B, d_out] in the data's units."""

    y_hat: Tensor

    @property
    def rows(self) -> int:
        return len(self.y_hat)

    @property
    def x_hat(self) -> Tensor:
        return self.y_hat


@dataclass(frozen=True, eq=False)
class CodedLosses(PlainLosses):
    """The loss of what has codes, some of which are not active: beside it, the codes of the batch."""

    codes: Counted

    def l0(self) -> Tensor:
        return self.codes.l0()


@dataclass(frozen=True, eq=False)
class SparseLosses(Losses):
    """The loss of a dictionary, and what it was computed from.

    reconstruction and y, what it should have been: [B, d_out] in the space the loss is taken in; `x_hat` is the former
    in the data's units. Of a stack (`stacks`) both are [N, B, d_out], and terms [N].
    """

    latents: Latents
    reconstruction: Tensor
    target_scale: Tensor
    y: Tensor

    @property
    def rows(self) -> int:
        return self.y.shape[-2]

    @property
    def x_hat(self) -> Tensor:
        return in_data_units(self.reconstruction, self.target_scale, self.latents.row_stats)

    def l0(self) -> Tensor:
        return self.latents.l0()


def spread(y: Tensor) -> Tensor:
    """Scalar: the sum of squares of rows [B, d] around their mean, which is the error of the best constant.

    Of a stack's rows [N, B, d] it is [N].
    """
    return (y - y.mean(-2, keepdim=True)).square().sum((-2, -1))


def share(part: Tensor, whole: Tensor) -> Tensor:
    """A scalar as a share of another; 0 where there is nothing to have a share of."""
    return part / whole.masked_fill(whole == 0, torch.inf)


def in_data_units(reconstruction: Tensor, target_scale: Tensor, row_stats: RowStats | None) -> Tensor:
    """[B, d_out] out of the space the loss is taken in."""
    return reconstruction / target_scale if row_stats is None else row_stats.denormalise(reconstruction)


class LossInputs(NamedTuple):
    """The inputs of a loss term, all in the space the loss is taken in; W_dec [m, d_out] is the one that acts."""

    x: Tensor
    y: Tensor
    pre: Preactivations
    latents: Latents
    y_hat: Tensor
    W_dec: Tensor
    clock: Clock


class Observed(NamedTuple):
    """Statistics of a part of a batch that training follows: how many rows, how often each latent fired (int64
    [d_sae], of a stack [N, d_sae]), and some numbers the architecture follows (float [n]).
    """

    clock: Clock
    rows: int
    fired: Tensor
    numbers: Tensor
