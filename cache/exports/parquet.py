"""Parquet shards: a column `row` of lists of d numbers, `position`, and `token` where asked."""

from __future__ import annotations

import re
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from .base import Export, Part, Writer

GROUP = 16_384  # rows of a row group: what a reader takes at least


class Rows(Writer):
    """A file for a quarter of a gigabyte of rows."""

    made: ClassVar[re.Pattern[str]] = re.compile(r"rows-\d{5}\.parquet")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._shard = 0

    def add(self, part: Part) -> None:
        flat = pa.array(part.rows.numpy().reshape(-1))
        columns = {"row": pa.FixedSizeListArray.from_arrays(flat, self.export.d), "position": pa.array(part.positions)}
        if part.tokens is not None:
            columns["token"] = pa.array(part.tokens)
        path = self.export.folder / f"rows-{self._shard:05}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=GROUP, compression="zstd")
        self._shard += 1
