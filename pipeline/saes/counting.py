"""What is counted after a batch: which latents fired, for how long others have not, the least value that was kept."""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels, sparse
from .sparse import SparsePattern


def fired(values: Tensor, entries: SparsePattern) -> Tensor:
    """int64 [m]: how many of each latent's entries are not 0."""
    if kernels.usable(values):
        found: Tensor = kernels.family("counting").fired(values.detach().view(-1), entries.indices, entries.d_sae)
        return found
    return sparse.sum_by_latent(entries, (values != 0).long().reshape(-1))


def follow_(since: Tensor, rate: Tensor, fired: Tensor, rows: int, newest: float) -> None:
    """Bring up to date the rows since each latent fired (int64) and how often it does, by one more batch of rows.

    newest: the weight of the batch in the rate.
    """
    if kernels.usable(rate):
        kernels.family("counting").follow_(since, rate, fired, rows, newest)
    else:
        since.add_(rows).masked_fill_(fired > 0, 0)
        rate.lerp_((fired / rows).to(rate.dtype), newest)


def least(values: Tensor) -> Tensor:
    """[1]: the least of the values above 0; NaN where none is, or none finite."""
    if kernels.usable(values):
        found: Tensor = kernels.family("counting").least(values)
        return found
    found = torch.where(values > 0, values, torch.inf).min()
    return torch.where(found.isfinite(), found, torch.nan).view(1)


def lead_(threshold: Tensor, batches: Tensor, seen: Tensor, counts: bool, least_weight: float) -> None:
    """Move a threshold towards the least value that a batch kept, `seen` [1], NaN where it kept none.

    All batches that count have one weight while they are few, and the newest at least `least_weight`.
    """
    if kernels.usable(threshold) and kernels.usable(seen):
        kernels.family("counting").lead_(threshold, batches, seen, counts, least_weight)
        return
    kept = ~seen.isnan()[0]  # where nothing was, the batch does not count
    batches.add_(kept & counts)
    newest = torch.clamp(1 / batches.clamp_min(1), min=least_weight).to(threshold.dtype)
    threshold.copy_(torch.where(kept, threshold.lerp(seen[0], newest), threshold))
