"""L1 penalties and the settings of those architectures that have one (methods of Bricken et al. 2023 and after)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .latents import Latents
from .losses import LossInputs
from .steering import SteeredConfig
from .uncounted import Asked, Uncounted

Form = Literal["plain", "decoder_norm", "per_token"]


class PenaltyConfig(SteeredConfig):
    """Settings of an L1 penalty. Anthropic's April 2024 update: decoder_norm free, penalty decoder_norm, init april."""

    penalty: Form = Field(
        "plain",
        description="what is summed over a row's latents f: f (plain), f times the norm of its decoder row, "
        "or f over the input's norm (per_token)",
    )


def l1(form: Form, latents: Latents, batch: LossInputs, table: Tensor) -> Tensor:
    """Scalar: the mean over the batch of each row's sum of (non-negative) latents; the table is W_dec [m, d_out].

    `per_token` asks nothing of a row of zeros, whose norm nothing can be a multiple of.
    """
    sums = latents.sums if isinstance(latents, Uncounted) else latents.sum_per_row(_weights(form, table))
    if form == "per_token":
        norms = torch.linalg.vector_norm(batch.x, dim=1)
        sums = sums / norms.masked_fill(norms == 0, torch.inf)
    return sums.mean()


def asked(form: Form, table: Tensor) -> Asked:
    """What `l1` takes of latents."""
    return Asked("linear", weights=_weights(form, table))


def _weights(form: Form, table: Tensor) -> Tensor | None:
    """[m]: the weight of each latent in a row's sum; None where it is 1."""
    return torch.linalg.vector_norm(table, dim=1) if form == "decoder_norm" else None
