"""Ghost gradients: dead latents learn from what the living left over, through exp(p) instead of ReLU.

Anthropic, January 2024 update. The scaled copy of the loss below has the value 1 whatever it says, so its gradient,
times the reconstruction's loss, weighs as much as that loss does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import placement
from .encoder import Preactivations

LARGEST = 20.0
"""Pre-activations are cut here before exp, which would overflow at 89."""


def ghost_loss(pre: Preactivations, dead: Tensor, y: Tensor, y_hat: Tensor, table: Tensor) -> Tensor:
    """A scalar whose value is 1 and whose gradient pulls dead latents towards the residual; 0 where none is dead.

    e is the residual y - y_hat [B, d_out], taken as given. g decodes exp(p) of the dead latents (bool [m]) through
    their rows of the table (W_dec [m, d_out]) and is scaled, row by row and as a constant, to half the residual's norm.
    The term is ||g - e||^2 over its own value.
    """
    residual = (y - y_hat).detach()
    if placement.runs_ahead(y):
        ghosts = pre.dense().clamp_max(LARGEST).exp().masked_fill(~dead, 0) @ table
    else:
        who = dead.nonzero().view(-1)
        if who.numel() == 0:
            return y.new_zeros(())
        ghosts = pre.columns(who).clamp_max(LARGEST).exp() @ table[who]
    norms = torch.linalg.vector_norm(ghosts.detach(), dim=1, keepdim=True)
    wanted = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    error = (ghosts * (wanted / (2 * norms + 1e-6)) - residual).square().sum()
    value = error.detach()
    loss = error / torch.where(value > 0, value, 1)
    return loss.masked_fill(~dead.any(), 0) if placement.runs_ahead(y) else loss
