"""A plain Zarr v3 array of floats.

zarr.json    the group; its attributes say where the rows come from
rows         [N, d]   float32, float16, or bfloat16 as the uint16 of its bits (attribute `logical_dtype`)
position     [N]      int64, context * T + position: the token each row came from
tokens       [n, T]   on request: the contexts those positions count in, from the first on
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from sae.cache.store.codecs import to_numpy
from sae.cache.tokens import TokenStore

from .base import Export, Part, Writer

CONTEXTS = 4096  # contexts of tokens copied at a time
ARRAY, HALF = "(?:rows|position|tokens)", r"\.[0-9a-f]{32}\.partial"  # under which zarr writes


class Rows(Writer):
    """Chunks as large as the store's, each written once."""

    made: ClassVar[re.Pattern[str]] = re.compile(
        rf"(?:{ARRAY}/)?zarr(?:\.json|{HALF})|{ARRAY}/c/\d+(?:/\d+)*(?:{HALF})?"
    )

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._group = zarr.create_group(export.folder, zarr_format=3, attributes=export.about)
        bits = export.dtype == "bfloat16"
        said = {"logical_dtype": export.dtype} if bits else {}
        shape, dtype = (export.n, export.d), "uint16" if bits else export.dtype
        self._rows = self._array("rows", shape, self.size, dtype, ("row", "dim"), said)
        self._position = self._array("position", (export.n,), self.size, "int64", ("row",), {})
        self._done = 0

    @property
    def size(self) -> int:
        return min(self.export.chunk, self.export.n)

    def add(self, part: Part) -> None:
        stop = self._done + len(part.positions)
        self._rows[self._done : stop] = to_numpy(part.rows)
        self._position[self._done : stop] = part.positions
        self._done = stop

    def contexts(self, tokens: TokenStore, count: int) -> None:
        spec = tokens.arrays["tokens"]
        shape, chunk = (count, tokens.context_length), min(spec.chunk_rows, count)
        array = self._array("tokens", shape, chunk, np.dtype(spec.dtype).name, spec.dimension_names, {})
        step = max(1, CONTEXTS // chunk) * chunk
        for start in range(0, count, step):
            stop = min(start + step, count)
            array[start:stop] = tokens.contexts(start, stop)

    def close(self) -> None:
        assert self._done == self.export.n, (self._done, self.export.n)

    def _array(
        self, name: str, shape: tuple[int, ...], chunk: int, dtype: str, dimensions: tuple[str, ...],
        attributes: dict[str, Any],
    ) -> Any:  # fmt: skip
        return self._group.create_array(
            name, shape=shape, chunks=(chunk, *shape[1:]), dtype=dtype, dimension_names=dimensions,
            attributes=attributes, compressors=ZstdCodec(level=1, checksum=True),
        )  # fmt: skip
