"""Tensors in archives: PyTorch's `.pt`, of which weights alone are read, and NumPy's `.npz`, of which numbers alone.

Neither reading can run anything that a file says: what is more than tensors in plain containers is refused.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.cache.disk.durable import unreadable, write_in
from sae.cache.errors import SaeError

from .files import expect_fits

MOST_WORDS = 200  # letters of a library's own complaint


def read_pt(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict, by name. Raises SaeError where a file holds, or is, anything else."""
    _expect_unpacked_fits(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of storages of old versions
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise unreadable(error, path) from error
    except Exception as error:
        raise SaeError(
            f"{path}: holds more than weights, or is damaged; nothing else is unpickled ({_first_line(error)})"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise SaeError(f"{path}: holds no tensors by name, but a {type(found).__name__}")
    for name, value in found.items():
        if not _is_plain(value):
            raise SaeError(f"{path}: {name[:40]} is not a plain tensor; a file of weights alone is read")
    return dict(found)


def write_pt(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write what `read_pt` reads."""
    data = io.BytesIO()
    torch.save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, data)
    write_in(folder, name, data.getbuffer())


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a `.npz` file, by name. Raises SaeError where it is none, or holds what is no numbers."""
    _expect_unpacked_fits(path)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in arrays.files}
    except OSError as error:
        raise unreadable(error, path) from error
    except Exception as error:
        raise SaeError(f"{path}: is not an .npz file of numbers ({_first_line(error)})") from error


def _tensor(array: np.ndarray) -> Tensor:
    """An array of any byte order."""
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))


def _expect_unpacked_fits(path: Path) -> None:
    """Raise SaeError where a file, or what it unpacks to, is larger than the memory."""
    expect_fits(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):
        return  # no archive, as torch's files before version 1.6: who reads it says what is wrong
    except OSError as error:
        raise unreadable(error, path) from error
    expect_fits(path, size)


def _is_plain(value: Any) -> bool:
    """Return True if something is a tensor whose numbers are in memory, one after the other."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:MOST_WORDS]
