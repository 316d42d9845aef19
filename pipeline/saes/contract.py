"""The contracts of what is trained and judged: four, of which each consumer asks for the least it needs.

    Predictor      x -> y_hat: what reconstruction and splicing are judged of
    Coder          x -> codes -> y_hat: what is judged of codes, such as how many are active
    Dictionary     a coder with a direction for every latent (`dictionary`)
    Trainable      a predictor with a loss, and what goes with a step: all that training asks for

An SAE is a dictionary and trainable. What a file of another tool holds is a dictionary alone, and a decomposition that
has no codes is trainable alone. Shapes: x [B, d_in], y and y_hat [B, d_out], in the data's units. Where rows are of
several stores they lie side by side: d_in is the sum of widths, and a `Width` says each.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import sparse
from .config import FINISHED, Clock, TrainableConfig
from .latents import Latents
from .losses import Losses, Observed, share, spread
from .metadata import Metadata

NOISE_ROWS = 64
"""Rows whose noise is drawn together."""


class ParameterGroup(NamedTuple):
    """Parameters that learn at one rate: the encoder's or the decoder's of a step, times a number.

    kept: what holds of them before and after each step: nothing, that their rows are of norm 1, or that no number is
    below 0. reach: how far each number must be able to move in a training, however short it is and low its rate, in
    steps of at most `stride`.
    """

    parameters: list[nn.Parameter]
    side: Literal["encoder", "decoder"] = "encoder"
    times: float = 1.0
    kept: Literal["free", "unit", "not negative"] = "free"
    reach: float = 0.0
    stride: float = math.inf

    def multiple(self, rate: float, steps: int) -> float:
        """What a training's rate is multiplied by for them: Adam moves a number by about its rate in a step."""
        return max(self.times, min(self.reach / steps, self.stride) / rate)


class Predictor(nn.Module, ABC):
    """A function of rows, x [B, d_in] -> y_hat [B, d_out]."""

    d_in: int
    d_out: int

    @property
    def widths_in(self) -> tuple[int, ...]:
        """The widths of the stores whose rows lie side by side in x."""
        return (self.d_in,)

    @property
    def widths_out(self) -> tuple[int, ...]:
        """The widths of the stores whose rows lie side by side in y."""
        return (self.d_out,)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The prediction of y, or of x itself where that is what was to be reconstructed."""


class Codes(Protocol):
    """The codes of B rows, in whatever form a coder has."""

    @property
    def batch(self) -> int:
        """The number of rows."""

    def dense(self) -> Tensor:
        """The codes [B, width] with their zeros."""

    def l0(self) -> Tensor:
        """Return how many codes are not zero in each row, int64 [B]."""

    def fired(self) -> Tensor:
        """In how many rows each is not zero, int64 [width]."""

    def edited(self, values: Tensor) -> Codes:
        """Other values [B, width] of the same rows, for `decode` to put where these rows were."""


class Coder(Predictor):
    """A predictor by way of codes."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of codes to a row."""

    @abstractmethod
    def encode(self, x: Tensor) -> Codes:
        """The codes of rows."""

    @abstractmethod
    def decode(self, codes: Any) -> Tensor:
        """The prediction [B, d_out] from codes in the form that `encode` gives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @property
    def codebooks(self) -> tuple[int, ...]:
        """Sizes of the codebooks that a row has one code of each of, if that is what its codes are."""
        return ()

    def active_parameters(self, codes: Any) -> Tensor:
        """[B]: how many parameters the codes of each row bring into play: all of them, where none is silent."""
        return torch.full((codes.batch,), float(sum(parameter.numel() for parameter in self.parameters())))

    def unit_means(self, x: Tensor) -> Tensor | None:
        """[B, width]: means of Gaussian codes of rows, in their priors' units; None where codes have no such prior."""
        return None


class LatentCoder(Coder):
    """A coder whose codes are latents [B, d_sae], most of them zero: what can be looked up one by one."""

    d_sae: int
    metadata = Metadata()

    @abstractmethod
    def encode(self, x: Tensor) -> Latents:
        """The latents of rows."""

    @abstractmethod
    def decoder_norms(self) -> Tensor:
        """[d_sae, stores]: the norm of each latent's decoder at each store that is written, in the data's units."""


class LayerByLayer(Predictor):
    """A predictor from a store of every layer to one of every layer that reads nothing later than what it writes.

    y_hat is the constant and the sum over layers of what each writes: so it can be computed as a model goes.
    """

    @abstractmethod
    def constant(self, rows: int) -> Tensor:
        """[rows, d_out]: the part of y_hat that no input decides."""

    @abstractmethod
    def written_by(self, layer: int, x: Tensor) -> tuple[int, Tensor]:
        """From which column of y_hat on a layer writes, and what it adds there, given its store's rows [B, width]."""


class Trainable(Predictor):
    """Anything that can be trained. A class under @register, in a file of this folder, is an architecture.

    Everything but `initialise`, `loss` and `forward` has a default, which is to do nothing. A loss is a function of its
    arguments and of what `track` keeps, and draws at random from `generator` alone, so that training can be resumed.
    """

    config_type: ClassVar[type[TrainableConfig]]
    several_stores: ClassVar[bool] = False
    """Whether rows may be of several stores, side by side; it is made with their widths then."""

    config: TrainableConfig
    seed: int

    @abstractmethod
    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        """Set what depends on the data from a sample of rows [n, d_in] and of targets [n, d_out] (None: the rows).

        ValueError for rows that allow no training.
        """

    @abstractmethod
    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        """The loss of a batch: named scalars that add up to it, and the prediction."""

    def expect_rows(self, x: Tensor) -> None:
        """Raise ValueError for a batch without rows, over which there is no mean."""
        if not len(x):
            raise ValueError("a batch without rows has no loss")

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every parameter once, with what decides its learning rate.

        Checkpoints number the optimiser's state in this order.
        """
        return [ParameterGroup([*self.parameters()])]

    @torch.no_grad()
    def before_step(self) -> None:
        """Between the gradients and the optimiser (and clipping): gradients of unit rows made tangent to the sphere."""
        for parameter in self._kept("unit"):
            assert parameter.grad is not None, "before_step comes after backward"
            sparse.tangent_(parameter.grad, parameter)

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimiser: parameters back to where their groups keep them."""
        for parameter in self._kept("unit"):
            sparse.unit_(parameter)
        for parameter in self._kept("not negative"):
            parameter.clamp_(min=0)

    def _kept(self, how: str) -> list[nn.Parameter]:
        return [one for group in self.parameter_groups() if group.kept == how for one in group.parameters]

    @property
    def kept_by_groups(self) -> bool:
        """Whether `before_step` and `after_step` do what the groups say and nothing else, as where they are these."""
        own = type(self)
        return (own.before_step, own.after_step) == (Trainable.before_step, Trainable.after_step)

    def observe(self, losses: Losses) -> Observed:
        """Return the statistics of a part of a training batch that `track` needs."""
        return Observed(losses.clock, losses.rows, torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    def track(self, *parts: Observed) -> None:
        """After a training batch, of which these are all parts."""

    def dead(self, clock: Clock) -> Tensor | None:
        """bool [width]: codes that have not been used for long; None where nobody counts."""
        return None

    def look_ahead(self, clock: Clock) -> None:
        """After the step of a clock, when waiting for the device does no harm: learn what later steps may know."""

    def squared_error(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Scalar distance of y_hat to y [B, d_out] in the settings' reduction; `fvu` of rows that do not vary is 0."""
        return self.reduced(F.mse_loss(y_hat, y, reduction="sum"), y)

    def reduced(self, total: Tensor, y: Tensor) -> Tensor:
        """A sum of squares over a batch whose targets are y [..., B, d_out], in the settings' reduction."""
        match self.config.reduction:
            case "sum_d":
                return total / y.shape[-2]
            case "mean_d":
                return total / y.shape[-2:].numel()
            case "fvu":
                return share(total, spread(y))

    def noise(self, rows: int, width: int, clock: Clock, like: Tensor) -> Tensor:
        """Standard normal numbers [rows, width], a function of the seed, the step, and the rows' numbers in the batch.

        So it does not matter into which parts a batch is split.
        """
        first, stop = clock.first // NOISE_ROWS, -(-(clock.first + rows) // NOISE_ROWS)
        drawn = [
            torch.randn(
                (NOISE_ROWS, width),
                generator=self.generator(f"noise {block}", clock.step, like.device),
                device=like.device,
            )
            for block in range(first, stop)
        ]
        begin = clock.first - first * NOISE_ROWS
        return torch.cat(drawn)[begin : begin + rows].to(like.dtype)

    def generator(self, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
        """The random numbers of one purpose at one step: on a kind of device, a function of these and the seed."""
        return generator_of(self.seed, purpose, step, device)


def generator_of(seed: int, purpose: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one purpose at one step: a function of these, the seed and the kind of device alone."""
    name = hashlib.blake2b(f"{seed} {purpose} {step}".encode(), digest_size=4)
    return torch.Generator(device).manual_seed(int.from_bytes(name.digest()))
