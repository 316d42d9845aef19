"""Tables: every file of numbers is read as rows [n, d] of float32 from any place on, without holding them.

Each kind is a class: `n` and `d` from the file's head, and `blocks(start)`, which goes through the rows from one on.
"""

import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sae.cache.errors import SaeError

BYTES = 1 << 22  # of a block, about
LISTED = 20  # names in a message
Name = Annotated[str, Field(coerce_numbers_to_str=True)]
"""Of a column: a number is the name of one that has none."""


class Choice(NamedTuple):
    """Which columns of a file are meant: those `wanted`, in this order (of none: all), but for those left out."""

    wanted: Sequence[str] = ()
    without: Sequence[str] = ()

    def among(self, there: Iterable[str], where: str) -> list[str]:
        """The names of the columns that are meant. Raises SaeError for one that is not there, or if none is left."""
        names = list(there)
        if unknown := [name for name in (*self.wanted, *self.without) if name not in names]:
            raise SaeError(f"{where}: has no column {unknown[0]!r}; there is {listed(names)}")
        if twice := [name for i, name in enumerate(self.wanted) if name in self.wanted[:i]]:
            raise SaeError(f"harvest.columns = {list(self.wanted)}: {twice[0]} is there twice")
        left = [name for name in self.wanted or names if name not in self.without]
        if not left:
            raise SaeError(f"{where}: `harvest.without` leaves no column of {listed(names)}; name fewer")
        return left


class Table(ABC):
    """Rows [n, d] of a file. `where` is how messages call it."""

    n: int
    d: int

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, f"table = {path}"
        self._blocks: Iterator[tuple[int, np.ndarray | Tensor]] = iter(())
        self._first, self._block = 0, torch.empty(0, 0)
        self._picked: list[int] | None = None  # of the columns of an array

    @property
    def names(self) -> list[str]:
        """What the columns are called: by their number, where the file does not say."""
        return [str(column) for column in self._picked or range(self.d)]

    def pick(self, columns: Choice) -> None:
        """Take some columns of an array alone, which are named by their number."""
        self._picked = [int(name) for name in columns.among(self.names, self.where)]
        self.d = len(self._picked)

    @abstractmethod
    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray | Tensor]]:
        """Blocks of whole rows, each with the number of its first: the first block holds row `start`."""

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, d]; goes on where the last call ended, if it can. SaeError for what is no number."""
        parts = []
        while start < stop:
            if not self._first <= start < self._first + len(self._block):
                self._seek(start)
            part = self._block[start - self._first : stop - self._first]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _seek(self, row: int) -> None:
        """Make the block that holds a row the present one."""
        behind = self._first + len(self._block)
        if row != behind or not len(self._block):
            self._blocks = self.blocks(row)
        with readable(self.path):
            found = next(self._blocks, None)
        if found is None:
            raise SaeError(f"{self.where}: ends at row {row:,}, before the {self.n:,} rows that it says it has")
        self._first, self._block = found[0], self._as_rows(*found)
        assert self._first <= row < self._first + len(self._block), (row, self._first, len(self._block))

    def _as_rows(self, first: int, block: np.ndarray | Tensor) -> Tensor:
        if isinstance(block, Tensor):
            rows = block.float()
        else:
            with np.errstate(over="ignore"):  # found below
                rows = torch.from_numpy(np.array(block, dtype=np.float32, order="C"))
        picked = list(range(self.d)) if self._picked is None else self._picked
        rows = rows if self._picked is None else rows[:, picked]
        bad = ~rows.isfinite().all(dim=1)
        if bad.any():
            row = int(bad.nonzero()[0])
            column = int((~rows[row].isfinite()).nonzero()[0])
            value, name = float(block[row, picked[column]]), self.names[column]
            raise SaeError(
                f"{self.where}: row {first + row:,} has {value:g} in column {name}; rows are finite numbers of "
                "float32, so leave it out or fill it in"
            )
        return rows

    def expect_rows(self, shape: Sequence[int], what: str = "") -> None:
        """Take up the shape of an array. Raises SaeError unless it is one of rows."""
        if len(shape) != 2:
            raise SaeError(f"{self.where}: {what}has shape {list(shape)}; rows are [n, d], so reshape it")
        self.n, self.d = int(shape[0]), int(shape[1])
        self._width = self.d  # of a row in the file
        if not self.n or not self.d:
            raise SaeError(f"{self.where}: {what}has shape {list(shape)}, so no rows")

    def expect_numbers(self, dtype: np.dtype[Any], what: str = "") -> None:
        if dtype.kind not in "iuf":
            raise SaeError(f"{self.where}: {what}holds {dtype}; rows are of real numbers")

    def chosen(self, name: str | None, shapes: dict[str, Sequence[int]]) -> str:
        """The array of a file of several: the one named, or the only one of rows."""
        there = listed(f"{one} {list(shape)}" for one, shape in shapes.items())
        if name is not None:
            if name not in shapes:
                raise SaeError(f"{self.where}: has no array {name!r}; there is {there}")
            return name
        fitting = [one for one, shape in shapes.items() if len(shape) == 2]
        if len(fitting) != 1:
            problem = "several arrays" if fitting else "no array"
            raise SaeError(
                f"{self.where}: has {problem} of shape [n, d] ({there}); name one with `harvest.array = NAME`"
            )
        return fitting[0]

    def step(self, itemsize: int) -> int:
        """Rows of a block."""
        return max(1, BYTES // (self._width * itemsize))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the libraries say of a damaged file into one line."""
    from safetensors import SafetensorError

    damage = (OSError, ValueError, KeyError, EOFError, OverflowError, NotImplementedError, zlib.error)
    try:
        yield
    except SaeError:
        raise
    except (*damage, zipfile.BadZipFile, SafetensorError) as error:
        raise SaeError(f"table = {path}: cannot be read ({' '.join(str(error).split())[:200]})") from error


def listed(names: Iterable[str]) -> str:
    """Names, as a message lists them."""
    shown = list(names)
    return (", ".join(shown[:LISTED]) + (", ..." if len(shown) > LISTED else "")) or "nothing"
