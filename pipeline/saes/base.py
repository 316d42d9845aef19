"""What every dictionary is: a Config, parameters of known shape, and one training step's worth of methods.

An architecture is one file in this package: its Config (frozen, tagged by `arch`) and its final class, under @register.
Importing the package imports every file in it, so a new architecture is found by being there. A class fills in
`_activate` (which latents, from the pre-activations) and `_saelens` (how SAELens names it). It may add parameters
(`_build`), loss terms (`_terms`), what follows a step (`_update`) and tensors to export (`_export`, `_import`).
Everything else is implemented here, once, and not overridden.

A training step, for a batch x [B, d_in] (and target y [B, d_out] for a transcoder):

    losses = sae.loss(x, y, Clock(step, steps))   # named terms; losses.total is their sum
    losses.total.backward()
    sae.before_step()                             # unit decoder: drop the gradient along each row
    optimizer.step()
    sae.after_step(losses.latents)                # rows back to norm 1; dead counters, thresholds

`loss` changes no state, so judging held-out rows is the same call. `train()` and `eval()` matter only to architectures
whose choice of latents depends on the batch.

Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]. The encoder's *parameter* is
`W_enc_rows` [d_sae, d_in] and `W_enc` a view of it: the sparse gradients need a latent's weights side by side, and this
way parameter, gradient and optimiser state are plain contiguous tensors. (A transposed parameter would do, until its
Adam moments come back contiguous from a file: Adam(fused=True) on the CPU reads flat memory, and is wrong in silence.)

Units: with input_scale "rms" a dictionary lives where E||x||^2 = d; its weights, latents and losses are in that space,
`forward` and `decode` answer in the data's own units. `fold` leaves the space, and then the latents too are in the
data's units (f / c for a scale c) while W_dec is untouched, so unit rows are unit in the saved file. This is folding c
into W_enc, W_dec and b_dec and then moving the decoder's row norms into the encoder; it is exact because the
activations are positively homogeneous once everything measured in units of a latent (`latent_units`) is scaled along.

Reduction: the squared error is summed over features and averaged over the batch (`sum_d`) unless the Config says
otherwise. It concerns the reconstruction alone; other terms state their own.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import initial, latents, sparse
from .config import FINISHED, Clock, Config
from .encoder import Preactivations
from .latents import Latents
from .losses import Batch, Losses


class SAE(nn.Module, ABC):
    """A sparse dictionary from x [B, d_in] to x itself (autoencoder) or, given d_out, to y [B, d_out] (transcoder).

    Float32 and on the CPU when made; `.to()` moves it. The same config, widths and seed give the same weights.
    """

    config_type: ClassVar[type[Config]]
    latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers measured in units of a latent's activation, which `fold` scales along."""

    b_enc: Tensor
    b_dec: Tensor
    rows_since_fired: Tensor
    scale: Tensor
    target_scale: Tensor

    def __init__(self, config: Config, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_in, self.d_out, self.d_sae = d_in, d_in if d_out is None else d_out, config.d_sae
        self.is_transcoder = d_out is not None
        generator = torch.Generator().manual_seed(seed)
        table = initial.rows(config.init, self.d_sae, self.d_out, generator)
        unit = config.decoder_norm == "unit"
        self.W_dec = nn.Parameter(F.normalize(table, dim=1) if unit else table)
        # a transcoder's input and output spaces are unrelated, even where their widths agree
        tied = self.W_dec.detach().clone()
        self.W_enc_rows = nn.Parameter(
            initial.rows(config.init, self.d_sae, d_in, generator) if self.is_transcoder else tied
        )
        self._bias("b_enc", self.d_sae, learned=config.encoder_bias)
        self._bias("b_dec", self.d_out, learned=config.b_dec_init != "none")
        self.register_buffer("rows_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("target_scale", torch.ones(()))
        self._build(generator)

    def _bias(self, name: str, width: int, *, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))
        else:
            self.register_buffer(name, torch.zeros(width))

    # What an architecture fills in

    @abstractmethod
    def _activate(self, pre: Preactivations) -> Latents:
        """Choose the active latents and their values."""

    @abstractmethod
    def _saelens(self) -> dict[str, Any]:
        """{"architecture": its name among SAELens' inference classes, ...} and the keys it alone needs."""

    def _build(self, generator: torch.Generator) -> None:
        """Register further parameters and buffers."""

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms beside the reconstruction, coefficients included."""
        return {}

    def _update(self, active: Latents) -> None:
        """Update running statistics from a training batch's latents, without a graph."""

    def _export(self) -> dict[str, Tensor]:
        """Tensors to save beside the four common ones; called on a folded dictionary."""
        return {}

    def _import(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `_export` gave, removing it from `tensors`."""

    # Inference

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], a view of the parameter W_enc_rows."""
        return self.W_enc_rows.T

    @property
    def b_dec_applied_to_input(self) -> bool:
        return self.config.pre_encoder_bias and not self.is_transcoder

    def encode(self, x: Tensor) -> Latents:
        """x [B, d_in] in the data's units -> its latents."""
        return self._activate(self._preactivations(x * self.scale))

    def decode(self, active: Latents) -> Tensor:
        """Latents, of `encode` or edited, -> [B, d_out] in the data's units."""
        return self._reconstruct(active) / self.target_scale

    def forward(self, x: Tensor) -> Tensor:
        """x [B, d_in] -> its reconstruction (or prediction of y) [B, d_out], in the data's units."""
        return self.decode(self.encode(x))

    def _preactivations(self, scaled_x: Tensor) -> Preactivations:
        centre = self.b_dec if self.b_dec_applied_to_input else scaled_x.new_zeros(self.d_in)
        return Preactivations(scaled_x, centre, self.W_enc_rows, self.b_enc)

    def _reconstruct(self, active: Latents) -> Tensor:
        return latents.decode(active, self.W_dec) + self.b_dec

    # Training

    @torch.no_grad()
    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        """Set the scale and b_dec from a sample of rows [n, d_in], and of targets [n, d_out] for a transcoder.

        Rows in the tens of thousands do; ValueError if they are all zero or not finite.
        """
        outputs = self._targets(sample, targets)
        if self.config.input_scale == "rms":
            self.scale.copy_(initial.rms_scale(sample))
            self.target_scale.copy_(initial.rms_scale(outputs))
        match self.config.b_dec_init:
            case "mean":
                self.b_dec.copy_((outputs * self.target_scale).mean(0))
            case "geometric_median":
                self.b_dec.copy_(initial.geometric_median(outputs * self.target_scale))

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        """The loss of a batch x [B, d_in], its target being x itself unless this is a transcoder."""
        y = self._targets(x, target) * self.target_scale
        x = x * self.scale if self.is_transcoder else y
        pre = self._preactivations(x)
        active = self._activate(pre)
        y_hat = self._reconstruct(active)
        terms = {"reconstruction": self.squared_error(y_hat, y)}
        terms |= self._terms(Batch(x, y, pre, active, y_hat, clock))
        return Losses(terms, active, y_hat, self.target_scale)

    def _targets(self, x: Tensor, target: Tensor | None) -> Tensor:
        if self.is_transcoder == (target is None):
            raise ValueError("a transcoder needs targets; an autoencoder's target is its input, so it takes none")
        return x if target is None else target

    def squared_error(self, y_hat: Tensor, y: Tensor) -> Tensor:
        """Scalar distance of y_hat to y [B, d_out] in the Config's reduction."""
        total = F.mse_loss(y_hat, y, reduction="sum")
        match self.config.reduction:
            case "sum_d":
                return total / y.shape[0]
            case "mean_d":
                return total / y.numel()
            case "fvu":
                return total / (y - y.mean(0)).square().sum()

    @torch.no_grad()
    def before_step(self) -> None:
        """Between backward and the optimiser (and before clipping): keep unit rows' gradients tangent to the sphere."""
        if self.config.decoder_norm == "unit":
            rows, grad = self.W_dec, self.W_dec.grad
            assert grad is not None, "before_step comes after backward"
            grad.addcmul_(rows, sparse.row_dots(grad, rows)[:, None], value=-1)

    @torch.no_grad()
    def after_step(self, active: Latents) -> None:
        """After the optimiser: restore unit rows, count who fired, update what the architecture tracks."""
        if self.config.decoder_norm == "unit":
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True))
        self.rows_since_fired.add_(active.batch).masked_fill_(active.fired() > 0, 0)
        self._update(active.detach())

    def dead(self) -> Tensor:
        """bool [d_sae]: latents that have not fired for `dead_after` rows of training."""
        return self.rows_since_fired >= self.config.dead_after

    # Leaving training

    @torch.no_grad()
    def fold(self) -> Self:
        """A copy that takes and gives the data's units with scale 1: the same function, latents divided by c."""
        folded = copy.deepcopy(self)
        folded.W_enc_rows.mul_(self.scale / self.target_scale)
        for name in ("b_dec", *self.latent_units):
            getattr(folded, name).div_(self.target_scale)
        folded.scale.fill_(1)
        folded.target_scale.fill_(1)
        return folded

    def export_tensors(self) -> dict[str, Tensor]:
        """The folded weights under SAELens' names and shapes, contiguous: W_enc, b_enc, W_dec, b_dec and extra ones."""
        folded = self.fold()
        common = {"W_enc": folded.W_enc, "b_enc": folded.b_enc, "W_dec": folded.W_dec, "b_dec": folded.b_dec}
        return {name: tensor.detach().contiguous() for name, tensor in (common | folded._export()).items()}

    def saelens_config(self) -> dict[str, Any]:
        """cfg.json for these tensors; `metadata` (model, hook, sae_lens_version) is the caller's to add.

        SAELens has no class for some transcoders; their `architecture` is named all the same, and it refuses the name.
        """
        common = {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.b_dec_applied_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
        }
        return self._saelens() | common | ({"d_out": self.d_out} if self.is_transcoder else {})

    @classmethod
    @torch.no_grad()
    def from_tensors(cls, config: Config, tensors: Mapping[str, Tensor], *, transcoder: bool = False) -> Self:
        """The dictionary that `export_tensors` described: a folded one. ValueError on missing or unknown tensors."""
        rest = dict(tensors)
        missing = {"W_enc", "b_enc", "W_dec", "b_dec"} - rest.keys()
        if missing:
            raise ValueError(f"tensors lack {', '.join(sorted(missing))}; there are {', '.join(sorted(rest))}")
        (d_in, d_sae), (_, d_out) = rest["W_enc"].shape, rest["W_dec"].shape
        if d_sae != config.d_sae:
            raise ValueError(f"d_sae: {config.d_sae} in the config, but W_enc has {d_sae} columns")
        if d_in != d_out and not transcoder:
            raise ValueError(f"W_enc is for inputs of width {d_in}, W_dec gives {d_out}: that is a transcoder's")
        sae = cls(config, d_in, d_out if transcoder else None)
        sae.W_enc_rows.copy_(rest.pop("W_enc").T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(rest.pop(name))
        sae._import(rest)
        if rest:
            raise ValueError(f"tensors a {cls.__name__} does not have: {', '.join(sorted(rest))}")
        return sae


ARCHITECTURES: dict[str, type[SAE]] = {}
"""Every registered class by its Config's tag."""

S = TypeVar("S", bound=type[SAE])


def register(architecture: S) -> S:
    """Class decorator: make the architecture known under the default of its Config's `arch`."""
    tag = architecture.config_type.model_fields["arch"].default
    assert isinstance(tag, str) and tag not in ARCHITECTURES, f"the tag {tag!r} is taken or no text"
    ARCHITECTURES[tag] = architecture
    return architecture
