"""Arrays [n, d]: .npy, .npz, .safetensors, Zarr."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sae.cache.errors import SaeError

from .base import Choice, Table


class Sliced(Table):
    """An array of which any rows can be read: .npy, .safetensors, Zarr."""

    def take(self, array: Any, step: int) -> None:
        self._array, self._step = array, step

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray | Tensor]]:
        for first in range(start - start % self._step, self.n, self._step):
            yield first, self._array[first : min(first + self._step, self.n)]


def npy(path: Path, array: str | None, columns: Choice) -> Table:
    table = Sliced(path)
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    table.expect_numbers(found.dtype)
    table.expect_rows(found.shape)
    table.take(found, table.step(found.itemsize))
    return table


def safetensors(path: Path, array: str | None, columns: Choice) -> Table:
    from safetensors import safe_open

    table = Sliced(path)
    file = safe_open(path, framework="pt")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    name = table.chosen(array, {name: one.get_shape() for name, one in slices.items()})
    if (kind := slices[name].get_dtype())[0] not in "FIUB" or kind == "BOOL":
        raise SaeError(f"{table.where}: {name} holds {kind}; rows are of real numbers")
    table.expect_rows(slices[name].get_shape(), f"{name} ")
    table.take(slices[name], table.step(4))
    return table


def zarr_array(path: Path, array: str | None, columns: Choice) -> Table:
    import zarr

    table = Sliced(path)
    found: Any = zarr.open(path, mode="r")
    what = ""
    if isinstance(found, zarr.Group):
        arrays = dict(found.arrays())
        name = table.chosen(array, {name: one.shape for name, one in arrays.items()})
        found, what = arrays[name], f"{name} "
    table.expect_rows(found.shape, what)
    table.expect_numbers(np.dtype(found.dtype), what)
    whole = found.chunks[0]
    step = max(whole, table.step(found.dtype.itemsize) // whole * whole)  # each chunk is decoded once
    table.take(found, step)
    return table


class Npz(Table):
    """An array of an .npz, read as a stream, compressed or not."""

    def __init__(self, path: Path, array: str | None) -> None:
        super().__init__(path)
        with zipfile.ZipFile(path) as file:
            names = [name for name in file.namelist() if name.endswith(".npy")]
            heads = {name.removesuffix(".npy"): self._head(file, name) for name in names}
        self._name = self.chosen(array, {name: head[0] for name, head in heads.items()})
        shape, fortran, self._dtype, self._offset = heads[self._name]
        self.expect_numbers(self._dtype, f"{self._name} ")
        self.expect_rows(shape, f"{self._name} ")
        if fortran:
            raise SaeError(f"{self.where}: {self._name} lies column by column; save np.ascontiguousarray of it")

    def _head(self, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
        from numpy.lib import format as layout

        with archive.open(name) as file:
            version = layout.read_magic(file)
            read = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
            return (*read(file), file.tell())

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        size, step = self._width * self._dtype.itemsize, self.step(self._dtype.itemsize)
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self._name}.npy") as file:
            file.seek(self._offset + start * size)
            for first in range(start, self.n, step):
                data = file.read(size * min(step, self.n - first))
                yield first, np.frombuffer(data, self._dtype).reshape(-1, self._width)
