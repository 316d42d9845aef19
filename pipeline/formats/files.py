"""The files of a stranger's folder: JSON and tensors, checked as they are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.durable import read, unreadable, write_in
from sae.cache.disk.parsing import MOST_BYTES, parsed_mapping, shown, text, whole
from sae.cache.disk.tensors import read_tensors, write_tensors
from sae.cache.errors import DamagedStore, NotFound, SaeError

MOST_WIDTH = 1 << 31
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_pair(folder: Path, settings: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The object in a JSON file, and the tensors of the safetensors file beside it, as they are.

    Raises SaeError where either is none, or where a file of tensors of ours is not the one that was written.
    """
    data = read(folder / settings, MOST_BYTES)
    if data is None:
        raise NotFound(f"{folder / settings}: not there")
    try:
        said = parsed_mapping(data, nan_is_null=True)
    except ValueError as error:
        raise SaeError(f"{folder / settings}: cannot be read as settings ({error})") from error
    try:
        size = (folder / weights).stat().st_size
    except OSError as error:
        raise unreadable(error, folder / weights) from error
    if size > memory():
        raise SaeError(f"{folder / weights}: has {size / 2**30:,.1f} GiB, more than the memory of this machine")
    try:
        tensors, _ = read_tensors(folder / weights, sealed=False, extra_file=data)
    except DamagedStore as error:
        raise SaeError(f"{error}; is it whole, and of one making with {settings} beside it?") from error
    return said, tensors


def write_pair(folder: Path, settings: str, said: dict[str, Any], weights: str, tensors: dict[str, Tensor]) -> None:
    """Write what `read_pair` reads; the tensors last, with a checksum of both."""
    data = json.dumps(said, indent=2, allow_nan=False).encode()
    write_in(folder, settings, data)
    write_tensors(folder, weights, tensors, extra_file=data)


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def take(among: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """Remove a tensor of this shape from `among`: float32, contiguous, every number finite."""
    if name not in among:
        raise ValueError(f"tensors lack {name}")
    tensor = among.pop(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)} where {list(shape)} is wanted")
    if tensor.dtype not in PRECISIONS:
        raise ValueError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, not of floats")
    tensor = tensor.to(torch.float32).contiguous()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are none, or too large for float32")
    return tensor


def expect_taken(among: dict[str, Tensor]) -> None:
    """Raise ValueError where tensors are left, which the formula knows no use for."""
    if among:
        raise ValueError(f"unknown tensors {', '.join(sorted(among))}")


def width(of: dict[str, Any], name: str) -> int:
    """A number of dimensions or latents."""
    return whole(of, name, 1, MOST_WIDTH)


def flag(of: dict[str, Any], name: str, default: bool) -> bool:
    """True or false; the default where the tool, too, has one and nothing is said."""
    value = of.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}, not true or false")
    return value


def choice(of: dict[str, Any], name: str, *choices: str) -> str:
    """One of some words, the first of them where nothing is said."""
    value = of.get(name)
    if value is None:
        return choices[0]
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; read are {', '.join(choices)}")
    return value


def noted(of: dict[str, Any], name: str) -> str | None:
    """A text that may be missing."""
    return None if of.get(name) is None else text(of, name)
