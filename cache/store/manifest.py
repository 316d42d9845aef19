"""The list of committed windows, one checked JSON line each: what stands in it is durable.

A window is the unit of work, of shuffling and of committing. Its boundaries are a fixed function of the row index, so
a store's bytes depend on the recipe and the row count alone, never on how many calls, workers or crashes made it.
A store's rows are exactly what its manifest lists; a torn last line (a crash while appending) does not count.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.cache.disk.durable import append_line, checksum, read, whole_lines_end
from sae.cache.disk.parsing import inner, parsed_mapping, whole
from sae.cache.errors import DamagedStore

MANIFEST = "manifest.jsonl"
MOST_BYTES = 1 << 30  # of a manifest: about a hundred billion rows


@dataclass(frozen=True)
class Windows:
    """Boundaries: `first`, 2 first, 4 first, ... up to `largest`, then every `largest` rows (both powers of two apart).

    Small windows first, so that small stores lose little to rounding; large ones later, so that rows mix widely.
    """

    first: int
    largest: int

    def start(self, window: int) -> int:
        """First row of a window; the end of the window before it."""
        doublings = (self.largest // self.first).bit_length() - 1
        if window <= doublings:
            return 0 if window == 0 else self.first << (window - 1)
        return self.largest * (window - doublings)

    def bounds(self, window: int) -> tuple[int, int]:
        return self.start(window), self.start(window + 1)

    def count(self, rows: int) -> int:
        """The number of windows needed to hold at least `rows` rows."""
        doublings = (self.largest // self.first).bit_length() - 1
        if rows > self.largest:
            return doublings + -(-rows // self.largest)
        window = 0
        while self.start(window) < rows:
            window += 1
        return window

    def round_up(self, rows: int) -> int:
        """The nearest boundary at or above `rows`."""
        return self.start(self.count(rows))


@dataclass(frozen=True)
class Window:
    """One manifest line: rows [start, stop), the stored size and crc32c of each file, and where the source stood."""

    index: int
    start: int
    stop: int
    files: dict[str, tuple[int, str]]
    notes: dict[str, Any]

    def line(self) -> str:
        files = {name: [size, crc] for name, (size, crc) in sorted(self.files.items())}
        return _sealed({"window": self.index, "rows": [self.start, self.stop], "files": files, "notes": self.notes})


def place_after(window: Window, parts: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the place of the source of the store in a folder after a window, by its notes: the named parts of a place.

    Raises DamagedStore where the notes are not its maker's.
    """
    said = window.notes.get("next")
    if not isinstance(said, dict) or said.keys() != set(parts) or not all(map(_is_place, said.values())):
        raise DamagedStore(
            f"{folder / MANIFEST}: line {window.index + 1} does not say where the next window starts; remove the store "
            "and make it again"
        )
    return said


def _is_place(part: Any) -> bool:
    return part is None or isinstance(part, dict) or (type(part) is int and part >= 0)


@dataclass(frozen=True)
class Manifest:
    """All committed windows in order, and whether the source has ended (then the store is closed: it cannot grow)."""

    windows: tuple[Window, ...] = ()
    closed: bool = False

    @property
    def rows(self) -> int:
        return self.windows[-1].stop if self.windows else 0

    @property
    def stored_bytes(self) -> int:
        return sum(size for window in self.windows for size, _ in window.files.values())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Parse a store's manifest. Raises DamagedStore for a line that fails its own checksum or breaks the order."""
        path = folder / MANIFEST
        data = read_manifest(folder)
        windows: list[Window] = []
        closed = False
        for number, text in enumerate(lines_of(data), 1):
            line = read_line(text)
            if line is None or closed:
                raise DamagedStore(f"{path}: line {number} is damaged; `verify()` tells what else is")
            end = windows[-1].stop if windows else 0
            if isinstance(line, Window):
                in_order = line.index == len(windows) and line.start == end
                windows.append(line)
            else:
                closed = in_order = line == end
            if not in_order:
                raise DamagedStore(f"{path}: line {number} does not follow the line before it")
        return cls(tuple(windows), closed)

    def text(self) -> bytes:
        """The whole file, as its lines were appended."""
        lines = [window.line() for window in self.windows] + ([end_line(self.rows)] if self.closed else [])
        return "".join(f"{line}\n" for line in lines).encode()


def read_line(text: bytes) -> Window | int | None:
    """Return the window of a line, or the rows at which the source ended; None for what nobody wrote."""
    try:
        body = _unsealed(text)
        if body.keys() == {"end"}:
            return whole(body, "end")
        if body.keys() != {"window", "rows", "files", "notes"}:
            return None
        files = {name: _size_and_checksum(value) for name, value in inner(body, "files").items()}
        start, stop = body["rows"]
        rows = {"start": start, "stop": stop}
        index = whole(body, "window")
        return Window(index, whole(rows, "start"), whole(rows, "stop"), files, inner(body, "notes"))
    except (ValueError, TypeError):
        return None


def _size_and_checksum(value: Any) -> tuple[int, str]:
    size, crc = value
    if not isinstance(crc, str) or re.fullmatch("[0-9a-f]{8}", crc) is None:
        raise ValueError(f"{crc} is not a checksum")
    return whole({"size": size}, "size"), crc


def lines_of(data: bytes) -> list[bytes]:
    """The whole lines of a manifest."""
    return data[: whole_lines_end(data)].split(b"\n")[:-1]


def read_manifest(folder: Path) -> bytes:
    """The bytes of a store's manifest; none where there is none. Raises DamagedStore for a file too large to be one."""
    path = folder / MANIFEST
    data = read(path, MOST_BYTES) or b""
    if len(data) > MOST_BYTES:
        raise DamagedStore(f"{path}: is too large to be a manifest; remove the store and make it again")
    return data


def end_line(rows: int) -> str:
    """The line that says the source ended at `rows`."""
    return _sealed({"end": rows})


def commit(folder: Path, window: Window) -> None:
    """Append a window whose files are already on the disk: from here on its rows exist."""
    append_line(folder / MANIFEST, window.line())


def close(folder: Path, rows: int) -> None:
    """Append the line that says the source ended at `rows`."""
    append_line(folder / MANIFEST, end_line(rows))


def _sealed(body: dict[str, Any]) -> str:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    return json.dumps({"crc": checksum(text.encode()), "line": body}, separators=(",", ":"), sort_keys=True)


def _unsealed(text: bytes) -> dict[str, Any]:
    """The body of a line. Raises ValueError where the line is not what was written (also in its punctuation)."""
    body = inner(parsed_mapping(text), "line")
    if _sealed(body).encode() != text:
        raise ValueError("the checksum differs")
    return body
