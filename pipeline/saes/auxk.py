"""AuxK: let dead latents explain what the living ones left over (Gao et al. 2024, arXiv 2406.04093, section A.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import latents, sparse
from .config import Clock
from .encoder import Preactivations
from .latents import Latents

DENSE_UP_TO = 8
"""With at most this many times k_aux dead latents, products over all of them are cheaper than k_aux entries a row."""

AHEAD_UP_TO = 4
"""As many times k_aux dead latents are looked at in a step on a device that runs ahead, others in the next steps."""


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


def explained_ahead(pre: Preactivations, dead: Tensor, k_aux: int, table: Tensor, clock: Clock) -> Tensor:
    """The same e_hat for dead (bool [m]) latents that nobody has counted, at a cost that does not depend on them.

    Where more than AHEAD_UP_TO times k_aux are dead, a row's k_aux are chosen among so many of them: those that follow
    a place which moves on from step to step, so that all have their turn. k_aux is at most m. Of a stack each
    dictionary has its own dead (bool [N, m]), and e_hat is [N, B, d_out].
    """
    m, count = pre.d_sae, min(pre.d_sae, AHEAD_UP_TO * k_aux)
    turn = (torch.arange(m, device=dead.device) - clock.step * count % m) % m
    who = torch.where(dead, m - turn, 0).topk(count).indices
    there = dead.gather(-1, who).unsqueeze(-2)
    weight, bias, rows = (_taken(one, who) for one in (pre.weight, pre.bias, table))
    p = sparse.centred_linear(pre.x, pre.centre, weight, bias)
    top = p.detach().masked_fill(~there, -torch.inf).topk(k_aux, dim=-1, sorted=False)
    keep = torch.zeros_like(p).scatter_(-1, top.indices, 1.0) * there
    values = p.relu() * keep
    return values @ rows if who.dim() == 1 else sparse.of_each(torch.mm, values, rows)


def _taken(table: Tensor, who: Tensor) -> Tensor:
    """Rows [..., c] of a table, or of each of a stack of tables; the gradient of each is one row's."""
    if who.dim() == 1:
        return table.index_select(0, who)
    firsts = torch.arange(0, table.shape[:2].numel(), table.shape[1], device=who.device)
    return table.flatten(0, 1).index_select(0, (who + firsts[:, None]).view(-1)).unflatten(0, who.shape)
