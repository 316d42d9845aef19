"""AuxK: let dead latents explain what the living ones left over (Gao et al. 2024, arXiv 2406.04093, section A.2)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from . import latents, linears, placement, sparse
from .base import SAE
from .config import Clock, Config
from .encoder import Preactivations
from .latents import Latents
from .losses import LossInputs, share, spread

AuxShare = Literal["error", "variance", "none"]

DENSE_UP_TO = 8
"""With at most this many times k_aux dead latents, products over all of them are cheaper than k_aux entries a row."""

AHEAD_UP_TO = 4
"""As many times k_aux dead latents are looked at in a step on a device that runs ahead, others in the next steps."""


class AuxKConfig(Config):
    """Settings of AuxK."""

    aux_coefficient: float = Field(
        2.0, ge=0, description="weight of AuxK, in which dead latents reconstruct the residual; 0: off"
    )
    aux_share: AuxShare = Field(
        "error",
        description="what AuxK is a share of: its squared error counts as the reconstruction's does (error), or it is "
        "divided by the residual's variance and counts as a share of the data's (variance, as published), or by itself "
        "(none, as in versions before 0.2)",
    )
    aux_k: int | None = Field(
        None, ge=1, description="dead latents AuxK uses per input; unset: half the width, rounded to a power of two"
    )


def term(sae: SAE, batch: LossInputs) -> dict[str, Tensor]:
    """{"auxk": the weighted term}, or nothing where it is switched off."""
    config = sae.config
    assert isinstance(config, AuxKConfig)
    if config.aux_coefficient == 0:
        return {}
    if sae.none_dead(batch.clock):
        return {"auxk": batch.y.new_zeros(batch.y.shape[:-2])}
    k_aux, dead = config.aux_k or default_k(sae.d_out), sae.dead(batch.clock)
    ahead = placement.runs_ahead(dead)
    if ahead:
        e_hat = explained_ahead(batch.pre, dead, min(k_aux, sae.d_sae), batch.W_dec, batch.clock)
    else:
        who = dead.nonzero().view(-1)
        if not len(who):
            return {"auxk": batch.y.new_zeros(())}
        e_hat = explained(batch.pre, who, min(k_aux, len(who)), batch.W_dec)
    residual = (batch.y - batch.y_hat).detach()
    error = (residual - e_hat).square().sum((-2, -1))
    match config.aux_share:
        case "error":
            found = sae.reduced(error, batch.y)
        case "variance":
            found = sae.reduced(spread(batch.y), batch.y) * share(error, spread(residual))
        case "none":
            found = share(error, spread(residual))
    found = config.aux_coefficient * found
    return {"auxk": found.masked_fill(~dead.any(-1), 0) if ahead else found}


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
    p = linears.centred_linear(pre.x, pre.centre, weight, bias)
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
