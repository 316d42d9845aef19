"""Cross-layer transcoder: latents of layer l read layer l and write to all layers from l on (Ameisen et al. 2025).

For stores x_1, ..., x_L that are read and y_1, ..., y_L that are written, layer by layer,

    f_l = sparse(x_l W_enc_l + b_enc_l)        y_hat_j = b_dec_j + sum over l <= j of f_l W_dec_l,j

Layer l is a transcoder from x_l to the stores from y_l on, side by side: how it chooses, its AuxK and its penalties are
those of TopK, BatchTopK or JumpReLU, and here the layers are added up. So all the decoders of a latent are one row,
whose norm is what a penalty weighs the latent by, and the triangle takes no zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from . import latents
from .base import SAE, register
from .batch_threshold import BatchThresholdConfig
from .batchtopk import BatchTopK, BatchTopKConfig
from .config import FINISHED, Clock, Config
from .contract import LatentCoder, LayerByLayer, ParameterGroup
from .inference import Formula
from .jumprelu import JumpReLU, JumpReLUConfig, JumpReLUSettings
from .latents import Latents
from .losses import Losses, Observed, SparseLosses
from .over_stores import OverStores
from .topk import TopK, TopKConfig
from .ways import WaysConfig
from .widths import Width, widths

KINDS: dict[str, type[SAE]] = {"topk": TopK, "batchtopk": BatchTopK, "jumprelu": JumpReLU}


class CLTConfig(WaysConfig, BatchThresholdConfig, JumpReLUSettings):
    """A cross-layer transcoder; d_sae, k and target_l0 are of each layer."""

    ways: ClassVar[dict[str, type[Config]]] = {
        "topk": TopKConfig, "batchtopk": BatchTopKConfig, "jumprelu": JumpReLUConfig,
    }  # fmt: skip

    arch: Literal["clt"] = Field("clt", description="architecture")
    sparsity: Literal["topk", "batchtopk", "jumprelu"] = Field(
        "topk", description="how each layer's latents are chosen; unset: as the other settings mean"
    )
    encoder_scale: float = Field(0.3, gt=0, description=Config.model_fields["encoder_scale"].description)

    @property
    def steered(self) -> bool:
        return super().steered and self.sparsity == "jumprelu"

    def latents_of(self, stores: int) -> int:
        return self.d_sae * stores

    def expect_widths(self, d_in: Width, d_out: Width | None) -> None:
        super().expect_widths(d_in, d_out)
        if self.skip:
            raise ValueError("skip: true is of transcoders of one layer; a clt has none, set it to false")
        if d_out is None or len(widths(d_in)) != len(widths(d_out)):
            written = "none" if d_out is None else len(widths(d_out))
            raise ValueError(
                f"arch: clt reads a store of every layer that it writes, and these are {len(widths(d_in))} read and "
                f"{written} written; name them in pairs, as inputs 0.mlp_in, 1.mlp_in of targets 0.mlp_out, 1.mlp_out"
            )


@dataclass(frozen=True, eq=False)
class LayerLosses(Losses):
    """The loss of all layers together: each layer's part of it, and y_hat [B, d_out] in the data's units."""

    layers: tuple[SparseLosses, ...]
    y_hat: Tensor

    @property
    def rows(self) -> int:
        return len(self.y_hat)

    @property
    def x_hat(self) -> Tensor:
        return self.y_hat

    def l0(self) -> Tensor:
        return torch.stack([layer.l0() for layer in self.layers]).sum(0)


@final
@register
class CLT(LayerByLayer, LatentCoder, OverStores):
    """Latents of every layer that write to this layer and all later ones; chosen layer by layer."""

    config_type = CLTConfig
    config: CLTConfig

    def __init__(self, config: CLTConfig, d_in: Width, d_out: Width | None = None, *, seed: int = 0) -> None:
        OverStores.__init__(self, config, d_in, d_out, seed)
        kind = KINDS[config.sparsity]
        settings = config.of_the_way(b_dec_init="none", pre_encoder_bias=False)
        self.layers = nn.ModuleList(
            kind(settings, width, self.widths_out[layer:], seed=self.generator("layer", layer).initial_seed())
            for layer, width in enumerate(self.widths_in)
        )
        self.d_sae = config.latents_of(len(self.layers))
        self._bias("b_dec", self.d_out, learned=config.b_dec_init != "none")

    # What it is

    @property
    def width(self) -> int:
        return self.d_sae

    @property
    def saes(self) -> list[SAE]:
        """The transcoder of each layer, from its store to those from its own on. The bias is no part of any."""
        return [layer for layer in self.layers if isinstance(layer, SAE)]

    def encode(self, x: Tensor) -> Latents:
        """x [..., d_in] in the data's units -> the latents of all layers, the first's first."""
        if not x.dim() or x.shape[-1] != self.d_in:
            raise ValueError(f"x has the shape {list(x.shape)}; this transcoder reads [..., {self.d_in}]")
        parts = x.reshape(-1, self.d_in).split([*self.widths_in], dim=1)
        found = latents.beside([sae.encode(part) for sae, part in zip(self.saes, parts, strict=True)])
        return found if x.dim() == 2 else found.led(tuple(x.shape[:-1]))

    def decode(self, codes: Latents) -> Tensor:
        """The latents of all layers -> [..., d_out] in the data's units."""
        out = self.constant(codes.batch)
        for place, sae, part in zip(self._places, self.saes, latents.apart(codes, self.config.d_sae), strict=True):
            out[:, place:] += sae.decode(part)
        return codes.in_lead(out)

    def constant(self, rows: int) -> Tensor:
        return (self.b_dec / self.target_scale).repeat(rows, 1)

    def written_by(self, layer: int, x: Tensor) -> tuple[int, Tensor]:
        return self._places[layer], self.saes[layer](x)

    def decoder_norms(self) -> Tensor:
        """[d_sae, stores]: zeros below each layer's own store."""
        return torch.cat([F.pad(sae.decoder_norms(), (layer, 0)) for layer, sae in enumerate(self.saes)])

    def formulas(self) -> list[Formula]:
        """Each layer's transcoder written out, in the data's units, without the bias: W_dec [m, its stores]."""
        return [sae.formula() for sae in self.saes]

    @property
    def target_scale(self) -> Tensor:
        """What y is multiplied by where the loss is taken: that of the first layer, which writes to all stores."""
        return self.saes[0].target_scale

    @property
    def _places(self) -> list[int]:
        """The column at which each layer's store begins, in what is written."""
        return [sum(self.widths_out[:layer]) for layer in range(len(self.widths_out))]

    def _by_layer(self, x: Tensor) -> list[tuple[SAE, int, Tensor]]:
        """Each layer's transcoder, the column it writes from, and the rows that it reads."""
        return [*zip(self.saes, self._places, x.split([*self.widths_in], dim=1), strict=True)]

    # Training

    @torch.no_grad()
    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        """Set every layer's scales and the bias from a sample of rows [n, d_in] and targets [n, d_out]."""
        outputs = self._targets(sample, targets)
        for sae, place, x in self._by_layer(sample):
            sae.initialise(x, outputs[:, place:])
        self._initialise_bias(outputs * self.target_scale)

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> LayerLosses:
        """The loss of a batch x [B, d_in] and its targets [B, d_out]: the error of all, and the terms of each layer."""
        self.expect_rows(x)
        layers, y = self._by_layer(x), self._targets(x, target) * self.target_scale
        read = [sae.chosen(part, clock) for sae, _, part in layers]
        y_hat = self.b_dec.repeat(len(x), 1)
        for (_, place, _), its in zip(layers, read, strict=True):
            y_hat = y_hat + F.pad(latents.decode(its.latents, its.weights.W_dec), (place, 0))
        error = self.saes[0].squared_error(y_hat, y)
        terms, parts = {"reconstruction": error}, []
        for (sae, place, _), its in zip(layers, read, strict=True):
            aim, hat = y[:, place:], y_hat[:, place:]
            own = sae.terms(its, aim, hat, error, clock)
            terms |= {name: terms[name] + term if name in terms else term for name, term in own.items()}
            parts.append(SparseLosses(own, clock, its.latents, hat, sae.target_scale, aim))
        return LayerLosses(terms, clock, tuple(parts), y_hat / self.target_scale)

    def parameter_groups(self) -> list[ParameterGroup]:
        groups = [group for sae in self.saes for group in sae.parameter_groups()]
        bias = [self.b_dec] if isinstance(self.b_dec, nn.Parameter) else []
        return [*sorted(groups, key=lambda group: group.side == "decoder"), ParameterGroup(bias, "decoder")]

    def observe(self, losses: Losses) -> Observed:
        assert isinstance(losses, LayerLosses), "those of `loss`"
        each = [sae.observe(part) for sae, part in zip(self.saes, losses.layers, strict=True)]
        fired, numbers = (torch.cat([getattr(one, name) for one in each]) for name in ("fired", "numbers"))
        return Observed(losses.clock, losses.rows, fired, numbers)

    def track(self, *parts: Observed) -> None:
        layers = len(self.layers)
        fired, numbers = ([torch.chunk(getattr(one, name), layers) for one in parts] for name in ("fired", "numbers"))
        for layer, sae in enumerate(self.saes):
            each = zip(parts, fired, numbers, strict=True)
            sae.track(*(Observed(one.clock, one.rows, f[layer], n[layer]) for one, f, n in each))

    def look_ahead(self, clock: Clock) -> None:
        for sae in self.saes:
            sae.look_ahead(clock)

    def dead(self, clock: Clock) -> Tensor:
        return torch.cat([sae.dead(clock) for sae in self.saes])
