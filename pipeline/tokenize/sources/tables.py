"""Files of rows: parquet, arrow, CSV. A place counts rows, or bytes of the decompressed file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from sae.pipeline.tokenize.sources.base import Document, document, missing_column, token_ids
from sae.pipeline.tokenize.sources.lines import lines
from sae.pipeline.tokenize.sources.opened import File

if TYPE_CHECKING:
    import pyarrow

_ROWS = 256  # that are taken out of a batch at a time
_LONGEST_CELL = 1 << 28  # characters; a quotation mark that is never closed would take in the rest of the file


def parquet(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """A row's column, from the row group that holds row `place` on."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        path = column_path(file, table.schema_arrow, column)
        row = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row + rows > place:
                batches = table.iter_batches(_ROWS, row_groups=[group], columns=[".".join(path)])
                yield from documents_in(file, batches, row, place, path)
            row += rows


def arrow(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """A row's column in a file of Arrow's stream form (datasets' `save_to_disk`) or file form."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(file.path)) as raw:
        if raw.read(6) == b"ARROW1":
            table = ipc.open_file(raw)
            batches: Iterable[pyarrow.RecordBatch] = map(table.get_batch, range(table.num_record_batches))
        else:
            raw.seek(0)
            batches = table = ipc.open_stream(raw)
        yield from documents_in(file, batches, 0, place, column_path(file, table.schema, column))


def column_path(file: File, schema: pyarrow.Schema, column: str) -> list[str]:
    """The names that lead to a column, or to a field of a struct. SaeError where there is none, or no text in it."""
    import pyarrow

    path = [column] if column in schema.names else column.split(".")
    kind: Any = pyarrow.struct(schema)
    for name in path:
        found = kind.get_all_field_indices(name) if pyarrow.types.is_struct(kind) else []
        if len(found) > 1:
            raise file.error(f"has {len(found)} columns {name!r}; rename all but one")
        if not found:
            raise missing_column(file.name, column, list(_paths(schema)))
        kind = kind.field(found[0]).type
    if not _is_text(kind) and not _is_ids(kind):
        raise file.error(f"column {column!r} holds {str(kind)[:80]}, neither text nor token ids; name another column")
    return path


def _paths(fields: Iterable[pyarrow.Field], before: str = "") -> Iterator[str]:
    """Every column, and every field of a struct."""
    import pyarrow

    for one in fields:
        if pyarrow.types.is_struct(one.type):
            yield from _paths(one.type, f"{before}{one.name}.")
        else:
            yield before + one.name


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    of = pyarrow.types
    return bool(of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind) or of.is_null(kind))


def _is_ids(kind: pyarrow.DataType) -> bool:
    import pyarrow

    of = pyarrow.types
    listed = of.is_list(kind) or of.is_large_list(kind) or of.is_fixed_size_list(kind)
    return bool(listed and of.is_integer(kind.value_type))


def documents_in(
    file: File, batches: Iterable[pyarrow.RecordBatch], row: int, place: int, path: list[str]
) -> Iterator[tuple[Document, int]]:
    """Rows from number `place` on of batches whose first row is number `row`."""
    import pyarrow.compute

    for batch in batches:
        if row + len(batch) > place:
            column = batch.column(path[0])
            column = pyarrow.compute.struct_field(column, path[1:]) if path[1:] else column
            for start in range(max(0, place - row), len(batch), _ROWS):
                part = column.slice(start, _ROWS)
                yield from (
                    (one, row + start + i) for i, one in enumerate(_documents(file, part, row + start, path), 1)
                )
        row += len(batch)


def _documents(file: File, column: pyarrow.Array, row: int, path: list[str]) -> list[Document]:
    name, where = ".".join(path), f"rows {row} to {row + len(column) - 1}"
    if not _is_ids(column.type):
        try:
            return [document(file.name, name, value, where) for value in column.to_pylist()]
        except UnicodeDecodeError as error:
            raise file.not_utf8(where) from error
    present = column.drop_null()
    ids = present.flatten()
    if ids.null_count:
        raise file.error(f"column {name!r} holds null among its token ids ({where}); name another column")
    ends = np.cumsum([len(one) if one.is_valid else 0 for one in column])
    return [token_ids(file.name, name, one, where) for one in np.split(ids.to_numpy(), ends[:-1])]


def separated(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """A row's field under the column's name in the first row; fields in quotation marks may hold line ends."""
    csv.field_size_limit(_LONGEST_CELL)
    with file.open() as raw:
        header = _Rows(file, raw, 0)
        names = next(header, [])
    if names.count(column) != 1:
        raise missing_column(file.name, column, names) if column not in names else file.error(
            f"has {names.count(column)} columns {column!r}; rename all but one"
        )  # fmt: skip
    at = names.index(column)
    with file.open() as raw:
        rows = _Rows(file, raw, max(place, header.place))
        for row in rows:
            if row and len(row) != len(names):
                raise file.error(
                    f"the row at offset {rows.start} has {len(row)} fields, the first row of the file {len(names)}; "
                    "are fields with line ends or separators in quotation marks?"
                )
            if row:
                yield document(file.name, column, row[at], f"the row at offset {rows.start}"), rows.place


class _Rows(Iterator[list[str]]):
    """Rows of a CSV file from the byte `place` on; `start` and `place` are where the last row begins and ends."""

    def __init__(self, file: File, raw: BinaryIO, place: int) -> None:
        self.file, self.start, self.place = file, place, place
        self._lines = lines(raw, place)
        delimiter = "\t" if ".tsv" in file.path.name.lower() else ","
        self._rows = csv.reader(self._decoded(), delimiter=delimiter, strict=True)

    def _decoded(self) -> Iterator[str]:
        for line, start, stop in self._lines:
            self.place = stop
            yield self.file.decode(line, start)

    def __next__(self) -> list[str]:
        self.start = self.place
        try:
            return next(self._rows)
        except csv.Error as error:
            raise self.file.error(f"not CSV in the row at offset {self.start}: {error}; mend or convert it") from error
