"""Files of numbers, read as rows [n, d] of float32 from any place on, without holding them.

Each kind is a class: `n` and `d` from the file's head, and `blocks(start)`, which goes through the rows from one on.
"""

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.cache.errors import SaeError

BYTES = 1 << 22  # of a block, about
LINES = 8192  # of text in a block
LISTED = 20  # names in a message


class Table(ABC):
    """Rows [n, d] of a file. `where` is how messages call it."""

    n: int
    d: int

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, f"--table {path}"
        self._blocks: Iterator[tuple[int, np.ndarray | Tensor]] = iter(())
        self._first, self._block = 0, torch.empty(0, 0)

    @abstractmethod
    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray | Tensor]]:
        """Blocks of whole rows, each with the number of its first: the first block holds row `start`."""

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, d]; goes on where the last call ended, if it can. SaeError for what is no number."""
        parts = []
        while start < stop:
            if not self._first <= start < self._first + len(self._block):
                self._seek(start)
            part = self._block[start - self._first : stop - self._first]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _seek(self, row: int) -> None:
        """Make the block that holds a row the present one."""
        behind = self._first + len(self._block)
        if row != behind or not len(self._block):
            self._blocks = self.blocks(row)
        with readable(self.path):
            found = next(self._blocks, None)
        if found is None:
            raise SaeError(f"{self.where}: ends at row {row:,}, before the {self.n:,} rows that it says it has")
        self._first, self._block = found[0], self._as_rows(*found)
        assert self._first <= row < self._first + len(self._block), (row, self._first, len(self._block))

    def _as_rows(self, first: int, block: np.ndarray | Tensor) -> Tensor:
        if isinstance(block, Tensor):
            rows = block.float()
        else:
            with np.errstate(over="ignore"):  # found below
                rows = torch.from_numpy(np.array(block, dtype=np.float32, order="C"))
        bad = ~rows.isfinite().all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            column = int((~rows[row].isfinite()).nonzero()[0])
            raise SaeError(
                f"{self.where}: row {first + row:,} has {float(block[row, column]):g} in column {column}; rows are "
                "finite numbers of float32, so leave it out or fill it in"
            )
        return rows

    def expect_rows(self, shape: Sequence[int], what: str = "") -> None:
        """Take up the shape of an array. Raises SaeError unless it is one of rows."""
        if len(shape) != 2:
            raise SaeError(f"{self.where}: {what}has shape {list(shape)}; rows are [n, d], so reshape it")
        self.n, self.d = int(shape[0]), int(shape[1])
        if not self.n or not self.d:
            raise SaeError(f"{self.where}: {what}has shape {list(shape)}, so no rows")

    def expect_numbers(self, dtype: np.dtype[Any], what: str = "") -> None:
        if dtype.kind not in "iuf":
            raise SaeError(f"{self.where}: {what}holds {dtype}; rows are of real numbers")

    def chosen(self, name: str | None, shapes: dict[str, Sequence[int]]) -> str:
        """The array of a file of several: the one named, or the only one of rows."""
        there = _listed(f"{one} {list(shape)}" for one, shape in shapes.items())
        if name is not None:
            if name not in shapes:
                raise SaeError(f"{self.where}: has no array {name!r}; there is {there}")
            return name
        fitting = [one for one, shape in shapes.items() if len(shape) == 2]
        if len(fitting) != 1:
            problem = "several arrays" if fitting else "no array"
            raise SaeError(
                f"{self.where}: has {problem} of shape [n, d] ({there}); name one with --set harvest.array=NAME"
            )
        return fitting[0]

    def step(self, itemsize: int) -> int:
        """Rows of a block."""
        return max(1, BYTES // (self.d * itemsize))


class Sliced(Table):
    """An array of which any rows can be read: .npy, .safetensors, Zarr."""

    def take(self, array: Any, step: int) -> None:
        self._array, self._step = array, step

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray | Tensor]]:
        for first in range(start - start % self._step, self.n, self._step):
            yield first, self._array[first : min(first + self._step, self.n)]


def npy(path: Path, array: str | None, columns: Sequence[str]) -> Table:
    table = Sliced(path)
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    table.expect_numbers(found.dtype)
    table.expect_rows(found.shape)
    table.take(found, table.step(found.itemsize))
    return table


def safetensors(path: Path, array: str | None, columns: Sequence[str]) -> Table:
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


def zarr_array(path: Path, array: str | None, columns: Sequence[str]) -> Table:
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
        size, step = self.d * self._dtype.itemsize, self.step(self._dtype.itemsize)
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{self._name}.npy") as file:
            file.seek(self._offset + start * size)
            for first in range(start, self.n, step):
                data = file.read(size * min(step, self.n - first))
                yield first, np.frombuffer(data, self._dtype).reshape(-1, self.d)


class Parquet(Table):
    """Columns of numbers, or one column of lists as long as each other."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow.parquet

        super().__init__(path)
        self._file = pyarrow.parquet.ParquetFile(path)
        types = {one.name: one.type for one in self._file.schema_arrow}
        if unknown := [name for name in columns if name not in types]:
            raise SaeError(f"{self.where}: has no column {unknown[0]!r}; there is {_listed(types)}")
        self._columns = list(columns or types)
        kinds = pyarrow.types
        others = [
            name for name in self._columns if not (kinds.is_integer(types[name]) or kinds.is_floating(types[name]))
        ]
        lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
        self._nested = len(self._columns) == 1 and any(is_one(types[self._columns[0]]) for is_one in lists)
        if others and not self._nested:
            raise SaeError(
                f"{self.where}: column {others[0]!r} holds {types[others[0]]}; name the columns of numbers (or one of "
                'lists) with --set "harvest.columns=[a, b]"'
            )
        rows = self._file.metadata.num_rows
        self.d, self.n = len(self._columns), rows
        if self._nested and rows:
            first = next(self._file.iter_batches(1, columns=self._columns)).column(0)[0].as_py()
            self.d = len(first or ())
        self.expect_rows((rows, self.d))
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        group = int(np.searchsorted(self._starts, start, "right")) - 1
        first = int(self._starts[group])
        groups = range(group, self._file.num_row_groups)
        for batch in self._file.iter_batches(self.step(8), row_groups=groups, columns=self._columns):
            if first + len(batch) > start:
                yield first, self._matrix(batch, first)
            first += len(batch)

    def _matrix(self, batch: Any, first: int) -> np.ndarray:
        if not self._nested:
            return np.stack([batch.column(name).to_numpy(zero_copy_only=False) for name in self._columns], axis=1)
        lists = batch.column(0)
        lengths = np.asarray(lists.value_lengths().fill_null(0))
        if (wrong := np.flatnonzero(lengths != self.d)).size:
            row = int(wrong[0])
            raise SaeError(
                f"{self.where}: row {first + row:,} has {lengths[row]} values where the first has {self.d}; rows are "
                "as long as each other"
            )
        values = lists.flatten()
        numbers = values.to_numpy(zero_copy_only=False)
        self.expect_numbers(numbers.dtype, f"{self._columns[0]} ")
        return numbers.reshape(-1, self.d)


class Text(Table):
    """Lines of numbers between commas or tabs, with or without a line of names."""

    def __init__(self, path: Path, columns: Sequence[str], separator: str) -> None:
        super().__init__(path)
        self._separator = separator
        with path.open("rb") as file:
            first = file.readline()
            names = [one.strip(' "\r\n') for one in first.decode("utf-8-sig", "replace").split(separator)]
            headed = not all(map(_is_number, names))
            self._names = names if headed else [str(i) for i in range(len(names))]
            self._offsets, count, blank = [len(first) if headed else 0], 0, 0
            file.seek(self._offsets[0])
            while line := file.readline():
                blank = 0 if line.strip() else blank + 1
                count += 1
                if count % LINES == 0:
                    self._offsets.append(file.tell())
        if not headed and columns:
            raise SaeError(f"{self.where}: has no names in its first line; leave harvest.columns out")
        if unknown := [name for name in columns if name not in self._names]:
            raise SaeError(f"{self.where}: has no column {unknown[0]!r}; there is {_listed(self._names)}")
        if len(set(self._names)) < len(self._names):
            raise SaeError(f"{self.where}: names a column twice in its first line")
        self._columns = list(columns or self._names)
        self.expect_rows((count - blank, len(self._columns)))

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        block = start // LINES
        with self.path.open("rb") as file:
            file.seek(self._offsets[block])
            for first in range(block * LINES, self.n, LINES):
                yield first, self._parsed(b"".join(file.readline() for _ in range(min(LINES, self.n - first))), first)

    def _parsed(self, data: bytes, first: int) -> np.ndarray:
        import io

        import pyarrow
        from pyarrow import csv

        try:
            found = csv.read_csv(
                io.BytesIO(data),
                csv.ReadOptions(column_names=self._names, use_threads=False, block_size=len(data) + 1),
                csv.ParseOptions(delimiter=self._separator, ignore_empty_lines=False),
                csv.ConvertOptions(
                    column_types=dict.fromkeys(self._columns, pyarrow.float64()), include_columns=self._columns
                ),
            )
        except pyarrow.ArrowInvalid as error:
            raise SaeError(
                f"{self.where}: rows {first:,} to {min(first + LINES, self.n):,}: {str(error).partition(chr(10))[0]}; name the "
                'columns of numbers with --set "harvest.columns=[a, b]", or mend the line'
            ) from error
        return np.stack([found.column(name).to_numpy() for name in self._columns], axis=1)


Open = Callable[[Path, str | None, Sequence[str]], Table]
KINDS: dict[str, Open] = {
    ".npy": npy,
    ".npz": lambda path, array, columns: Npz(path, array),
    ".safetensors": safetensors,
    ".parquet": lambda path, array, columns: Parquet(path, columns),
    ".csv": lambda path, array, columns: Text(path, columns, ","),
    ".tsv": lambda path, array, columns: Text(path, columns, "\t"),
    ".zarr": zarr_array,
}


def opened(path: Path, array: str | None, columns: Sequence[str]) -> Table:
    """The table in a file, or in the folder of a Zarr array. Raises SaeError where it is none."""
    where = f"--table {path}"
    is_zarr = path.is_dir() and any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))
    if not path.exists():
        raise SaeError(f"{where}: no such file")
    kind = ".zarr" if is_zarr else path.suffix.lower()
    if kind not in KINDS or (path.is_dir() != is_zarr) or not (is_zarr or path.is_file()):
        raise SaeError(f"{where}: is no table; give one of {', '.join(KINDS)} (of other formats, numpy.save makes one)")
    if array is not None and kind not in (".npz", ".safetensors", ".zarr"):
        raise SaeError(f"harvest.array = {array}: a {kind} file has one table; leave it out")
    if columns and kind not in (".parquet", ".csv", ".tsv"):
        raise SaeError(f"harvest.columns = {list(columns)}: a {kind} file has no names of columns; leave them out")
    with readable(path):
        return KINDS[kind](path, array, columns)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the libraries say of a damaged file into one line."""
    from safetensors import SafetensorError

    damage = (OSError, ValueError, KeyError, EOFError, OverflowError, NotImplementedError, zlib.error)
    try:
        yield
    except SaeError:
        raise
    except (*damage, zipfile.BadZipFile, SafetensorError) as error:
        raise SaeError(f"--table {path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return (", ".join(shown[:LISTED]) + (", ..." if len(shown) > LISTED else "")) or "nothing"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
