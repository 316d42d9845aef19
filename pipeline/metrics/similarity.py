"""How alike two dictionaries are: by their decoder rows, their activations, or their reconstructions.

Vectors of one are matched with vectors of the other by cosine, each with its best (`best`) or one to one (`hungarian`).
The matching is a constant; the gradient flows through the cosines of the matched pairs, which is the subgradient of a
maximum. Cosines of all pairs are computed a block at a time, so memory is linear in the number of vectors.

MMCS(a -> b), the mean over a of the largest cosine with b, is not symmetric: a small dictionary can be covered well by
a large one. A random dictionary scores above 0, too (0.19 for 512 vectors in 256 dimensions): read it beside `chance`.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

BLOCK = 1 << 24  # cosines held at a time


def best(a: Tensor, b: Tensor) -> Tensor:
    """For each row of a [n, d] that of b [m, d] with the largest cosine: int64 [n]. Rows of zeros come last."""
    with torch.no_grad():
        unit, other = _unit(a), _unit(b)
        step = max(1, BLOCK // len(b))
        return torch.cat([(part @ other.T).argmax(1) for part in unit.split(step)])


def hungarian(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one matching of rows of a [n, d] and b [m, d] with the largest sum of cosines: two int64 [min(n, m)].

    Cubic in the number of rows: seconds for thousands of them. Refresh it now and then, not at every step.
    """
    from scipy.optimize import linear_sum_assignment

    with torch.no_grad():
        cosines = (_unit(a) @ _unit(b).T).nan_to_num(0)  # of a dictionary that diverges: whoever trains it says so
        rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return torch.from_numpy(rows).to(a.device), torch.from_numpy(columns).to(a.device)


def mmcs(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the rows of a [n, d] of the largest cosine with a row of b [m, d]: a scalar, differentiable in both.

    Rows of zeros (columns of latents that never fired) are left out on both sides; 0 where nothing is left.
    """
    a, b = a[a.any(1)], b[b.any(1)]
    if not len(a) or not len(b):
        return a.sum() * 0 + b.sum() * 0
    return cosine_similarity(a, b[best(a, b)]).mean()


def symmetric_mmcs(a: Tensor, b: Tensor) -> Tensor:
    """The mean of MMCS both ways."""
    return (mmcs(a, b) + mmcs(b, a)) / 2


@torch.no_grad()
def mutual(tables: Sequence[Tensor]) -> list[float]:
    """For each of several dictionaries the mean, over the others, of its symmetric MMCS with them."""
    pairs = {(i, j): symmetric_mmcs(tables[i], tables[j]).item() for i, j in combinations(range(len(tables)), 2)}
    return [fmean(value for pair, value in pairs.items() if i in pair) for i in range(len(tables))]


def mean_cosine(a: Tensor, b: Tensor, matching: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cosine of matched rows, differentiable in both."""
    return cosine_similarity(a[matching[0]], b[matching[1]]).mean()


def chance(n: int, m: int, d: int, *, seed: int = 0) -> float:
    """MMCS of n on m vectors that are random directions in d dimensions: what a score is worth nothing below."""
    generator = torch.Generator().manual_seed(seed)
    return mmcs(torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)).item()


def random_directions(m: int, d: int, *, seed: int = 1) -> Tensor:
    """A dictionary that has learned nothing: m directions [m, d] of length 1, drawn evenly."""
    return _unit(torch.randn(m, d, generator=torch.Generator().manual_seed(seed)))


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1; rows of zeros stay."""
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's r of two tensors [n], or None where one of them does not vary."""
    a, b = (one.double() - one.double().mean() for one in (a, b))
    scale = (a.norm() * b.norm()).item()
    return (a @ b).item() / scale if scale > 1e-12 * len(a) else None
