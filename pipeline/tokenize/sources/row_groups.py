"""Parquet files of the hub, row group by row group: only the text column, some groups ahead, in the files' order.

A place is a file and a row in it, so what continues there begins with the row group that holds the row. Reading ahead
is bounded by groups and bytes, whoever encodes the text.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sae.cache.errors import SaeError
from sae.pipeline.runtime.network import Refused, ask
from sae.pipeline.tokenize.sources.base import Document
from sae.pipeline.tokenize.sources.opened import File
from sae.pipeline.tokenize.sources.tables import column_path, documents_in

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

AHEAD_GROUPS = 4  # read side by side
AHEAD_BYTES = 1 << 26  # of text that waits; one group is read in any case
Answer = TypeVar("Answer")


class Shard(NamedTuple):
    """One parquet file: `url` is for fsspec, `file` names it in messages."""

    url: str
    file: File


class Group(NamedTuple):
    """A row group that is being read."""

    shard: int
    first: int  # its first row in the file
    bytes: int
    rows: Future[Any]  # a table


class RowGroupStream:
    """`state()` is the file, the row in it, and how many documents came before."""

    def __init__(self, repo: str, column: str, urls: list[str], state: dict[str, Any] | None) -> None:
        from huggingface_hub import HfFileSystem

        self._repo, self._column = repo, column
        inside = [url.partition("@")[2].partition("/")[2] for url in urls]
        self._shards = [Shard(url, File(f"{repo}/{name}", Path(name))) for url, name in zip(urls, inside, strict=True)]
        self._state = {"file": 0, "row": 0, "documents": 0} if state is None else dict(state)
        self._files = HfFileSystem()
        self._pool = ThreadPoolExecutor(AHEAD_GROUPS)
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._footers: dict[int, Future[pyarrow.parquet.FileMetaData]] = {}
        self._paths: dict[int, list[str]] = {}
        self._documents = self._all(int(self._state["file"]), int(self._state["row"]))

    def __iter__(self) -> RowGroupStream:
        return self

    def __next__(self) -> Document:
        for shard, row, document in self._documents:
            self._state |= {"file": shard, "row": row}
            if len(document):
                self._state["documents"] += 1
                return document
        if not self._state["documents"]:
            raise SaeError(f"source = {self._repo}: holds no text")
        raise StopIteration

    def state(self) -> dict[str, Any]:
        return dict(self._state)

    def _all(self, shard: int, row: int) -> Iterator[tuple[int, int, Document]]:
        """(file, row behind it, document) from row `row` of a file on."""
        planned = self._groups(shard, row)
        waiting: deque[Group] = deque()
        while True:
            while len(waiting) < AHEAD_GROUPS and (not waiting or sum(group.bytes for group in waiting) < AHEAD_BYTES):
                if (group := next(planned, None)) is None:
                    break
                waiting.append(group)
            if not waiting:
                return
            group = waiting.popleft()
            batches = self._read(group.rows).to_batches()
            place = row if group.shard == shard else 0
            file, path = self._shards[group.shard].file, self._path(group.shard)
            for document, after in documents_in(file, batches, group.first, place, path):
                yield group.shard, after, document

    def _groups(self, shard: int, row: int) -> Iterator[Group]:
        """Row groups from the one that holds a row on, each under way when it is given."""
        for number in range(shard, len(self._shards)):
            found = self._footer(number)
            if found.exception() is not None:
                yield Group(number, 0, 0, found)  # raised in its turn, behind the documents before
                return
            footer = found.result()
            if number + 1 < len(self._shards):
                self._footer(number + 1)  # while this file is read
            self._footers.pop(number - 1, None)
            name, first = ".".join(self._path(number)), 0
            for group in range(footer.num_row_groups):
                rows = footer.row_group(group).num_rows
                if number > shard or first + rows > row:
                    read = self._pool.submit(self._asked, self._group, number, footer, group, name)
                    yield Group(number, first, _size(footer.row_group(group), name), read)
                first += rows

    def _path(self, shard: int) -> list[str]:
        if shard not in self._paths:
            schema = self._read(self._footer(shard)).schema.to_arrow_schema()
            self._paths[shard] = column_path(self._shards[shard].file, schema, self._column)
        return self._paths[shard]

    def _footer(self, shard: int) -> Future[pyarrow.parquet.FileMetaData]:
        if shard not in self._footers:
            self._footers[shard] = self._pool.submit(self._asked, self._metadata, shard)
        return self._footers[shard]

    def _metadata(self, shard: int) -> pyarrow.parquet.FileMetaData:
        import pyarrow.parquet

        with self._files.open(self._shards[shard].url, cache_type="none") as raw:
            return pyarrow.parquet.read_metadata(raw)

    def _group(self, shard: int, footer: pyarrow.parquet.FileMetaData, group: int, name: str) -> pyarrow.Table:
        import pyarrow.parquet

        with self._files.open(self._shards[shard].url, cache_type="none") as raw:
            table = pyarrow.parquet.ParquetFile(raw, metadata=footer, pre_buffer=True)
            return table.read_row_group(group, columns=[name])

    def _asked(self, call: Callable[..., Answer], *args: Any) -> Answer:
        return ask(self._repo, lambda: call(*args), "dataset")

    def _read(self, answer: Future[Answer]) -> Answer:
        try:
            return answer.result()
        except Refused as error:
            raise SaeError(
                f"source = {self._repo}: stopped after {self._state['documents']} documents ({error}); "
                "repeat the command to continue from there"
            ) from error


def _size(group: pyarrow.parquet.RowGroupMetaData, name: str) -> int:
    """Bytes of a column in a row group, uncompressed."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(one.total_uncompressed_size for one in columns if f"{one.path_in_schema}.".startswith(f"{name}."))
