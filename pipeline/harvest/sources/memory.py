"""Rows in memory, so that whatever reads a store reads them, too.

A store is named by what its rows are: its recipe has a digest of their values, so the same rows again are the same
store, and nothing is written. Which rows are held out depends on their number and the seed alone. Inputs and targets
given together align, as two sites of a model do.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import is_plain_name
from sae.cache.errors import SaeError
from sae.cache.tokens import SPLITS
from sae.configs.base import Amount
from sae.pipeline.harvest.tables.spool import as_rows
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

PART = 16_384  # rows given at a time


class MemoryConfig(SourceConfig):
    """Settings of rows in memory: how to store them."""

    source: Literal["memory"] = Field("memory", description="where rows come from")
    codec: str = Field("float32", description="int8, bfloat16, float16 or float32; with settings as int8:step=0.11")
    validation: float = Field(0.05, description="share of the rows that is held out")
    seed: int = Field(0, ge=0, description="seed of the choice of the held-out rows")


@register
class MemorySource(RowSource):
    """Rows [n, d] of a program, with targets or without: `sae.Session().dataset(x, y)`, from Python alone."""

    name: ClassVar[str] = "memory"
    settings: ClassVar[type[SourceConfig]] = MemoryConfig
    config: MemoryConfig

    def __init__(self, config: MemoryConfig, x: Any, y: Any = None, *, called: str = "rows") -> None:
        """x [n, d_in], and targets y [n, d_out]; `called` is in the stores' names. SaeError for what is no such."""
        if not 0 <= config.validation < 1:
            raise SaeError(
                f"validation = {config.validation}: is not a share of the rows; give a number from 0 to below 1"
            )
        if not is_plain_name(called):
            raise SaeError(f"name = {called!r}: is not the name of a file; take letters, digits, dots, - and _")
        self.config, self._called = config, called
        self._rows = {"x": as_rows(x, "x"), **({} if y is None else {"y": as_rows(y, "y")})}
        n = len(self._rows["x"])
        if y is not None and len(self._rows["y"]) != n:
            raise SaeError(f"y: has {len(self._rows['y']):,} rows, x has {n:,}; row i of both must belong together")
        held_out = np.random.PCG64(config.seed).random_raw(n) < np.uint64(config.validation * 2.0**64)
        self._chosen = {split: np.flatnonzero(held_out == (split != SPLITS[0])) for split in SPLITS}
        if not len(self._chosen[SPLITS[0]]):
            raise SaeError(f"validation = {config.validation}: leaves no row of {n:,} to train on; lower it")
        self.splits = tuple(split for split in SPLITS if len(self._chosen[split]))
        self.streams = tuple(Stream(name, rows.shape[1]) for name, rows in self._rows.items())
        self.several = y is not None
        self._digest = _digest(list(self._rows.values()))

    @classmethod
    def of_settings(cls, config: MemoryConfig, origins: Origins, progress: Progress) -> NoReturn:
        raise SaeError("harvest.source = memory: rows in memory are a program's: sae.Session().dataset(x); see `table`")

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> NoReturn:
        raise SaeError(f"{store.path}: its rows were in a program's memory; remove the store, and let it be made again")

    def slug(self, stream: Stream, split: str) -> str:
        several = [stream.name] if self.several else []
        return "-".join([self._called, *several, *([split] if split != SPLITS[0] else [])])

    def identity(self) -> Recipe:
        return {"rows": self._digest, "validation": self.config.validation, "seed": self.config.seed}

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        n, windows = len(self._chosen[split]), ActivationStore.layout({})
        asked = n if wanted is None or wanted == "all" else min(wanted, n)
        return Supply(n, asked, lambda i: (windows.start(i),), ended=True)

    def window(self, task: WindowTask) -> Iterator[Rows]:
        first = task.start[0]
        for low in range(first, first + task.rows, PART):
            part = self._chosen[task.split][low : min(low + PART, first + task.rows)]
            yield Rows(part, partial(self._values, part))

    def _values(self, part: np.ndarray, names: Sequence[str]) -> list[tuple[str, Tensor]]:
        return [(name, self._rows[name][torch.from_numpy(part)]) for name in names]

    def elsewhere(self) -> Callable[[], RowSource]:
        raise SaeError("rows in memory are stored by the process that has them; leave workers out")


def _digest(streams: list[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    whole = hashlib.sha256()
    for rows in streams:
        whole.update(f"{list(rows.shape)}\n".encode())
        whole.update(rows.numpy().data)
    return whole.hexdigest()
