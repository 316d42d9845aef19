"""Settings every architecture shares, and the clock that warm-ups read."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from sae.configs.base import Settings

from .widths import Width, widths

DecoderNorm = Literal["unit", "free", "none"]
BiasStart = Literal["none", "zeros", "mean", "geometric_median"]
InputScale = Literal["rms", "unit", "per_token", "none"]
Reduction = Literal["sum_d", "mean_d", "fvu"]
IN_STEPS = "steps, or below 1 a share of the training"
Steps = Annotated[float, IN_STEPS]
"""A length of training: see `steps_of`."""


class TrainableConfig(Settings):
    """Settings of anything that is trained. The widths are the data's, so they are not here."""

    half_products: ClassVar[bool] = False
    """Whether matrix products in bfloat16 were measured to cost nothing, so that a card takes them unasked."""

    arch: str
    reduction: Reduction = Field(
        "sum_d",
        description="squared error of a row: summed over features, averaged over them, or over the batch's variance; "
        "coefficients that are no share of it are weights beside it",
    )

    @property
    @abstractmethod
    def latents(self) -> int:
        """The number of codes to a row."""

    def latents_of(self, stores: int) -> int:
        """The number of codes to a row that is of so many stores."""
        return self.latents

    @property
    def idle(self) -> frozenset[str]:
        """The names of settings that count for nothing, as the others are."""
        return frozenset()

    @property
    def usual_rate(self) -> float:
        """The learning rate where none is given."""
        return 1e-3

    @property
    def usual_betas(self) -> tuple[float, float]:
        """Adam's decay rates where none are given."""
        return 0.9, 0.999

    def expect_widths(self, d_in: Width, d_out: Width | None) -> None:
        """Raise ValueError where these settings are for no rows of such widths; d_out is None of an autoencoder."""

    def expect_length(self, steps: int) -> None:
        """Raise ValueError where a training of so many steps cannot be what these settings ask for."""

    def unfinished(self, steps: int) -> list[str]:
        """The names of lengths (`Steps`) that a training of so many steps ends before."""
        return [name for name in beyond(self, steps) if name not in self.idle]


class Config(TrainableConfig):
    """Settings common to all sparse dictionaries."""

    d_sae: int = Field(8192, ge=1, le=10**12, description="latents of the dictionary")
    init: Literal["tied", "kaiming", "xavier", "orthogonal", "april"] = Field(
        "tied",
        description="starting weights, the encoder's being the decoder's times encoder_scale: random unit directions "
        "(tied), Kaiming- or Xavier-uniform entries, orthogonal rows, or directions of norm 0.1 (april: free decoder "
        "only)",
    )
    encoder_scale: float = Field(
        1.0, gt=0, description="starting encoder rows as a multiple of the decoder's; short rows turn sooner under Adam"
    )
    decoder_norm: DecoderNorm = Field(
        "unit",
        description="decoder rows: brought back to norm 1 after every step (unit), left free while a latent counts by "
        "its value times its row's norm, in what is chosen and in what is penalised (free), or left free (none)",
    )
    b_dec_init: BiasStart = Field(
        "geometric_median", description="start of the decoder bias, from a sample of the targets; none: no such bias"
    )
    pre_encoder_bias: bool = Field(
        True, description="subtract the decoder bias from the input before encoding (a transcoder never does)"
    )
    encoder_bias: bool = Field(True, description="learn a bias per latent, added before the activation function")
    input_scale: InputScale = Field(
        "rms",
        description="train on the inputs times one number, so that their mean squared norm is their width (rms) or 1 "
        "(unit); on each row less its mean and over its standard deviation (per_token); or as they are (none)",
    )
    dead_after: float = Field(
        0.05,
        gt=0,
        description="rows without firing after which a latent counts as dead; below 1, a share of the training's rows",
    )
    ghost_grads: bool = Field(
        False, description="let dead latents explain the residual through exp(p), scaled to the reconstruction's loss"
    )
    skip: bool = Field(
        False,
        description="a transcoder's linear path past its latents, from zero on: its inputs times W_skip are added to "
        "its outputs",
    )

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.init == "april" and self.decoder_norm == "unit":
            raise ValueError("init: april starts rows at norm 0.1, decoder_norm: unit keeps them at 1; set it to free")
        if self.b_dec_init == "none" and self.pre_encoder_bias:
            raise ValueError("pre_encoder_bias: true needs a decoder bias, b_dec_init: none has none; set it false")
        if self.skip and self.input_scale == "per_token":
            raise ValueError(
                "skip: true adds inputs to outputs as they are, input_scale: per_token scales each row by itself; set "
                "it to rms"
            )
        return self

    @property
    def latents(self) -> int:
        return self.d_sae

    @property
    def usual_rate(self) -> float:
        """It falls with the root of the width (Gao et al. 2024)."""
        return min(4e-3, 7e-4 * (2**14 / self.d_sae) ** 0.5)  # below 1,024 latents nothing was measured

    @property
    def usual_betas(self) -> tuple[float, float]:
        """Short memories: a latent that fires rarely is not carried on long after it has."""
        return 0.7, 0.99

    def expect_widths(self, d_in: Width, d_out: Width | None) -> None:
        if self.skip and d_out is None:
            raise ValueError("skip: true would give an autoencoder its own input; name a target, or set skip to false")
        if self.input_scale == "per_token" and max(len(widths(one)) for one in (d_in, d_out or d_in)) > 1:
            raise ValueError("input_scale: per_token is of rows of one store, and these are of several; take rms")


def other_default(name: str, value: object) -> Any:
    """The common field `name` with another default, for an architecture's settings to declare again."""
    return Field(value, description=Config.model_fields[name].description)


class Clock(NamedTuple):
    """Where training stands: `step` of `steps`, counted from 0, each of `batch` rows (of all parts and processes).

    first: the row of the batch that a part of it begins with.
    """

    step: int
    steps: int
    batch: int = 0
    first: int = 0

    @property
    def finished(self) -> bool:
        """True after training."""
        return self.step >= _FOREVER

    def rows(self, length: float) -> int:
        """A length in rows: as it is from 1 on, below it a share of all rows. ValueError where those are not known."""
        if length >= 1:
            return math.ceil(length)
        if not self.batch:
            raise ValueError(f"{length} is a share of the training's rows; give the clock its batch to say how many")
        return max(1, min(math.ceil(length * self.steps * self.batch), _FOREVER))


_FOREVER = 2**62
FINISHED = Clock(_FOREVER, _FOREVER, 1)
"""After training: every warm-up is over, and no share of the training is so long that a latent was dead for it."""


def ramp(length: float, clock: Clock) -> float:
    """A linear warm-up from 0 to 1 over `length` steps, or, for a length below 1, over that share of all steps."""
    steps = steps_of(length, clock)
    return 1.0 if clock.step >= steps else clock.step / steps


def anneal(start: float, end: float, length: float, clock: Clock) -> float:
    """A quarter-cosine from start to end over `length` steps (or a share of them, as in `ramp`), then end."""
    steps = steps_of(length, clock)
    return end if clock.step >= steps else end + (start - end) * math.cos(math.pi * clock.step / (2 * steps))


def beyond(settings: Settings, steps: int) -> list[str]:
    """The names of lengths (`Steps`) that are longer than so many steps."""
    lengths = [name for name, field in type(settings).model_fields.items() if IN_STEPS in field.metadata]
    return [name for name in lengths if steps_of(getattr(settings, name), Clock(0, steps)) > steps]


def steps_of(length: float, clock: Clock) -> float:
    """A length in steps: as it is from 1 on, below it a share of all steps."""
    return length * clock.steps if length < 1 else length
