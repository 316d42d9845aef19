"""Triton kernels that take the place of torch's operations on a CUDA device: one file a family.

Each computes what the plain way beside it computes (`sparse`, `encoder`), every sum in an order that the shapes decide
alone, so that two equal runs end with the same bytes on the same card. Triton comes with torch's CUDA builds; this
module is imported without it. Numbers are float32, or those that a product in a reduced precision gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

Way = Literal["auto", "plain"]

INTERPRETED = False
"""Whether tensors on the CPU are computed by kernels, too: in Triton's interpreter, which only tests do."""

_way: Way = "auto"
_there = find_spec("triton") is not None


def available() -> bool:
    """Return True if Triton is installed."""
    return _there


def usable(x: Tensor, *further: torch.dtype) -> bool:
    """Return True if kernels compute what is to be made of a tensor: float32, or of further types."""
    there = _there and (x.is_cuda or INTERPRETED)
    return _way == "auto" and there and x.is_contiguous() and x.dtype in (torch.float32, *further)


@contextmanager
def chosen(way: Way) -> Iterator[None]:
    """Compute so within: by kernels where they can be (auto), or by torch's own operations (plain).

    It holds for all threads, since autograd takes backward passes in threads of its own.
    """
    global _way
    before, _way = _way, way
    try:
        yield
    finally:
        _way = before


def family(name: str) -> ModuleType:
    """A file of kernels by its name, which imports Triton."""
    return import_module(f"{__name__}.{name}")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Give the device of the first argument a kernel to run; of an empty grid there is nothing."""
    if all(grid):
        with torch.cuda.device_of(args[0]):  # Triton's own choice is the current one
            kernel[grid](*args, **constants, enable_fp_fusion=True)


def covering(size: int, least: int, most: int) -> int:
    """The power of two that covers a size, within bounds that are powers of two."""
    return min(most, max(least, 1 << (size - 1).bit_length()))
