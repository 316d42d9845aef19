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


def auxk_loss(pre: Preactivations, dead: Tensor, k_aux: int, y: Tensor, y_hat: Tensor, table: Tensor) -> Tensor:
    """||e - e_hat||^2 over the variance of e, summed over the batch: a scalar of order 1, without its coefficient.

    e is the residual y - y_hat [B, d_out], taken as given (no gradient). e_hat decodes through the table (W_dec
    [m, d_out], no bias) the k_aux largest of every row's ReLU'd pre-activations among the dead latents (bool [m]), or
    all of them where fewer are dead. 0 where none is dead or the residual is constant.
    """
    who = dead.nonzero().view(-1)
    k_aux = min(k_aux, who.numel())
    if k_aux == 0:
        return y.new_zeros(())
    residual = (y - y_hat).detach()
    variance = (residual - residual.mean(0)).square().sum()
    if variance == 0:
        return y.new_zeros(())
    e_hat = _explain(pre, who, k_aux, table)
    return (residual - e_hat).square().sum() / variance


def _explain(pre: Preactivations, who: Tensor, k_aux: int, table: Tensor) -> Tensor:
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
