"""How one local file becomes documents: parquet, JSON lines, JSON and plain text, compressed or not.

A reader yields (text, place): the place is where the next document begins, and reading from there gives the rest. It
counts bytes of the decompressed file for text and lines, rows for parquet, elements for a JSON array. Memory holds a
document (or a batch of rows), not a file.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from cache.errors import SaeError
from pipeline.sources.base import checked_text, missing_column

SEPARATOR = b"<|endoftext|>"
LONG_TEXT = 1 << 16  # a text without separators above this many bytes is cut at blank lines,
LEAST_PIECE = 1000  # into documents of at least this many
COMPRESSED = (".gz", ".zst")
_MARK = b"\xef\xbb\xbf"  # the byte-order mark some editors put first; not text
_READ = 1 << 20
_NOT_UTF8 = "convert it, e.g. iconv -f latin1 -t utf-8"


class File(NamedTuple):
    """One file: `name` is what the recipe and the messages call it (relative to the folder that was given)."""

    name: str
    path: Path

    @property
    def kind(self) -> str | None:
        """The suffix that decides how it is read, or None for a file that is not text as we know it."""
        name = self.path.name.lower()
        if not name.endswith(".parquet"):
            for suffix in COMPRESSED:
                name = name.removesuffix(suffix)
            if name.endswith(".parquet"):
                return None
        kind = Path(name).suffix
        return kind if kind in READERS else None

    def open(self) -> BinaryIO:
        """Its bytes, decompressed."""
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            import gzip

            return cast(BinaryIO, gzip.open(self.path))
        if suffix == ".zst":
            return cast(BinaryIO, io.BufferedReader(_Zstandard(self.path), _READ))
        return self.path.open("rb")

    def error(self, what: str) -> SaeError:
        return SaeError(f"--source {self.name}: {what}")

    def decode(self, raw: bytes, start: int) -> str:
        """UTF-8; `start` is the place of `raw` in the file, for the message."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {raw[error.start]:#04x} at offset {start + error.start}"
            raise self.error(f"not UTF-8 text ({where}); {_NOT_UTF8}") from error


class _Zstandard(io.RawIOBase):
    """The bytes of a .zst file of any number of frames.

    The library's own readers end a truncated file early, and by default one of several frames after the first, without
    a word; here the former is an EOFError and the latter is read to its end.
    """

    def __init__(self, path: Path) -> None:
        import zstandard

        # Windows of 2 GiB are what `zstd --long=31` writes.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 14)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed data ends in the middle")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        target = memoryview(buffer).cast("B")
        n = min(len(target), len(self._output))
        target[:n], self._output = self._output[:n], self._output[n:]
        return n


def read(file: File, place: int, column: str) -> Iterator[tuple[str, int]]:
    """(text, place of the next document) from `place` on; null and empty records give an empty text.

    Raises SaeError, in one line, for bytes that are damaged or not what the file's name says.
    """
    import pyarrow
    import zstandard

    assert file.kind is not None
    try:
        yield from READERS[file.kind](file, place, column)
    except (EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        raise file.error(f"damaged, or not what its name says: {_first_line(error)}") from error
    except OSError as error:
        raise file.error(f"cannot be read: {error.strerror or _first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _lines(raw: BinaryIO, place: int) -> Iterator[tuple[bytes, int, int]]:
    """(line with its end, its start, the next one's start), from `place` on."""
    left = place
    if raw.seekable():
        raw.seek(place)
    else:
        while left and (skipped := len(raw.read(min(left, _READ)))):
            left -= skipped
    for line in raw:
        start, place = place, place + len(line)
        yield (line.removeprefix(_MARK) if start == 0 else line), start, place


def _plain(file: File, place: int, column: str) -> Iterator[tuple[str, int]]:
    """Documents between separator lines; without any, a short file is one, and a long one is cut at blank lines."""
    separated, size = _survey(file)
    cut = not separated and size > LONG_TEXT
    begin, held = place, 0
    parts: list[bytes] = []
    with file.open() as raw:
        for line, _, stop in _lines(raw, place):
            bare = line.rstrip(b"\r\n")
            ends = bare == SEPARATOR or (cut and not bare.strip() and held >= LEAST_PIECE)
            if not ends:
                parts.append(line)
                held += len(line)
                continue
            yield _piece(file, parts, begin), stop
            begin, held, parts = stop, 0, []
    if parts:
        text = _piece(file, parts, begin) if separated or cut else file.decode(b"".join(parts), begin)
        yield text, begin + sum(map(len, parts))


def _survey(file: File) -> tuple[bool, int]:
    """Whether a text has separator lines, and its bytes."""
    separated, size = False, 0
    with file.open() as raw:
        for line, _, stop in _lines(raw, 0):
            separated, size = separated or line.rstrip(b"\r\n") == SEPARATOR, stop
    return separated, size


def _piece(file: File, parts: list[bytes], begin: int) -> str:
    """A document between separators: the end of its last line belongs to the separator."""
    return file.decode(b"".join(parts), begin).removesuffix("\n").removesuffix("\r")


def _json_lines(file: File, place: int, column: str) -> Iterator[tuple[str, int]]:
    with file.open() as raw:
        for line, start, stop in _lines(raw, place):
            if not line.strip():
                continue
            try:
                record = json.loads(file.decode(line, start))
            except json.JSONDecodeError as error:
                raise file.error(f"not JSON in the line at offset {start}: {error.msg}") from error
            yield _text(file, record, column), stop


def _json(file: File, place: int, column: str) -> Iterator[tuple[str, int]]:
    """An array of records, JSON lines under another name, or one object over several lines."""
    with file.open() as raw:
        head = raw.read(4096).removeprefix(_MARK).lstrip()
        # A line has no bound where it may be a whole array.
        first = b"" if head.startswith(b"[") else (head + raw.readline()).split(b"\n")[0]
    if head.startswith(b"["):
        yield from _array(file, place, column)
        return
    try:
        json.loads(first.decode("utf-8", "replace"))
    except json.JSONDecodeError:
        if place == 0:
            with file.open() as raw:
                whole = file.decode(raw.read().removeprefix(_MARK), 0)
            try:
                yield _text(file, json.loads(whole), column), 1
            except json.JSONDecodeError as error:
                raise file.error(f"not JSON at line {error.lineno}: {error.msg}") from error
        return
    yield from _json_lines(file, place, column)


def _array(file: File, place: int, column: str) -> Iterator[tuple[str, int]]:
    """Elements from number `place` on, parsed one at a time from a buffer that grows only for a long one."""
    decoder, between = json.JSONDecoder(), re.compile(r"[ \t\r\n,]*")
    try:
        with io.TextIOWrapper(file.open(), "utf-8-sig", newline="") as raw:
            buffer, element = raw.read(_READ), 0
            at = buffer.index("[") + 1
            while True:
                at = _end(between, buffer, at)
                if buffer.startswith("]", at):
                    return
                try:
                    record, at = decoder.raw_decode(buffer, at)
                except json.JSONDecodeError as error:
                    # Either the element goes on beyond the buffer, or this is not JSON: then the place tells.
                    cut_off = error.msg.startswith("Unterminated") or error.pos > len(buffer) - 16
                    more = raw.read(max(_READ, len(buffer) - at)) if cut_off else ""
                    if not more:
                        raise file.error(f"not JSON in element {element} of its array: {error.msg}") from error
                    buffer, at = buffer[at:] + more, 0
                    continue
                element += 1
                if element > place:
                    yield _text(file, record, column), element
    except UnicodeDecodeError as error:
        raise file.error(f"not UTF-8 text; {_NOT_UTF8}") from error


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None  # it matches the empty string
    return match.end()


def _text(file: File, record: Any, column: str) -> str:
    """The text of a JSON record."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise file.error(f"holds a JSON {type(record).__name__} where a record or a string was expected")
    if column not in record:
        raise missing_column(file.name, column, list(record))
    return checked_text(file.name, column, record[column])


def _parquet(file: File, place: int, column: str) -> Iterator[tuple[str, int]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as parquet:
        names = parquet.schema_arrow.names
        if column not in names:
            raise missing_column(file.name, column, names)
        row = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if row + rows <= place:
                row += rows
                continue
            for batch in parquet.iter_batches(256, row_groups=[group], columns=[column]):
                texts = batch.column(0)[max(0, place - row) :].to_pylist()
                row += len(batch)
                for number, value in enumerate(texts, row - len(texts) + 1):
                    yield checked_text(file.name, column, value), number


Reader = Callable[[File, int, str], Iterator[tuple[str, int]]]
READERS: dict[str, Reader] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".txt": _plain,
}
