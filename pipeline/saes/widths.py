"""The widths of rows, which may be of several stores, side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

Width = int | tuple[int, ...]
"""The width of rows, or the widths of the stores whose rows lie side by side in them."""


def widths(of: Width) -> tuple[int, ...]:
    """The width of each store."""
    return (of,) if isinstance(of, int) else of


def norms_by_store(table: Tensor, widths: Sequence[int]) -> Tensor:
    """[m, stores]: the norms of the parts that each row of a table [m, d] has in stores of these widths."""
    return torch.stack([torch.linalg.vector_norm(part, dim=1) for part in table.split([*widths], dim=1)], dim=1)
