"""What is alike in everything that reads one store or several side by side, and writes these or others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import initial
from .config import Config
from .contract import Trainable
from .widths import Width, widths


class OverStores(Trainable):
    """Widths of what is read and written, and a bias of what is written, where that is learned."""

    several_stores = True
    config: Config
    b_dec: Tensor
    is_transcoder: bool

    def __init__(self, config: Config, d_in: Width, d_out: Width | None, seed: int) -> None:
        super().__init__()
        config.expect_widths(d_in, d_out)
        self.config, self.seed, self.is_transcoder = config, seed, d_out is not None
        self._widths = widths(d_in), widths(d_in if d_out is None else d_out)
        self.d_in, self.d_out = sum(self.widths_in), sum(self.widths_out)

    @property
    def widths_in(self) -> tuple[int, ...]:
        return self._widths[0]

    @property
    def widths_out(self) -> tuple[int, ...]:
        return self._widths[1]

    def _bias(self, name: str, width: int, *, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        else:
            self.register_buffer(name, torch.zeros(width))

    @torch.no_grad()
    def _initialise_bias(self, y: Tensor) -> None:
        """Set b_dec from a sample of what is written [n, d_out], in the space the loss is taken in."""
        match self.config.b_dec_init:
            case "mean":
                self.b_dec.copy_(y.mean(0))
            case "geometric_median":
                self.b_dec.copy_(initial.geometric_median(y))

    def _targets(self, x: Tensor, target: Tensor | None) -> Tensor:
        if target is None if self.is_transcoder else not (target is None or target is x):
            raise ValueError("a transcoder needs targets; an autoencoder's target is its input, so it takes no other")
        return x if target is None else target
