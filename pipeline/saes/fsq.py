"""FSQ: codes by finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505), plain or in groups.

Each of q channels is bounded and rounded to one of L values, so that q channels are one of prod L codes: a codebook
that is not learned. With several groups a row has one code of each: a sparse dictionary of G prod L directions, of
which G act, each of them 1. Its directions are what a code's values give through the linear decoder.
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from . import latents
from .base import register
from .config import FINISHED, Clock
from .contract import LatentCoder
from .latents import Latents
from .losses import CodedLosses, Losses
from .scaled import Scaled, ScaledConfig, encoder

MARGIN = 1e-3
"""How far the bound of a channel stays from where the next value would begin, as a share."""

MOST_CODES = 2**20
"""Codes of all groups together, of which a table is made to decode them."""


class FSQConfig(ScaledConfig):
    """Levels and groups."""

    arch: Literal["fsq"] = Field("fsq", description="architecture")
    levels: tuple[int, ...] = Field(
        (8, 6, 5),
        description="values of each channel of a code; suggested are 8,6,5 for 240 codes, 8,5,5,5 for 1,000, 7,5,5,5,5 "
        "for 4,375, 8,8,8,6,5 for 15,360",
    )
    groups: int = Field(8, ge=1, description="codes of a row, each with channels of its own; 1 is plain FSQ")

    @model_validator(mode="after")
    def _there_are_levels(self) -> FSQConfig:
        if not self.levels or min(self.levels) < 3:
            raise ValueError(f"levels: {list(self.levels)}; a channel has 3 values or more")
        if self.latents > MOST_CODES:
            raise ValueError(
                f"levels: {list(self.levels)} and groups: {self.groups} are {self.latents:,} codes, at most "
                f"{MOST_CODES:,} are decoded; lower one"
            )
        return self

    @property
    def codebook(self) -> int:
        """The number of codes of a group."""
        return math.prod(self.levels)

    @property
    def latents(self) -> int:
        return self.groups * self.codebook


@final
@register
class FSQ(Scaled, LatentCoder):
    """One of a fixed grid of codes for each of several groups of channels, and a linear decoder.

    b = tanh(z + s) h - o, with h = (L - 1) (1 - 1e-3) / 2, o = 1/2 where L is even, s = atanh(o / h); a channel's value
    is round(b) / floor(L / 2), whose gradient passes the rounding by. There is no loss but the squared error.
    """

    config_type = FSQConfig
    config: FSQConfig
    bound: Tensor
    offset: Tensor
    shift: Tensor
    strides: Tensor
    lowest: Tensor
    levels: Tensor

    def __init__(self, config: FSQConfig, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__(config, d_in, d_out, seed)
        self.d_sae = config.latents
        generator = torch.Generator().manual_seed(seed)
        channels = config.groups * len(config.levels)
        self.encoder = encoder(d_in, config.hidden, channels, generator)
        self.W_dec = nn.Parameter(torch.randn(channels, self.d_out, generator=generator) / channels**0.5)
        levels = torch.tensor(config.levels)
        half = (levels - 1) * (1 - MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        constants = {
            "bound": half, "offset": offset, "shift": (offset / half).atanh(), "lowest": (levels // 2).float(),
            "strides": torch.tensor([math.prod(config.levels[:i]) for i in range(len(config.levels))]),
            "levels": levels,
        }  # fmt: skip
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def width(self) -> int:
        return self.config.latents

    @property
    def codebooks(self) -> tuple[int, ...]:
        return (self.config.codebook,) * self.config.groups

    def encode(self, x: Tensor) -> Latents:
        """Of every group its code: latents of value 1, [B, groups] of [B, groups * codes]."""
        return self._coded(self._rounded(self._bounded(self._scaled(x))))

    def decode(self, codes: Latents) -> Tensor:
        return (latents.decode(codes, self.table()) + self.b_dec) / self.target_scale

    def decoder_norms(self) -> Tensor:
        """[groups * codes, 1]: the norm of what each code gives."""
        return torch.linalg.vector_norm(self.table() / self.target_scale, dim=1, keepdim=True)

    def table(self) -> Tensor:
        """[groups * codes, d_out]: what each code of each group gives, in the space the loss is taken in."""
        numbers = torch.arange(self.config.codebook, device=self.strides.device)[:, None]
        places = numbers // self.strides % self.levels
        values = (places - self.lowest) / self.lowest
        decoder = self.W_dec.view(self.config.groups, len(self.config.levels), self.d_out)
        return (values @ decoder).flatten(0, 1)

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        y = self._target(x, target)
        bounded = self._bounded(self._scaled(x))
        rounded = self._rounded(bounded)
        values = (bounded + (rounded - bounded).detach()) / self.lowest
        y_hat = values.flatten(1) @ self.W_dec + self.b_dec
        terms = {"reconstruction": self.squared_error(y_hat, y)}
        return CodedLosses(terms, clock, y_hat / self.target_scale, self._coded(rounded))

    def _bounded(self, x: Tensor) -> Tensor:
        """[B, groups, channels], each in the range whose whole numbers are its values."""
        z = self.encoder(x).float().view(len(x), self.config.groups, len(self.config.levels))
        return (z + self.shift).tanh() * self.bound - self.offset

    def _rounded(self, bounded: Tensor) -> Tensor:
        return bounded.detach().round()

    def _coded(self, rounded: Tensor) -> Latents:
        numbers = ((rounded + self.lowest).long() * self.strides).sum(2)
        first = torch.arange(self.config.groups, device=numbers.device) * self.config.codebook
        return Latents.of_rows(torch.ones_like(numbers, dtype=rounded.dtype), numbers + first, self.width)
