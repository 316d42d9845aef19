"""What a dictionary is once it is trained: parameters of known shape, a function of rows, and its form in a file.

Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]. The encoder's *parameter* is
`W_enc_rows` [d_sae, d_in] and `W_enc` a view of it: the sparse gradients need a latent's weights side by side, and this
way parameter, gradient and optimiser state are plain contiguous tensors. (A transposed parameter would do, until its
Adam moments come back contiguous from a file: Adam(fused=True) on the CPU reads flat memory, and is wrong in silence.)

Units: with input_scale "rms" ("unit") a dictionary lives where E||x||^2 = d (1); its weights, latents and losses are in
that space, `forward` and `decode` answer in the data's own units. `fold` leaves the space, and then the latents too are
in the data's units (f / c for a scale c) while W_dec is untouched, so unit rows are unit in the saved file. This is
folding c into W_enc, W_dec and b_dec and then moving the decoder's row norms into the encoder; it is exact because the
activations are positively homogeneous once everything measured in units of a latent (`latent_units`) is scaled along.
With "per_token" each row is standardised and its reconstruction put back: no weight can say that, so it stays a part of
the function, and latents carry the rows' means and deviations (`Latents.frame`) for `decode` to use.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import initial, latents
from .config import FINISHED, Clock, Config
from .encoder import Preactivations
from .latents import Frame, Latents
from .losses import in_data_units


class Dictionary(nn.Module, ABC):
    """A sparse dictionary from x [B, d_in] to x itself (autoencoder) or, given d_out, to y [B, d_out] (transcoder).

    Float32 and on the CPU when made; `.to()` moves it. The same config, widths and seed give the same weights.
    """

    config_type: ClassVar[type[Config]]
    latent_units: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers measured in units of a latent's activation, which `fold` scales along."""

    b_enc: Tensor
    b_dec: Tensor
    rows_since_fired: Tensor
    firing_rate: Tensor
    scale: Tensor
    target_scale: Tensor

    def __init__(self, config: Config, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.d_in, self.d_out, self.d_sae = d_in, d_in if d_out is None else d_out, config.d_sae
        self.is_transcoder = d_out is not None
        generator = torch.Generator().manual_seed(seed)
        table = initial.rows(config.init, self.d_sae, self.d_out, generator)
        unit = config.decoder_norm == "unit"
        self.W_dec = nn.Parameter(F.normalize(table, dim=1) if unit else table)
        # a transcoder's input and output spaces are unrelated, even where their widths agree
        tied = self.W_dec.detach()
        encoder = initial.rows(config.init, self.d_sae, d_in, generator) if self.is_transcoder else tied
        self.W_enc_rows = nn.Parameter(encoder * config.encoder_scale)
        self._bias("b_enc", self.d_sae, learned=config.encoder_bias)
        self._bias("b_dec", self.d_out, learned=config.b_dec_init != "none")
        self.register_buffer("rows_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("firing_rate", torch.zeros(self.d_sae))
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
    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        """Choose the active latents and their values."""

    @abstractmethod
    def _saelens(self) -> dict[str, Any]:
        """{"architecture": its name among SAELens' inference classes, ...} and the keys it alone needs."""

    def _build(self, generator: torch.Generator) -> None:
        """Register further parameters and buffers."""

    def _export(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the four common tensors, those to save; called on a folded dictionary."""
        return tensors

    def _import(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take back what `_export` added or renamed: the four common tensors, and any that are unknown."""
        return tensors

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
        scaled, frame = self._scaled(x)
        return self._framed(self._activate(self._preactivations(scaled), FINISHED), frame)

    def decode(self, active: Latents) -> Tensor:
        """Latents, of `encode` or edited, -> [B, d_out] in the data's units."""
        return in_data_units(self._reconstruct(active), self.target_scale, active.frame)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, d_in] -> its reconstruction (or prediction of y) [B, d_out], in the data's units."""
        return self.decode(self.encode(x))

    def _scaled(self, x: Tensor) -> tuple[Tensor, Frame | None]:
        """x in the space the dictionary lives in, and what takes it back where that is the row's own affair."""
        if self.config.input_scale == "per_token":
            frame = Frame.of(x)
            return frame.enter(x), frame
        return x * self.scale, None

    def _framed(self, active: Latents, frame: Frame | None) -> Latents:
        # a transcoder's outputs are not in its inputs' frame
        return active if frame is None or self.is_transcoder else replace(active, frame=frame)

    def _preactivations(self, scaled_x: Tensor) -> Preactivations:
        centre = self.b_dec if self.b_dec_applied_to_input else scaled_x.new_zeros(self.d_in)
        return Preactivations(scaled_x, centre, self.W_enc_rows, self.b_enc)

    def _reconstruct(self, active: Latents) -> Tensor:
        return latents.decode(active, self.W_dec) + self.b_dec

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
        """The folded weights under SAELens' names and shapes, contiguous: for most W_enc, b_enc, W_dec, b_dec."""
        folded = self.fold()
        common = {"W_enc": folded.W_enc, "b_enc": folded.b_enc, "W_dec": folded.W_dec, "b_dec": folded.b_dec}
        return {name: tensor.detach().contiguous() for name, tensor in folded._export(common).items()}

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
            "normalize_activations": "layer_norm" if self.config.input_scale == "per_token" else "none",
            "reshape_activations": "none",
        }
        return self._saelens() | common | ({"d_out": self.d_out} if self.is_transcoder else {})

    @classmethod
    @torch.no_grad()
    def from_tensors(cls, config: Config, tensors: Mapping[str, Tensor], *, transcoder: bool = False) -> Self:
        """The dictionary that `export_tensors` described: a folded one. ValueError on missing or unknown tensors."""
        if missing := {"W_enc", "W_dec"} - tensors.keys():
            raise ValueError(f"tensors lack {', '.join(sorted(missing))}; there are {', '.join(sorted(tensors))}")
        (d_in, d_sae), (_, d_out) = tensors["W_enc"].shape, tensors["W_dec"].shape
        if d_sae != config.d_sae:
            raise ValueError(f"d_sae: {config.d_sae} in the config, but W_enc has {d_sae} columns")
        if d_in != d_out and not transcoder:
            raise ValueError(f"W_enc is for inputs of width {d_in}, W_dec gives {d_out}: that is a transcoder's")
        sae = cls(config, d_in, d_out if transcoder else None)
        try:
            rest = sae._import(dict(tensors))
            sae.W_enc_rows.copy_(rest.pop("W_enc").T)
            for name in ("b_enc", "W_dec", "b_dec"):
                getattr(sae, name).copy_(rest.pop(name))
        except KeyError as error:
            raise ValueError(f"tensors lack {error.args[0]}; there are {', '.join(sorted(tensors))}") from error
        if rest:
            raise ValueError(f"tensors a {cls.__name__} does not have: {', '.join(sorted(rest))}")
        return sae
