"""Rows that a program yields part by part, written to a file first: what names a store is the digest of all of them."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as layout
from torch import Tensor

from sae.cache.disk.parsing import is_plain_name
from sae.cache.errors import SaeError


@contextmanager
def spooled(parts: Iterable[Any], called: str) -> Iterator[Path]:
    """An .npy file of float32 [n, d] with rows that come as parts [n_i, d], gone when this ends.

    It lies where Python keeps temporary files (TMPDIR); one part is in memory at a time. Raises SaeError for what are
    no rows, and where there are none.
    """
    if not is_plain_name(called):
        raise SaeError(f"name = {called!r}: is not the name of a file; take letters, digits, dots, - and _")
    with tempfile.TemporaryDirectory(prefix="sae-rows-") as folder:
        path = Path(folder) / f"{called}.npy"
        n, d = 0, 0
        with path.open("wb") as file:
            for number, part in enumerate(parts):
                rows = as_rows(part, f"part {number} of rows")
                if not n:
                    d = rows.shape[1]
                    _head(file, 0, d)
                if rows.shape[1] != d:
                    raise SaeError(f"part {number} of rows: is {rows.shape[1]} wide, those before it are {d}")
                file.write(rows.numpy().astype("<f4", copy=False).data)
                n += len(rows)
            if not n:
                raise SaeError("rows: there are none; what yields them has ended already, or was empty")
            file.seek(0)
            _head(file, n, d)
        yield path


def as_rows(values: Any, what: str) -> Tensor:
    """float32 [n, d] of a tensor or an array, on the CPU. Raises SaeError, naming `what`, for what are no such."""
    if not isinstance(values, Tensor):
        try:
            table = np.asarray(values)
        except ValueError as error:
            raise SaeError(f"{what}: is not a table of numbers ({error}); give a tensor or an array [n, d]") from error
        if table.dtype.kind not in "biuf":
            raise SaeError(f"{what}: holds {table.dtype}, which are not numbers; give a tensor or an array [n, d]")
        with np.errstate(over="ignore"):  # found below
            values = torch.from_numpy(table.astype(np.float32))
    if values.dim() != 2 or not values.numel() or values.is_complex():
        raise SaeError(f"{what}: has the shape {list(values.shape)} of {values.dtype}; give numbers [n, d]")
    rows = values.detach().to("cpu", torch.float32).contiguous()
    if not rows.isfinite().all():
        raise SaeError(f"{what}: holds NaN or infinity (in float32); leave such rows out")
    return rows


def _head(file: Any, n: int, d: int) -> None:
    """A header, which has room for a number of rows to grow into."""
    layout.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (n, d)})
