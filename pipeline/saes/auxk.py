"""AuxK: let dead latents explain what the living ones left over (Gao et al. 2024, arXiv 2406.04093, section A.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import latents
from .encoder import Preactivations
from .latents import Latents

DENSE_UP_TO = 8
"""With at most this many times k_aux dead latents, products over all of them are cheaper than k_aux entries a row."""


def default_k(d: int) -> int:
    """Half the width, rounded to a power of two: 512 for 768."""
    return int(2 ** max(0, round(math.log2(d / 2))))


def explained(pre: Preactivations, who: Tensor, k_aux: int, table: Tensor) -> Tensor:
    """Return e_hat [B, d_out], in which dead latents explain a residual.

    It decodes through the table (W_dec [m, d_out], no bias) the k_aux largest of every row's ReLU'd pre-activations
    among the latents `who` (int64 [c], at least k_aux of them).
    """
    p = pre.columns(who)
    if who.numel() == k_aux:
        return p.relu() @ table[who]
    top = p.detach().topk(k_aux, dim=1, sorted=False)
    if who.numel() <= DENSE_UP_TO * k_aux:
        keep = torch.zeros_like(p).scatter_(1, top.indices, 1.0)
        return (p.relu() * keep) @ table[who]
    chosen = Latents.of_rows(top.values, who[top.indices], pre.d_sae)
    assert chosen.entries is not None
    values = pre.gather(chosen.entries, top.values.reshape(-1)).relu()
    return latents.decode(Latents(values, chosen.entries, pre.d_sae), table)
