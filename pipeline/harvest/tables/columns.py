"""Columns of numbers: .parquet, .arrow, .feather, .csv, .tsv."""

import io
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sae.cache.errors import SaeError

from .base import Choice, Table

LINES = 8192  # of text in a block


class Columns(Table):
    """Columns of numbers, or one column of lists as long as each other, in batches of Arrow's."""

    def choose(self, schema: Any, columns: Choice) -> None:
        """Take up which columns are meant. Raises SaeError where they are not there, or no numbers."""
        import pyarrow

        types = {one.name: one.type for one in schema}
        self._columns = columns.among(types, self.where)
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

    def measure(self, sizes: Sequence[int]) -> None:
        """Take up the rows of each part, and how wide they are."""
        self._starts = np.cumsum([0, *sizes])
        self.d, self.n = len(self._columns), int(self._starts[-1])
        if self._nested and self.n:
            first = next(batch for batch in self.batches(0, 1) if len(batch))
            self.d = len(first.column(self._columns[0])[0].as_py() or ())
        self.expect_rows((self.n, self.d))

    @property
    def names(self) -> list[str]:
        return super().names if self._nested else self._columns

    @abstractmethod
    def batches(self, part: int, step: int) -> Iterator[Any]:
        """Record batches of up to `step` rows, from the first row of a part on."""

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        part = int(np.searchsorted(self._starts, start, "right")) - 1
        first = int(self._starts[part])
        for batch in self.batches(part, self.step(8)):
            if first + len(batch) > start:
                yield first, self._matrix(batch, first)
            first += len(batch)

    def _matrix(self, batch: Any, first: int) -> np.ndarray:
        columns = [batch.column(name) for name in self._columns]
        if not self._nested:
            return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], axis=1)
        (lists,) = columns
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


class Parquet(Columns):
    """A Parquet file, whose parts are its row groups."""

    def __init__(self, path: Path, columns: Choice) -> None:
        import pyarrow.parquet

        super().__init__(path)
        self._file = pyarrow.parquet.ParquetFile(path)
        self.choose(self._file.schema_arrow, columns)
        self.measure([self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)])

    def batches(self, part: int, step: int) -> Iterator[Any]:
        groups = range(part, self._file.num_row_groups)
        return self._file.iter_batches(step, row_groups=groups, columns=self._columns)


class Arrow(Columns):
    """Arrow's record batches, as a file (Feather, too) or as a stream, mapped into memory and not read at once."""

    def __init__(self, path: Path, columns: Choice) -> None:
        super().__init__(path)
        with self._opened() as reader:
            self.choose(reader.schema, columns)
        self.measure([len(batch) for batch in self._every(0)])

    def batches(self, part: int, step: int) -> Iterator[Any]:
        for batch in self._every(part):
            for low in range(0, len(batch), step):
                yield batch.slice(low, step)

    def _every(self, part: int) -> Iterator[Any]:
        """The record batches from one on, as they are in the file."""
        with self._opened() as reader:
            if hasattr(reader, "num_record_batches"):
                yield from map(reader.get_batch, range(part, reader.num_record_batches))
            else:
                yield from islice(reader, part, None)

    def _opened(self) -> Any:
        import pyarrow
        from pyarrow import ipc

        mapped = pyarrow.memory_map(str(self.path))
        if mapped.read(6) == b"ARROW1":
            return ipc.open_file(mapped)
        mapped.seek(0)
        return ipc.open_stream(mapped)


class Text(Table):
    """Lines of numbers between commas or tabs, with or without a line of names."""

    def __init__(self, path: Path, columns: Choice, separator: str) -> None:
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
        if len(set(self._names)) < len(self._names):
            raise SaeError(f"{self.where}: names a column twice in its first line")
        self._columns = columns.among(self._names, self.where)
        self.expect_rows((count - blank, len(self._columns)))

    @property
    def names(self) -> list[str]:
        return self._columns

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
