"""What rows are made of: the features in each, and how strongly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """The features in some rows and their strengths: those of row i are the entries `start[i]` to `start[i + 1]`."""

    start: np.ndarray  # int64 [rows + 1]
    feature: np.ndarray  # int64 [entries]
    value: np.ndarray  # float32 [entries], above 0

    def part(self, first: int, stop: int) -> "Coefficients":
        """Those of rows [first, stop)."""
        low, high = self.start[first], self.start[stop]
        return Coefficients(self.start[first : stop + 1] - low, self.feature[low:high], self.value[low:high])

    def chosen(self, rows: np.ndarray) -> "Coefficients":
        """Those of some rows [n], in their order."""
        counts = np.diff(self.start)[rows]
        start = np.concatenate([[0], np.cumsum(counts)])
        entries = np.repeat(self.start[rows] - start[:-1], counts) + np.arange(start[-1])
        return Coefficients(start, self.feature[entries], self.value[entries])

    def dense(self, features: int) -> Tensor:
        """float32 [rows, features]."""
        out = torch.zeros(len(self.start) - 1, features)
        row = np.repeat(np.arange(len(out)), np.diff(self.start))
        out[torch.from_numpy(row), torch.from_numpy(self.feature)] = torch.from_numpy(self.value)
        return out


def in_rows(n: int, row: np.ndarray, feature: np.ndarray, value: np.ndarray) -> Coefficients:
    """Entries in any order of rows [entries], brought together row by row."""
    order = np.argsort(row, kind="stable")
    return Coefficients(np.searchsorted(row[order], np.arange(n + 1)), feature[order], value[order].astype(np.float32))


def together(parts: Sequence[Coefficients]) -> Coefficients:
    """Those of rows that follow each other."""
    offsets = np.cumsum([0, *(part.start[-1] for part in parts)])
    start = [part.start[:-1] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
    feature, value = (np.concatenate([part[column] for part in parts]) for column in (1, 2))
    return Coefficients(np.concatenate([*start, offsets[-1:]]), feature, value)
