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
        """The rows of a chunk from its stored bytes (into `out` [chunk_rows, *row_shape] where given)."""
        if self.zstd is None:
            chunk = np.frombuffer(data, self.dtype).reshape(self.chunk_shape)
            if out is None:
                return chunk
            out[...] = chunk
            return out
        if out is None:
            out = np.empty(self.chunk_shape, self.dtype)
        Zstd().decode(data, out)
        return out


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """`zarr.json` of the group around a store's arrays."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}, indent=2).encode()
