"""What a format of exported rows is, and which there are."""

from __future__ import annotations

import json
import pkgutil
import re
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.cache.disk.durable import write_in
from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore

ABOUT = "_about.json"  # which readers of whole folders leave out
SHARD_BYTES = 1 << 28  # of rows in a file, about, where a format has several
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ITS_OWN = ("base",)  # modules of this folder that are no format


class Part(NamedTuple):
    """Consecutive rows [n, d] in the export's dtype, the position of each [n], and its token, where asked."""

    rows: Tensor
    positions: np.ndarray
    tokens: np.ndarray | None = None


class Export(NamedTuple):
    """What is exported. about: what goes with the rows (store, order, recipe, ...). hook: what SAELens calls it."""

    folder: Path
    n: int
    d: int
    dtype: str
    chunk: int  # rows of the store's own chunks
    about: dict[str, Any]
    hook: str


class Writer(ABC):
    """A format: is given the parts of an export one after the other."""

    made: ClassVar[re.Pattern[str]]  # the files it writes, named relative to the folder, and what a killed one leaves
    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    def __init__(self, export: Export) -> None:
        self.export = export

    @property
    def size(self) -> int:
        """Rows of every part but the last."""
        return max(1, min(self.export.n, SHARD_BYTES // (self.export.d * DTYPES[self.export.dtype].itemsize)))

    @abstractmethod
    def add(self, part: Part) -> None:
        """Write a part."""

    def contexts(self, tokens: TokenStore, count: int) -> None:
        """Write the contexts that positions count in, where the format has no token beside each row."""
        return

    def close(self) -> None:
        """Write what goes with the rows."""
        write_in(self.export.folder, ABOUT, json.dumps(self.export.about, indent=2).encode())


def names() -> list[str]:
    """The formats there are."""
    there = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in there if name not in ITS_OWN)


def writer_of(name: str, dtype: str) -> type[Writer]:
    """The writer of a format. Raises SaeError for a format or a dtype that does not exist, or does not go together."""
    if dtype not in DTYPES:
        raise SaeError(f"dtype = {dtype}: rows are exported as {', '.join(DTYPES)}")
    if name not in names():
        raise SaeError(f"format = {name}: rows are exported as {', '.join(names())}")
    writer: type[Writer] = import_module(f"{__package__}.{name}").Rows
    if dtype not in writer.dtypes:
        raise SaeError(f"dtype = {dtype}: {name} has no such numbers; take {' or '.join(writer.dtypes)}")
    return writer


def is_made(name: str) -> bool:
    """Return True if a file of an export, named relative to it, is one that the writing of some format makes."""
    patterns = [import_module(f"{__package__}.{one}").Rows.made for one in names()]
    return re.fullmatch(rf"{re.escape(ABOUT)}(?:\..*)?", name) is not None or any(
        one.fullmatch(name) for one in patterns
    )
