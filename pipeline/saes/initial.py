"""Initial weights and biases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import init

APRIL_NORM = 0.1


def rows(kind: str, count: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, width] float32 rows of a Config.init kind, before any normalisation of the decoder's.

    tied: directions uniform on the sphere. kaiming: uniform within sqrt(6 / width), each row one latent's weights.
    xavier: uniform within sqrt(6 / (count + width)). orthogonal: blocks of `width` mutually orthogonal unit rows.
    april: as tied, at norm 0.1.
    """
    table = torch.empty(count, width)
    match kind:
        case "tied" | "april":
            table = F.normalize(table.normal_(generator=generator), dim=1)
            return table * APRIL_NORM if kind == "april" else table
        case "kaiming":
            bound = math.sqrt(6 / width)
            return table.uniform_(-bound, bound, generator=generator)
        case "xavier":
            return init.xavier_uniform_(table, generator=generator)
        case "orthogonal":
            for start in range(0, count, width):
                init.orthogonal_(table[start : start + width], generator=generator)
            return table
        case _:
            raise AssertionError(kind)


def geometric_median(points: Tensor, steps: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least sum of distances to points [n, d], by Weiszfeld's iteration (Weiszfeld 1937).

    Starts at the mean and stops after `steps` or once it moves by less than `tolerance` of its distance to the points.
    A point the iteration lands on is held at a tiny positive distance, so its weight stays finite.
    """
    centre = points.mean(0)
    tiny = torch.finfo(points.dtype).tiny ** 0.5
    for _ in range(steps):
        distances = torch.linalg.vector_norm(points - centre, dim=1).clamp_min(tiny)
        weights = 1 / distances
        weights /= weights.sum()
        moved = weights @ points
        done = torch.linalg.vector_norm(moved - centre) <= tolerance * distances.mean()
        centre = moved
        if done:
            break
    return centre


def rms_scale(points: Tensor) -> Tensor:
    """The number c for which the rows [n, d] times c have mean squared norm d. Zero data has none: ValueError."""
    mean_square = points.double().square().mean()
    if not (mean_square > 0 and torch.isfinite(mean_square)):
        raise ValueError(
            f"input_scale: a scale needs finite rows, not all zero, but their mean square is {mean_square}"
        )
    return mean_square.rsqrt()


def store_scales(points: Tensor, widths: Sequence[int], *, unit: bool) -> Tensor:
    """The number c for which the rows [n, d] times c have mean squared norm d, or 1 (unit): a scalar.

    Of rows of several stores, each has a number of its own for its columns: [d].
    """
    found = [rms_scale(part) / (part.shape[1] ** 0.5 if unit else 1) for part in points.split([*widths], dim=1)]
    return found[0] if len(found) == 1 else torch.cat([c.repeat(d) for c, d in zip(found, widths, strict=True)])
