"""The encoder's product, and the ways an architecture picks active latents from it.

The pre-activations p = (x - centre) @ W_enc + b_enc of a batch are computed once, without a graph, into scratch memory
that is reused from step to step (fresh pages for 64 MiB cost a tenth of the product). An architecture scans them,
names the entries it keeps, and gets those back with their gradients attached. Scratch holds one block of rows at a time
and is dead when the scan ends, so nothing saved for backward refers to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sparse
from .latents import Latents
from .sparse import Entries

BLOCK_ELEMENTS = 2**24
"""Pre-activations held at a time (64 MiB in float32); smaller blocks were slower in every measurement."""

MIN_BLOCK_ROWS = 256
"""Below this many rows per product, packing the weights costs more than a smaller block saves."""

SPARSE_BELOW = 0.1
"""Share of positive pre-activations up to which `positive` goes entry by entry; above, dense products are cheaper."""

_scratch = threading.local()


def _scratch_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised [rows, columns] tensor on the CPU, the calling thread's own, reused by the next call."""
    kept: dict[torch.dtype, Tensor] = _scratch.__dict__.setdefault("kept", {})
    if like.dtype not in kept or kept[like.dtype].numel() < rows * columns:
        kept[like.dtype] = torch.empty(rows * columns, dtype=like.dtype)
    return kept[like.dtype][: rows * columns].view(rows, columns)


class Preactivations:
    """p = (x - centre) @ weight.T + bias, seen through what an architecture needs of it.

    x [B, d_in], centre [d_in], weight [m, d_in] (W_enc stored latent by latent), bias [m].
    Under autocast the product runs in the reduced precision; the entries kept are then recomputed in full, so that only
    the choice of entries is approximate and never their values.
    """

    def __init__(self, x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.x, self.centre, self.weight, self.bias = x, centre, weight, bias
        self.centred = x.detach() - centre.detach()

    @property
    def d_sae(self) -> int:
        return self.weight.shape[0]

    def blocks(self, first: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(rows, p of those rows [b, m]) without a graph; p is overwritten when the next block is asked for.

        first: rows of the first block, for a scan that may stop there.
        """
        x, weight, bias = self.centred, self.weight.detach(), self.bias.detach()
        size = max(MIN_BLOCK_ROWS, BLOCK_ELEMENTS // self.d_sae)
        # an out= product ignores autocast, and a GPU's allocator already reuses memory
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        stop = 0
        while stop < x.shape[0]:
            start, stop = stop, min(stop + (first or size), x.shape[0])
            rows, first = slice(start, stop), None
            if plain:
                out = _scratch_rows(stop - start, self.d_sae, x)
                yield rows, torch.addmm(bias, x[rows], weight.T, out=out)
            else:
                with torch.no_grad():
                    product = F.linear(x[rows], weight, bias)
                yield rows, product

    def at(self, entries: Entries, values: Tensor) -> Tensor:
        """The pre-activations at the entries, differentiable: `values` [n] are what the scan saw there."""
        if values.dtype != self.weight.dtype:
            with torch.no_grad():
                values = sparse.dots(entries, self.centred, self.weight) + self.bias[entries.indices]
        return sparse.attach(values, self.x, self.centre, self.weight, self.bias, self.centred, entries)

    def topk(self, k: int) -> Latents:
        """The k largest of every row: values [B, k] (of either sign), exactly k of them whatever the ties."""
        kept = [p.topk(k, dim=1, sorted=False) for _, p in self.blocks()]
        entries = Entries.per_row(torch.cat([top.indices for top in kept]), self.d_sae)
        values = self.at(entries, torch.cat([top.values for top in kept]).reshape(-1))
        return Latents(values.view(-1, k), entries, self.d_sae)

    def positive(self) -> Latents:
        """ReLU(p): entry by entry where at most SPARSE_BELOW of it is positive, else dense. Both are exact."""
        indices, counts, values = [], [], []
        for _, p in self.blocks(first=MIN_BLOCK_ROWS):
            mask = p > 0
            flat = mask.view(-1).nonzero().view(-1)
            if flat.numel() > SPARSE_BELOW * p.numel():
                return Latents.of_dense(self.dense().relu())
            indices.append(flat % self.d_sae)
            counts.append(mask.sum(1))
            values.append(p.reshape(-1)[flat])
        entries = Entries.ragged(torch.cat(indices), torch.cat(counts), self.d_sae)
        return Latents(self.at(entries, torch.cat(values)).relu(), entries, self.d_sae)

    def dense(self) -> Tensor:
        """All of p, [B, m], differentiable the ordinary way."""
        return sparse.centred_linear(self.x, self.centre, self.weight, self.bias)

    def of(self, latents: Tensor) -> Tensor:
        """p of some latents only (int64 [c]): [B, c], differentiable, at c / m of the cost of `dense`."""
        return sparse.centred_linear(self.x, self.centre, self.weight[latents], self.bias[latents])
