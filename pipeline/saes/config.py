"""Settings every architecture shares, and the clock that warm-ups read."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Settings common to all architectures. The widths are the data's, so they are not here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: str
    d_sae: int = Field(8192, ge=1, description="number of latents in the dictionary")
    init: Literal["tied", "kaiming", "xavier", "orthogonal", "april"] = Field(
        "tied",
        description="starting weights, the encoder being the decoder's transpose: random unit directions (tied), "
        "Kaiming- or Xavier-uniform entries, orthogonal rows, or directions of norm 0.1 (april: free decoder only)",
    )
    decoder_norm: Literal["unit", "free"] = Field(
        "unit", description="decoder rows: brought back to norm 1 after every step, or left free"
    )
    b_dec_init: Literal["none", "zeros", "mean", "geometric_median"] = Field(
        "geometric_median", description="start of the decoder bias, from a sample of the targets; none: no such bias"
    )
    pre_encoder_bias: bool = Field(
        True, description="subtract the decoder bias from the input before encoding (a transcoder never does)"
    )
    encoder_bias: bool = Field(True, description="learn a bias per latent, added before the activation function")
    input_scale: Literal["rms", "none"] = Field(
        "rms", description="rms: train on the inputs times one number, so that their mean squared norm is their width"
    )
    reduction: Literal["sum_d", "mean_d", "fvu"] = Field(
        "sum_d",
        description="squared error of a row: summed over features, averaged over them, or over the batch's variance",
    )
    dead_after: int = Field(1_000_000, ge=1, description="rows without firing after which a latent counts as dead")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.init == "april" and self.decoder_norm == "unit":
            raise ValueError("init: april starts rows at norm 0.1, decoder_norm: unit keeps them at 1; set it to free")
        if self.b_dec_init == "none" and self.pre_encoder_bias:
            raise ValueError("pre_encoder_bias: true needs a decoder bias, b_dec_init: none has none; set it false")
        return self


class Clock(NamedTuple):
    """Where training stands: `step` of `steps`, counted from 0."""

    step: int
    steps: int


FINISHED = Clock(2**62, 2**62)
"""After training: every warm-up is over."""


def ramp(length: float, clock: Clock) -> float:
    """A linear warm-up from 0 to 1 over `length` steps, or, for a length below 1, over that share of all steps."""
    steps = length * clock.steps if length < 1 else length
    return 1.0 if clock.step >= steps else clock.step / steps
