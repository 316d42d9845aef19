"""The files of a stranger's folder: JSON and tensors, checked as they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.durable import read
from sae.cache.disk.parsing import MOST_BYTES, parsed_mapping, shown, text, whole
from sae.cache.disk.tensors import read_tensors
from sae.cache.errors import DamagedStore, NotFound, SaeError

MOST_WIDTH = 1 << 31
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SaeError where there is none."""
    data = read(path, MOST_BYTES)
    if data is None:
        raise NotFound(f"{path}: not there")
    try:
        return parsed_mapping(data, nan_is_null=True)
    except ValueError as error:
        raise SaeError(f"{path}: cannot be read as settings ({error})") from error


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as they are. Raises SaeError where it is none."""
    try:
        found, _ = read_tensors(path, sealed=False)
    except DamagedStore as error:
        raise SaeError(f"{path}: cannot be read as safetensors; is it complete? ({error})") from error
    return found


def take(among: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """Remove a tensor of this shape from `among`: float32, contiguous, every number finite."""
    if name not in among:
        raise ValueError(f"tensors lack {name}; there are {', '.join(sorted(among)) or 'none'}")
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
    if value not in choices:
        raise ValueError(f"{name} is {shown(value)}; read are {', '.join(choices)}")
    return str(value)


def noted(of: dict[str, Any], name: str) -> str | None:
    """A text that may be missing."""
    return None if of.get(name) is None else text(of, name)
