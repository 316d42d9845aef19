"""One local file: its bytes, decompressed, and errors that name it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from sae.cache.errors import SaeError

COMPRESSED = (".gz", ".zst")
READ = 1 << 20  # bytes asked for at a time
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_POINTER = b"version https://git-lfs"


class File(NamedTuple):
    """One file: `name` is what the recipe and the messages call it (relative to the folder that was given)."""

    name: str
    path: Path

    def open(self) -> BinaryIO:
        """Its bytes, decompressed."""
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            import gzip

            return cast(BinaryIO, gzip.open(self.path))
        if suffix == ".zst":
            return cast(BinaryIO, io.BufferedReader(_Zstandard(self.path), READ))
        return self.path.open("rb")

    def error(self, what: str) -> SaeError:
        return SaeError(f"source = {self.name}: {what}")

    def is_pointer(self) -> bool:
        """Return True if it only stands for a file that git would have to fetch."""
        with self.path.open("rb") as raw:
            return raw.read(len(_POINTER)) == _POINTER

    def decode(self, raw: bytes, start: int) -> str:
        """UTF-8; `start` is the place of `raw` in the file, for the message."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {raw[error.start]:#04x} at offset {start + error.start}"
            raise self.not_utf8(where, "utf-16" if start == 0 and raw.startswith(_UTF16) else "latin1") from error

    def not_utf8(self, where: str, encoding: str = "latin1") -> SaeError:
        return self.error(f"not UTF-8 text ({where}); convert it, e.g. iconv -f {encoding} -t utf-8")


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
