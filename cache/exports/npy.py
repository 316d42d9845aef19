"""NumPy files that can be mapped into memory: rows-00000.npy [n, d], position-00000.npy [n], token-00000.npy [n]."""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np

from .base import Export, Part, Writer


class Rows(Writer):
    """Files for a quarter of a gigabyte of rows each."""

    made: ClassVar[re.Pattern[str]] = re.compile(r"(?:rows|position|token)-\d{5}\.npy")
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def __init__(self, export: Export) -> None:
        super().__init__(export)
        self._shard = 0

    def add(self, part: Part) -> None:
        columns = {"rows": part.rows.numpy(), "position": part.positions, "token": part.tokens}
        for name, values in columns.items():
            if values is not None:
                np.save(self.export.folder / f"{name}-{self._shard:05}.npy", values)
        self._shard += 1
