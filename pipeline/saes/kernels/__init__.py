"""Triton kernels that take the place of torch's operations on a CUDA device: one file a family.

Each computes what the plain way beside it computes (`sparse`, `encoder`), every sum in an order that the shapes decide
alone, so that two equal runs end with the same bytes on the same card. Triton comes with torch's CUDA builds; this
module is imported without it. Numbers are float32, or those that a product in a reduced precision gave.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

Way = Literal["auto", "plain"]

LEAST_CARD = (7, 0)
"""The compute capability of the oldest cards that Triton compiles for."""

INTERPRETED = False
"""Whether tensors on the CPU are computed by kernels, too: in Triton's interpreter, which only tests do."""

_way: Way = "auto"
_there = find_spec("triton") is not None


@cache
def hindrance(device: torch.device) -> str | None:
    """What keeps kernels from running on a CUDA device, in words; None where nothing does.

    Triton compiles what launches a kernel by the machine's own C compiler, with Python's headers.
    """
    if not _there:
        return "Triton is not installed (the extra gpu has it)"
    if (card := torch.cuda.get_device_capability(device)) < LEAST_CARD:
        return f"Triton has none for cards of compute capability {card[0]}.{card[1]}"
    try:
        import_module("triton.runtime").driver.active.get_current_target()
    except (RuntimeError, AssertionError, OSError, ImportError, subprocess.CalledProcessError) as error:
        first = str(error).partition("\n")[0]
        return f"Triton cannot compile here, which takes a C compiler, Python's headers and libcuda ({first[:200]})"
    return None


def usable(x: Tensor, *further: torch.dtype) -> bool:
    """Return True if kernels compute what is to be made of a tensor: float32, or of further types."""
    if _way != "auto" or not x.is_contiguous() or x.dtype not in (torch.float32, *further):
        return False
    return (_there and INTERPRETED) or (x.is_cuda and hindrance(x.device) is None)


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
