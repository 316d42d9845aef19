"""Files of tensors (safetensors) that carry a checksum of all they say: values, names, types, shapes and header."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from sae.cache.disk.durable import checksum, expect_file, unreadable, write_in
from sae.cache.errors import DamagedStore, NotFound

if TYPE_CHECKING:  # listing runs needs no torch, and its import takes seconds
    from torch import Tensor

CRC = "crc32c"


def write_tensors(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    header: dict[str, str] | None = None,
    *,
    extra_file: bytes = b"",
) -> None:
    """Write a file of a run atomically, with texts in its header beside the tensors.

    `extra_file` is the content of another file, which the checksum covers as well. (The library writes several texts
    of a header in any order, so a file whose bytes are to follow from its content has the checksum alone.)
    """
    import safetensors.torch

    said = dict(header or {})
    flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_in(folder, name, safetensors.torch.save(flat, metadata={**said, CRC: _checksum(flat, said, extra_file)}))


def read_tensors(
    path: Path, *, sealed: bool = True, extra_file: bytes = b""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file; with `sealed` false its checksum may be missing, as in files of version 0.1.0.

    Raises NotFound where it is not there, DamagedStore where it is not what was written.
    """
    header = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedStore(f"{path}: is not the file that was written ({error})") from error
    except OSError as error:
        raise unreadable(error, path) from error
    if (sealed or CRC in header) and header.get(CRC) != _checksum(tensors, header, extra_file):
        raise DamagedStore(f"{path}: damaged (its checksum differs)")
    return tensors, header


def read_header(path: Path) -> dict[str, str]:
    """The texts beside the tensors, which are not read, nor is the checksum checked."""
    expect_file(path)
    try:
        with safe_open(path, "np") as file:
            return file.metadata() or {}
    except FileNotFoundError as error:
        raise NotFound(f"{path}: not there") from error
    except SafetensorError as error:
        raise DamagedStore(f"{path}: is not the file that was written ({error})") from error
    except OSError as error:
        raise unreadable(error, path) from error


def _checksum(tensors: dict[str, Tensor], header: dict[str, str], extra_file: bytes) -> str:
    """crc32c over every tensor's name, type, shape and bytes, the texts of the header, and the file beside it."""
    import torch

    parts = [header.get("state", "")]  # all that a header said in version 0.1.0
    parts += [f"{name} {header[name]}" for name in sorted(header) if name not in (CRC, "state")]
    parts += [checksum(extra_file)] if extra_file else []
    for name in sorted(tensors):
        tensor = tensors[name]
        data = tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b""  # strides of none may be 0
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)} {checksum(data)}")
    return checksum("\n".join(parts).encode())
