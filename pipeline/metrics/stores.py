"""What a dictionary of several stores makes of each of them: reconstruction, and how its latents share their decoders.

The decoder norm of a latent at a store is taken in units of that store's rows (over the root of their mean square), since
rows of later layers are longer. A latent's shares are its norms over their sum: 1 at one store for a latent that is that
store's alone, alike for one that all stores share. Only latents that fire in held-out rows count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.metrics.reconstruction import Reconstruction, in_float64
from sae.pipeline.saes.contract import Coder, LatentCoder, LayerByLayer

BINS = 20  # of shares from 0 to 1
EXCLUSIVE = 0.9  # the share of its norms that a latent of one store has there


@register
class Stores(Metric):
    """How each of several stores is reconstructed, and which stores a latent writes to."""

    name = "stores"
    needs = ("rows", "stores")
    figures = (
        Figure("fvu_stores", "FVU, mean of the stores", "mean over stores of each one's FVU, which no store's norm decides", "low"),
        Figure("exclusive_share", "latents of one store", "share of living latents with 0.9 of their decoder norms at one store", None, "evaluation", share=True),
    )  # fmt: skip

    def __init__(self, subject: Subject) -> None:
        self.sae, self.names = subject.sae, subject.stores
        self.widths = [*self.sae.widths_out]
        self.each = [Reconstruction() for _ in self.widths]
        self._squares = torch.zeros(len(self.widths), dtype=torch.float64)
        self._fired = torch.zeros(self.sae.width if isinstance(self.sae, Coder) else 0, dtype=torch.bool)

    @classmethod
    def of(cls, subject: Subject) -> Stores:
        return cls(subject)

    def update(self, batch: Encoded) -> None:
        ys, hats = (rows.split(self.widths, dim=1) for rows in (batch.y, batch.y_hat))
        for one, y, hat in zip(self.each, ys, hats, strict=True):
            one.count(y, hat)
        squares = torch.stack([in_float64(y).square().sum() for y in ys])
        self._squares = self._squares.to(squares.device) + squares
        if batch.codes is not None:
            fired = batch.codes.fired() > 0
            self._fired = self._fired.to(fired.device) | fired

    def result(self) -> dict[str, Value]:
        found = [one.scores().fvu for one in self.each]
        defined = [fvu for fvu in found if fvu is not None]
        shares = self._shares()
        exclusive = None if shares is None or not len(shares) else (shares.amax(1) >= EXCLUSIVE).double().mean().item()
        return {
            "fvu_stores": sum(defined) / len(defined) if len(defined) == len(found) else None,
            "exclusive_share": exclusive,
        }

    def details(self) -> dict[str, Any]:
        """By store, in the order in which they lie: figures, and a histogram of the living latents' shares there."""
        found: dict[str, Any] = {}
        shares = self._shares()
        for place, (name, one) in enumerate(zip(self.names, self.each, strict=True)):
            scores = one.scores()
            found[name] = {"fvu": scores.fvu, "mse": scores.mse_per_feature, "cosine": scores.cosine}
            if shares is not None:
                counts = torch.histc(shares[:, place].float(), bins=BINS, min=0, max=1)
                found[name]["decoder_shares"] = counts.long().tolist()
        triangle = self._triangle()
        return {"stores": found} | ({} if triangle is None else {"decoder_triangle": triangle})

    def latents(self) -> dict[str, Tensor]:
        norms = self._norms()
        return {} if norms is None else {"decoder_norms": norms.float()}

    @torch.no_grad()
    def _norms(self) -> Tensor | None:
        """float64 [d_sae, stores]: decoder norms in units of the stores' rows; None of what has no decoders."""
        if not isinstance(self.sae, LatentCoder):
            return None
        rows = self.each[0].scores().rows
        root_mean_square = (self._squares.cpu() / rows).sqrt()
        norms = self.sae.decoder_norms().double().cpu()
        return norms / root_mean_square.masked_fill(root_mean_square == 0, torch.inf)

    def _shares(self) -> Tensor | None:
        """float64 [living latents, stores]: each one's norms over their sum."""
        norms = self._norms()
        if norms is None:
            return None
        living = norms[self._fired.cpu() & (norms.sum(1) > 0)]
        return living / living.sum(1, keepdim=True)

    def _triangle(self) -> list[list[float | None]] | None:
        """Mean decoder norm, over the living latents of each layer, at each store; None where latents have no layer."""
        norms = self._norms()
        if norms is None or not isinstance(self.sae, LayerByLayer):
            return None
        layers = zip(norms.chunk(len(self.widths)), self._fired.cpu().chunk(len(self.widths)), strict=True)
        return [
            [norm if living.any() and at >= layer else None for at, norm in enumerate(its[living].mean(0).tolist())]
            for layer, (its, living) in enumerate(layers)
        ]
