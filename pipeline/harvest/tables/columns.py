"""Columns of numbers: .parquet, .csv, .tsv."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae.cache.errors import SaeError

from .base import Table, listed

LINES = 8192  # of text in a block


class Parquet(Table):
    """Columns of numbers, or one column of lists as long as each other."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow.parquet

        super().__init__(path)
        self._file = pyarrow.parquet.ParquetFile(path)
        types = {one.name: one.type for one in self._file.schema_arrow}
        if unknown := [name for name in columns if name not in types]:
            raise SaeError(f"{self.where}: has no column {unknown[0]!r}; there is {listed(types)}")
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
                "lists) with `harvest.columns = [a, b]`"
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
            raise SaeError(f"{self.where}: has no column {unknown[0]!r}; there is {listed(self._names)}")
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
            said, stop = str(error).partition("\n")[0], min(first + LINES, self.n)
            raise SaeError(
                f"{self.where}: rows {first:,} to {stop:,}: {said}; name the columns of numbers with "
                "`harvest.columns = [a, b]`, or mend the line"
            ) from error
        return np.stack([found.column(name).to_numpy() for name in self._columns], axis=1)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
