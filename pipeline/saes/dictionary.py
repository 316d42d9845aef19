"""A dictionary as a function of rows, whatever trained it: its weights, `encode` and `decode`.

Shapes: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]. The encoder's *parameter* is
`W_enc_rows` [d_sae, d_in] and `W_enc` a view of it: the sparse gradients need a latent's weights side by side, and this
way parameter, gradient and optimiser state are plain contiguous tensors. (A transposed parameter would do, until its
Adam moments come back contiguous from a file: Adam(fused=True) on the CPU reads flat memory, and is wrong in silence.)

Units: a dictionary may live in a space of its own, the data times `scale` (its targets times `target_scale`), which are
one number, or where rows are of several stores a number for each of their columns, [d_in] and [d_out]; its
weights and latents are in that space, `forward` and `decode` answer in the data's own units. Where each row is scaled
by itself no weight can say that, so it stays a part of the function, and latents carry what their rows were
(`Latents.row_stats`) for `decode` to use.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import latents
from .config import FINISHED, Clock
from .contract import LatentCoder
from .encoder import Preactivations
from .inference import Formula, Rule
from .latents import Latents, RowScaling, RowStats
from .losses import in_data_units
from .metadata import Metadata as Metadata
from .widths import norms_by_store


class Weights(NamedTuple):
    """The weights as they act: W_enc stored latent by latent [m, d_in], b_enc [m] and W_dec [m, d_out]."""

    W_enc_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor


class Dictionary(LatentCoder):
    """A sparse dictionary from x [B, d_in] to x itself (autoencoder) or to y [B, d_out] (transcoder)."""

    d_in: int
    d_out: int
    d_sae: int
    is_transcoder: bool
    W_enc_rows: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    scale: Tensor
    target_scale: Tensor
    W_skip: Tensor | None
    """[d_in, d_out] of a skip connection, which adds x @ W_skip to the output, past the latents; None without."""
    metadata = Metadata()

    @property
    def width(self) -> int:
        return self.d_sae

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """Return the rule of which latents are active at inference, and how strongly."""

    @property
    @abstractmethod
    def b_dec_applied_to_input(self) -> bool:
        """Return True if b_dec is subtracted from the input before it is encoded."""

    @property
    @abstractmethod
    def row_scaling(self) -> RowScaling:
        """The scaling of each row by itself before it is encoded."""

    @abstractmethod
    def formula(self) -> Formula:
        """This function in the data's units, written out for a file: tensors of its own, without a graph."""

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        """Choose the active latents and their values."""
        return self.rule(pre)

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], a view of W_enc_rows."""
        return self.W_enc_rows.T

    def encode(self, x: Tensor) -> Latents:
        """x [..., d_in] in the data's units, in any precision -> its latents. ValueError for rows of another width."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}; give a torch tensor, as torch.as_tensor(x)")
        if not x.dim() or x.shape[-1] != self.d_in:
            raise ValueError(f"x has the shape {list(x.shape)}; this dictionary reads [..., {self.d_in}]")
        rows = x.reshape(-1, self.d_in).to(self.W_dec.dtype)
        scaled, row_stats = self._scaled(rows)
        pre = self._preactivations(scaled, self.weights())
        active = self._beside(self._activate(pre, FINISHED), rows, row_stats)
        return active if x.dim() == 2 else replace(active, lead=tuple(x.shape[:-1]))

    def decode(self, active: Latents | Tensor) -> Tensor:
        """Latents, of `encode` or edited, or their values [..., d_sae] -> [..., d_out] in the data's units.

        ValueError for values of another width, and for values alone where the dictionary scales each row by itself or
        has a skip connection: only latents know what their rows were (`Latents.edited` gives them other values).
        """
        if not isinstance(active, Latents):
            if not isinstance(active, Tensor):
                raise TypeError(f"latents are a {type(active).__name__}; give what encode gave, or a torch tensor")
            if not active.dim() or active.shape[-1] != self.d_sae:
                raise ValueError(f"latents have the shape {list(active.shape)}; this dictionary has {self.d_sae}")
            by_row = self.row_scaling != "none" and not self.is_transcoder
            if by_row or self.W_skip is not None:
                what = "scales each row by itself" if by_row else "adds a part of each row itself to its output"
                raise ValueError(
                    f"this dictionary {what}, so values alone do not say where a row was; decode what encode gave, or "
                    "latents.edited(values) of it"
                )
            active = Latents.of_dense(active.to(self.W_dec.dtype))
        y_hat = self._reconstruct(active, self.weights())
        return active.in_lead(in_data_units(y_hat, self.target_scale, active.row_stats))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> its reconstruction (or prediction of y) [..., d_out], in the data's units."""
        return self.decode(self.encode(x))

    def decoder_norms(self) -> Tensor:
        return norms_by_store(self.weights().W_dec / self.target_scale, self.widths_out)

    def active_parameters(self, codes: Latents) -> Tensor:
        """[B]: those of the active latents' rows, in the encoder and in the decoder."""
        return codes.l0().reshape(-1) * float(self.d_in + self.d_out)

    def extra_repr(self) -> str:
        """Describe it in one line: widths, and the numbers of its rule."""
        numbers = [f"{name}={value}" for name, value in self.rule.values().items() if not isinstance(value, Tensor)]
        return ", ".join([f"d_in={self.d_in}", f"d_sae={self.d_sae}", f"d_out={self.d_out}", *numbers])

    def weights(self) -> Weights:
        """The weights as they act, which in training may be made from the parameters anew at every step."""
        return Weights(self.W_enc_rows, self.b_enc, self.W_dec)

    def _scaled(self, x: Tensor) -> tuple[Tensor, RowStats | None]:
        """x in the space the dictionary lives in, and what takes it back where that is the row's own affair."""
        if self.row_scaling == "none":
            return x * self.scale, None
        row_stats = RowStats.of(x) if self.row_scaling == "standard" else RowStats.of_norms(x)
        return row_stats.normalise(x), row_stats

    def _beside(self, active: Latents, x: Tensor, row_stats: RowStats | None) -> Latents:
        """The latents of rows x, with what decoding needs of the rows themselves."""
        bypass = None if self.W_skip is None else (x * self.scale) @ self.W_skip
        # a transcoder's outputs are not in its inputs' row_stats
        return active.beside(None if self.is_transcoder else row_stats, bypass)

    def _preactivations(self, scaled_x: Tensor, weights: Weights) -> Preactivations:
        centre = self.b_dec if self.b_dec_applied_to_input else scaled_x.new_zeros(self.d_in)
        return Preactivations(scaled_x, centre, weights.W_enc_rows, weights.b_enc)

    def _reconstruct(self, active: Latents, weights: Weights) -> Tensor:
        return latents.decode(active, weights.W_dec) + self._past_latents(active)

    def _past_latents(self, active: Latents) -> Tensor:
        """The part of a reconstruction that is not the latents': b_dec, and what a skip connection adds to each row."""
        return self.b_dec if active.bypass is None else self.b_dec + active.bypass


class FixedDictionary(Dictionary):
    """A dictionary given by its formula, to encode and decode with; there is nothing to train. In evaluation mode."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.d_in, self.d_sae, self.d_out = formula.d_in, formula.d_sae, formula.d_out
        self._widths = formula.widths_in, formula.widths_out
        self.is_transcoder, self._rule = formula.transcoder, formula.rule
        self._centred, self._row_scaling = formula.centred, formula.row_scaling
        self.register_buffer("W_enc_rows", formula.W_enc.T.contiguous())
        for name in ("b_enc", "W_dec", "b_dec"):
            self.register_buffer(name, getattr(formula, name))
        for name in ("scale", "target_scale"):
            self.register_buffer(name, torch.ones(()))
        self.register_buffer("W_skip", formula.W_skip)
        for name, value in formula.rule.values().items():
            if isinstance(value, Tensor):
                self.register_buffer(f"rule_{name}", value)
        self.eval()

    @property
    def widths_in(self) -> tuple[int, ...]:
        return self._widths[0] or super().widths_in

    @property
    def widths_out(self) -> tuple[int, ...]:
        return self._widths[1] or super().widths_out

    @property
    def rule(self) -> Rule:
        own = {name.removeprefix("rule_"): buffer for name, buffer in self.named_buffers() if name.startswith("rule_")}
        return replace(self._rule, **own)

    @property
    def b_dec_applied_to_input(self) -> bool:
        return self._centred

    @property
    def row_scaling(self) -> RowScaling:
        return self._row_scaling

    def formula(self) -> Formula:
        return Formula(
            self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.rule, self._centred, self._row_scaling,
            self.is_transcoder, self.W_skip, *self._widths,
        )  # fmt: skip
