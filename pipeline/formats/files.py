"""The files of a stranger's folder: JSON and tensors, checked as they are read."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.durable import expect_file, read, unreadable, write_in
from sae.cache.disk.parsing import MOST_BYTES, parsed_mapping, shown, text, whole
from sae.cache.disk.tensors import read_tensors, write_tensors
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.pipeline.saes.inference import Formula

MOST_WIDTH = 1 << 31
MOST_SAID = 12  # words that a line lists; of more, those that are closest to what was said
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_pair(folder: Path, settings: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The object in a JSON file, and the tensors of the safetensors file beside it, as they are.

    Raises SaeError where either is none, or where a file of tensors of ours is not the one that was written.
    """
    said, data = read_settings(folder / settings)
    return said, read_weights(folder / weights, data)


def read_weights(path: Path, settings: bytes = b"") -> dict[str, Tensor]:
    """The tensors of a safetensors file. One of a run folder has a checksum of the settings beside it as well.

    Raises SaeError where it is none, or a file of ours that is not the one that was written.
    """
    expect_fits(path)
    try:
        return read_tensors(path, sealed=False)[0]
    except DamagedStore as error:
        if settings:
            with suppress(DamagedStore):
                return read_tensors(path, sealed=False, extra_file=settings)[0]
        raise SaeError(f"{error}; is it whole, and of one making with what is beside it?") from error


def read_settings(path: Path) -> tuple[dict[str, Any], bytes]:
    """The object in a JSON file, and the bytes that say it. Raises SaeError where there is none."""
    data = read(path, MOST_BYTES)
    if data is None:
        raise NotFound(f"{path}: not there")
    try:
        return parsed_mapping(data, nan_is_null=True), data
    except ValueError as error:
        raise SaeError(f"{path}: cannot be read as settings ({error})") from error


def expect_fits(path: Path, size: int | None = None) -> None:
    """Raise SaeError where a file, or the so many bytes that it unpacks to, is larger than the memory."""
    expect_file(path)
    try:
        size = path.stat().st_size if size is None else size
    except OSError as error:
        raise unreadable(error, path) from error
    if size > memory():
        raise SaeError(f"{path}: has {size / 2**30:,.1f} GiB, more than the memory of this machine")


def write_pair(folder: Path, settings: str, said: dict[str, Any], weights: str, tensors: dict[str, Tensor]) -> None:
    """Write what `read_pair` reads; the tensors last, with a checksum of theirs alone: settings are edited by hand."""
    write_in(folder, settings, json.dumps(said, indent=2, allow_nan=False).encode())
    write_tensors(folder, weights, tensors)


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def take(among: dict[str, Tensor], name: str, *shape: int) -> Tensor:
    """Remove a tensor of this shape from `among`: float32, contiguous, every number finite."""
    tensor = _removed(among, name, shape)
    if tensor.dtype not in PRECISIONS:
        raise ValueError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, not of floats")
    if 4 * tensor.numel() > memory():  # which the few bytes of an expanded tensor may be
        raise ValueError(f"{name} has {tensor.numel():,} numbers, more than the memory of this machine")
    tensor = tensor.to(torch.float32).contiguous()
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite, or too large for float32")
    return tensor


def take_whole(among: dict[str, Tensor], name: str, low: int, high: int) -> int:
    """Remove a whole number from `among`, a tensor without dimensions."""
    tensor = _removed(among, name, ())
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ValueError(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, not of whole numbers")
    return whole({name: int(tensor)}, name, low, high)


def _removed(among: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in among:
        raise ValueError(f"tensors lack {name}")
    tensor = among.pop(name)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)} where {list(shape)} is wanted")
    return tensor


def take_plain(among: dict[str, Tensor], d_in: int, d_sae: int, d_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Remove W_enc, b_enc, W_dec and b_dec from `among`, in the shapes that they have here."""
    return (
        take(among, "W_enc", d_in, d_sae), take(among, "b_enc", d_sae), take(among, "W_dec", d_sae, d_out),
        take(among, "b_dec", d_out),
    )  # fmt: skip


def sides(among: dict[str, Tensor], name: str) -> tuple[int, int]:
    """The two sizes of a matrix that stays in `among`, for a tool whose settings do not say them."""
    if name not in among:
        raise ValueError(f"tensors lack {name}")
    if among[name].dim() != 2 or not among[name].numel():
        raise ValueError(f"{name} has shape {list(among[name].shape)}, which is not a matrix")
    rows, columns = among[name].shape
    return rows, columns


def expect_taken(among: dict[str, Tensor]) -> None:
    """Raise ValueError where tensors are left, which the formula knows no use for."""
    if among:
        raise ValueError(f"unknown tensors {', '.join(sorted(among))}")


def expect_unscaled(formula: Formula) -> None:
    """Raise ValueError where each row is scaled by itself, of a tool that has no such thing."""
    if formula.row_scaling != "none":
        raise ValueError("it has no scaling of each row by itself (train.sae.input_scale = per_token)")


def expect_autoencoder(formula: Formula) -> None:
    """Raise ValueError for what is not a plain autoencoder, of a tool that has no other."""
    expect_unscaled(formula)
    if formula.transcoder:
        raise ValueError("it has no transcoders")
    if formula.W_skip is not None:
        raise ValueError("it has no skip connection")


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
        few = choices if len(choices) <= MOST_SAID else [*get_close_matches(str(value), choices, MOST_SAID, 0.3), "..."]
        raise ValueError(f"{name} is {shown(value)}; read are {', '.join(few)}")
    return value


def noted(of: dict[str, Any], name: str) -> str | None:
    """A text that may be missing."""
    return None if of.get(name) is None else text(of, name)
