"""What the decoder directions of latents say: which others are near, and which tokens each makes likelier."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 25  # cosines or logits at a time


class Nearest(NamedTuple):
    """The latents with the highest decoder cosine to each: latent int32 (-1: no more), cosine float32, [d_sae, n]."""

    latent: np.ndarray
    cosine: np.ndarray


class Lens(NamedTuple):
    """The tokens whose logits a unit of each latent raises and lowers most, int32 and float32, all [d_sae, n]."""

    up: np.ndarray
    up_weight: np.ndarray
    down: np.ndarray
    down_weight: np.ndarray


@torch.no_grad()
def nearest(directions: Tensor, n: int) -> Nearest:
    """The nearest of directions [d_sae, d] by cosine; a direction of no length is near none."""
    unit = torch.nn.functional.normalize(directions.detach().float(), dim=1)
    m = len(unit)
    found = Nearest(np.full((m, n), -1, np.int32), np.zeros((m, n), np.float32))
    few, step = min(n, m - 1), max(1, BLOCK // m)
    for first in range(0, m, step):
        cosines = unit[first : first + step] @ unit.T
        rows = torch.arange(len(cosines), device=unit.device)
        cosines[rows, rows + first] = -torch.inf
        best = cosines.topk(few, dim=1)
        found.latent[first : first + step, :few] = best.indices.cpu().numpy()
        found.cosine[first : first + step, :few] = best.values.cpu().numpy()
    return found


@torch.no_grad()
def lens(directions: Tensor, unembedding: Tensor, n: int) -> Lens:
    """Read directions [d_sae, d] with an unembedding [n_vocab, d], as if they went past the final norm."""
    weights = unembedding.to(directions.device, torch.float32).T
    few = min(n, weights.shape[1])
    parts: list[list[Tensor]] = []
    for some in directions.detach().float().split(max(1, BLOCK // weights.shape[1])):
        logits = some @ weights
        up, down = logits.topk(few, dim=1), logits.topk(few, dim=1, largest=False)
        parts.append([up.indices.int(), up.values, down.indices.int(), down.values])
    return Lens(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))
