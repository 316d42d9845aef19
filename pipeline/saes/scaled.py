"""The part that codes of other kinds than latents share: rows in a scale, a bias of the outputs, an encoder."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from . import initial
from .config import TrainableConfig
from .contract import Coder, Trainable


class ScaledConfig(TrainableConfig):
    """Settings of an encoder."""

    hidden: int = Field(0, ge=0, description="width of the encoder's hidden layer, which has GELUs; 0: it is linear")


class Scaled(Coder, Trainable):
    """Codes of rows less their mean and times one number, and reconstructions times another with a bias.

    Float32 and on the CPU when made. Inputs are in the data's units everywhere but in `_scaled` and what follows it.
    """

    centre: Tensor
    scale: Tensor
    target_scale: Tensor

    def __init__(self, config: TrainableConfig, d_in: int, d_out: int | None, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.d_in, self.d_out, self.is_transcoder = d_in, d_in if d_out is None else d_out, d_out is not None
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("centre", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("target_scale", torch.ones(()))

    @torch.no_grad()
    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        outputs = sample if targets is None else targets
        self.target_scale.copy_(initial.rms_scale(outputs - outputs.mean(0)))
        self.b_dec.copy_((outputs * self.target_scale).mean(0))
        self.centre.copy_(sample.mean(0))
        self.scale.copy_(initial.rms_scale(sample - sample.mean(0)))

    def _scaled(self, x: Tensor) -> Tensor:
        return (x.to(self.b_dec.dtype) - self.centre) * self.scale

    def _target(self, x: Tensor, target: Tensor | None) -> Tensor:
        """What a batch is to become, in the space the loss is taken in. ValueError for a batch without rows."""
        self.expect_rows(x)
        return (x if target is None else target) * self.target_scale


def encoder(d_in: int, hidden: int, width: int, generator: torch.Generator) -> nn.Sequential:
    """Layers from rows [B, d_in] of mean square 1 a value to about as large values [B, width]."""
    if not hidden:
        return nn.Sequential(linear(d_in, width, generator))
    return nn.Sequential(linear(d_in, hidden, generator), nn.GELU(), linear(hidden, width, generator, gain=1.5))


def linear(d_in: int, d_out: int, generator: torch.Generator, gain: float = 1.0) -> nn.Linear:
    """A layer whose weights keep the size of what they read, times a gain; no bias at the start."""
    layer = nn.utils.skip_init(nn.Linear, d_in, d_out)
    with torch.no_grad():
        layer.weight.normal_(0, gain * d_in**-0.5, generator=generator)
        layer.bias.zero_()
    return layer
