"""Files of lines: plain text, JSON lines, JSON. A place counts bytes of the decompressed file, or array elements."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from sae.pipeline.tokenize.sources.base import Document, document, field
from sae.pipeline.tokenize.sources.opened import READ, File

SEPARATOR = b"<|endoftext|>"
LONG_TEXT = 1 << 16  # a text without separators above this many bytes is cut at blank lines,
LEAST_PIECE = 1000  # into documents of at least this many
_MARK = b"\xef\xbb\xbf"  # the byte-order mark some editors put first; not text
_MOST_DIGITS = 4000  # Python refuses to read longer numbers


def lines(raw: BinaryIO, place: int) -> Iterator[tuple[bytes, int, int]]:
    """(line with its end, its start, the next one's start), from `place` on."""
    left = place
    if raw.seekable():
        raw.seek(place)
    else:
        while left and (skipped := len(raw.read(min(left, READ)))):
            left -= skipped
    for line in raw:
        start, place = place, place + len(line)
        yield (line.removeprefix(_MARK) if start == 0 else line), start, place


def plain(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """Documents between separator lines; without any, a short file is one, and a long one is cut at blank lines."""
    separated, size = _survey(file)
    cut = not separated and size > LONG_TEXT
    begin, held = place, 0
    parts: list[bytes] = []
    with file.open() as raw:
        for line, _, stop in lines(raw, place):
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
    """Return True if a text has separator lines, and its bytes."""
    separated, size = False, 0
    with file.open() as raw:
        for line, _, stop in lines(raw, 0):
            separated, size = separated or line.rstrip(b"\r\n") == SEPARATOR, stop
    return separated, size


def _piece(file: File, parts: list[bytes], begin: int) -> str:
    """A document between separators: the end of its last line belongs to the separator."""
    return file.decode(b"".join(parts), begin).removesuffix("\n").removesuffix("\r")


def json_lines(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """A record or a string a line."""
    with file.open() as raw:
        for line, start, stop in lines(raw, place):
            if not line.strip():
                continue
            where = f"the line at offset {start}"
            yield _document(file, _parsed(file, file.decode(line, start), where), column, where), stop


def json_texts(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """An array of records, JSON lines under another name, or one object over several lines."""
    with file.open() as raw:
        head = raw.read(4096).removeprefix(_MARK).lstrip()
        # A line has no bound where it may be a whole array.
        first = b"" if head.startswith(b"[") else (head + raw.readline()).split(b"\n")[0]
    if head.startswith(b"["):
        yield from _array(file, place, column)
        return
    try:
        _loads(first.decode("utf-8", "replace"))
    except json.JSONDecodeError:
        if place == 0:
            with file.open() as raw:
                whole = file.decode(raw.read().removeprefix(_MARK), 0)
            yield _document(file, _parsed(file, whole, "the whole file"), column, "the whole file"), 1
        return
    except RecursionError:
        pass  # said of the line
    yield from json_lines(file, place, column)


def _array(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """Elements from number `place` on, parsed one at a time from a buffer that grows only for a long one."""
    decoder, between = json.JSONDecoder(parse_int=_integer), re.compile(r"[ \t\r\n,]*")
    element = 0
    try:
        with io.TextIOWrapper(file.open(), "utf-8-sig", newline="") as raw:
            buffer = raw.read(READ)
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
                    more = raw.read(max(READ, len(buffer) - at)) if cut_off else ""
                    if not more:
                        raise file.error(f"not JSON in element {element} of its array: {error.msg}") from error
                    buffer, at = buffer[at:] + more, 0
                    continue
                except RecursionError as error:
                    raise file.error(f"nested too deeply in element {element} of its array") from error
                element += 1
                if element > place:
                    yield _document(file, record, column, f"element {element - 1} of its array"), element
    except UnicodeDecodeError as error:
        raise file.not_utf8(f"behind element {element} of its array") from error


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None  # it matches the empty string
    return match.end()


def _document(file: File, record: Any, column: str, where: str) -> Document:
    """The text or the token ids of a JSON record that stands at `where`."""
    if not isinstance(record, str | dict):
        raise file.error(f"holds a JSON {type(record).__name__} where a record or a string was expected ({where})")
    value = record if isinstance(record, str) else field(file.name, record, column)
    return document(file.name, column, value, where)


def _parsed(file: File, text: str, where: str) -> Any:
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise file.error(f"not JSON in {where}, at its line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise file.error(f"nested too deeply in {where}") from error


def _loads(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int | float:
    """A number of a record. One of thousands of digits is not a token id, and need not be exact."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)
