"""One Zarr v3 array as plain files: its metadata, and chunk <-> bytes.

The chunk files and `zarr.json` are exactly what zarr-python writes for the codecs `bytes` and `zstd` (tests compare);
they are written here directly because a commit needs the stored bytes' checksum, a flush before the rename, and no
chunk that is silently dropped or filled in. Frames carry no checksum of their own: the manifest has one of every file,
and checking both costs a tenth of the decoding.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
NAMES = {
    "|i1": "int8",
    "|u1": "uint8",
    "<u2": "uint16",
    "<u4": "uint32",
    "<u8": "uint64",
    "<i8": "int64",
    "<f2": "float16",
    "<f4": "float32",
}


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: `shape` of one row, rows per chunk, and how a chunk becomes bytes.

    `grows` arrays have the store's rows as their first axis; the others are written once, as a single chunk.
    """

    name: str
    dtype: str  # a NumPy type string of NAMES, always little endian
    row_shape: tuple[int, ...]
    chunk_rows: int
    dimension_names: tuple[str, ...]
    fill: int | float  # a value that real data never or hardly takes: an unchecked read of a missing chunk shows
    zstd: int | None = 1
    grows: bool = True
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_rows, *self.row_shape)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunk_shape) * np.dtype(self.dtype).itemsize

    def metadata(self, rows: int) -> bytes:
        """`zarr.json` of the array when the store has `rows` rows."""
        codecs: list[dict[str, Any]] = [{"name": "bytes"}]
        if np.dtype(self.dtype).itemsize > 1:
            codecs[0]["configuration"] = {"endian": "little"}
        if self.zstd is not None:
            codecs.append({"name": "zstd", "configuration": {"level": self.zstd, "checksum": False}})
        fill: int | float | str = "NaN" if isinstance(self.fill, float) and math.isnan(self.fill) else self.fill
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [rows if self.grows else self.chunk_rows, *self.row_shape],
            "data_type": NAMES[self.dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": codecs,
            "attributes": self.attributes,
            "dimension_names": list(self.dimension_names),
            "storage_transformers": [],
        }
        return json.dumps(document, indent=2).encode()

    def chunk_file(self, index: int) -> str:
        """Path of a chunk inside the store's folder."""
        return "/".join([self.name, "c", str(index), *("0" for _ in self.row_shape)])

    def encode(self, rows: np.ndarray) -> bytes:
        """Stored bytes of one chunk. A short last chunk is padded with the fill value, as Zarr's grid asks."""
        assert rows.shape[1:] == self.row_shape and len(rows) <= self.chunk_rows, (self.name, rows.shape)
        chunk = np.ascontiguousarray(rows, dtype=self.dtype)
        if len(rows) < self.chunk_rows:
            chunk = np.concatenate(
                [chunk, np.full((self.chunk_rows - len(rows), *self.row_shape), self.fill, self.dtype)]
            )
        if self.zstd is None:
            return chunk.tobytes()
        return bytes(Zstd(level=self.zstd).encode(chunk))

    def decode(self, data: bytes | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of a chunk from its stored bytes (into `out` [chunk_rows, *row_shape] where given).

        Raises ValueError, before any memory is taken, where the bytes say that they are more or fewer than a chunk's.
        """
        said = len(data) if self.zstd is None else frame_bytes(data)
        if said != self.chunk_bytes:
            raise ValueError(f"{'no size' if said is None else f'{said:,} bytes'} where {self.chunk_bytes:,} should be")
        if self.zstd is None:
            chunk = np.frombuffer(data, self.dtype).reshape(self.chunk_shape)
            if out is None:
                return chunk
            out[...] = chunk
            return out
        if out is None:
            out = np.empty(self.chunk_shape, self.dtype)
        try:
            Zstd().decode(data, out)  # raises unless it fills `out` to the last byte
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return out

    @property
    def stored_bytes(self) -> range:
        """The numbers of bytes that a stored chunk may have."""
        size = self.chunk_bytes
        return range(size, size + 1) if self.zstd is None else range(1, size + size // 128 + 1024)


def frame_bytes(data: bytes | np.ndarray) -> int | None:
    """Decoded bytes that the header of a zstd frame (RFC 8878, 3.1.1) promises; None where it is none or says none."""
    head = bytes(data[:18])
    if len(head) < 6 or head[:4] != ZSTD_MAGIC:
        return None
    described = head[4]
    single, size_kind, key_kind = described >> 5 & 1, described >> 6, described & 3
    width = (single, 2, 4, 8)[size_kind]
    at = 5 + (not single) + (0, 1, 2, 4)[key_kind]
    if not width or len(head) < at + width:
        return None
    return int.from_bytes(head[at : at + width], "little") + (256 if size_kind == 1 else 0)


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """`zarr.json` of the group around a store's arrays."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()
