"""Anyone's rows: a table of numbers [n, d] in a file.

A store of it is named by what the rows are, not by where they lie: the recipe has a digest of all values in float32, so
the same rows in another format are the same store. Which rows are held out is decided by their number and the seed
alone. The file is read in one pass to begin with, which finds what cannot be stored before anything is written, and
then window by window; what there is of it in memory does not depend on its length.

Given up: a table that grows is another table.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import text
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.codecs import codec
from sae.cache.store.head import RECIPE
from sae.configs.base import Amount
from sae.pipeline.harvest.files import by_worker, others, slug_of
from sae.pipeline.harvest.tables import Choice, Name, Table, opened
from sae.pipeline.language_model import hints
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress, Silent

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

PART = 1 << 22  # bytes of rows read at a time, in float32
BLOCK = 65_536  # rows whose split is drawn from one seed


class TableConfig(SourceConfig):
    """Settings of a table: which rows of which file to store."""

    source: Literal["table"] = Field("table", description="where rows come from")
    table: str | None = Field(
        None,
        description="file of rows that are there already, in the place of a model's: .npy, .npz, .safetensors, "
        ".parquet, .arrow, .feather, .csv, .tsv or Zarr; unset: none",
    )
    array: str | None = Field(
        None, description="which array of an .npz, a .safetensors or a Zarr group, where there are several"
    )
    columns: tuple[Name, ...] = Field(
        (), description="columns by their name or, where there are none, number, in this order; [] is all"
    )
    train_rows: Amount = Field("all", description="training rows, rounded up to a whole window, or all")
    validation: float = Field(0.05, ge=0, lt=1, description="share of the rows that is held out")
    seed: int = Field(0, ge=0, description="seed of the choice of the held-out rows")

    @property
    def path(self) -> Path:
        return Path(self.table or "")


@dataclass(frozen=True)
class Opener:
    """Opens a table; `stamp` says what the file was like when its digest was taken."""

    config: TableConfig
    splits: tuple[str, ...]
    stamp: tuple[int, ...]
    digest: str

    def __call__(self) -> "TableSource":
        with by_worker("read the rows"):
            return _opened(self)


@register
class TableSource(RowSource):
    """Rows [n, d] of a file: .npy, .npz, .safetensors, .parquet, Arrow, .csv, .tsv, Zarr; see `sae synthesize rows`."""

    name: ClassVar[str] = "table"
    settings: ClassVar[type[SourceConfig]] = TableConfig
    config: TableConfig

    def __init__(self, opener: Opener, table: Table) -> None:
        self.config, self.splits, self.opener, self.table = opener.config, opener.splits, opener, table
        self.streams = (Stream(self.config.path.name, table.d),)

    @classmethod
    def of_settings(cls, config: TableConfig, origins: Origins, progress: Progress) -> "TableSource":
        codec(config.codec)
        if config.table is None:
            raise SaeError("harvest.table: which file the rows are in is not said; give `table = FILE`")
        path = config.path.expanduser()
        config = config.model_copy(update={"table": str(path.resolve())})
        table = opened(path, config.array, Choice(config.columns))
        stamp = _stamp(path)
        digest = _digest(table, progress)  # all is read before it is said what there is
        held_out = any(_held_out(config, low, min(low + BLOCK, table.n)).any() for low in range(0, table.n, BLOCK))
        if config.validation and not held_out:
            progress.note(f"table = {path}: of {table.n:,} rows none is held out; see `harvest.validation`")
        return cls(Opener(config, ("train", "validation") if held_out else ("train",), stamp, digest), table)

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> "TableSource":
        said = store.recipe["source"]
        path = hints.files_of(store, origins.source, "rows are")
        try:
            where = str(Path(path).expanduser().resolve())
            config = TableConfig(
                table=where, array=said.get("array"), columns=said.get("columns") or (),
                validation=said["validation"], seed=said["seed"],
            )  # fmt: skip
            digest = text(said, "rows")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedStore(f"{store.path / RECIPE}: is not a recipe of a table; remove the store") from error
        table = opened(config.path, config.array, Choice(config.columns))
        stamp = _stamp(config.path)
        if _digest(table, Silent()) != digest:
            raise others(store, path, "rows", "that table")
        return cls(Opener(config, (store.split,), stamp, digest), table)

    def slug(self, stream: Stream, split: str) -> str:
        return f"table-{slug_of(self.config.path, 'rows')}" + ("" if split == "train" else f"-{split}")

    def identity(self) -> Recipe:
        config = self.config
        chosen = {"array": config.array, "columns": list(config.columns)}
        return {
            "rows": self.opener.digest, "validation": config.validation, "seed": config.seed,
            **{name: value for name, value in chosen.items() if value},
        }  # fmt: skip

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        if wanted is None:
            wanted = self.config.train_rows if split == "train" else "all"
        windows, places, rows = ActivationStore.layout({}), [(0,)], 0
        for low in range(0, self.table.n, BLOCK):
            kept = self._kept(split, low, min(low + BLOCK, self.table.n))
            while (start := windows.start(len(places))) <= rows + len(kept):
                places.append((int(kept[start - rows - 1]) + 1,))
            rows += len(kept)
        if not rows:
            raise SaeError(f"table = {self.config.path}: no row is left for {split}; see `harvest.validation`")
        return Supply(
            rows, rows if wanted == "all" else min(wanted, rows), [*places, (self.table.n,)].__getitem__, ended=True
        )

    def window(self, task: WindowTask) -> Iterator[Rows]:
        if _stamp(self.config.path) != self.opener.stamp:
            raise SaeError(f"table = {self.config.path}: was changed while it was read; repeat with it as it is now")
        left, step = task.rows, max(1, PART // (4 * self.table.d))
        for low in range(task.start[0], task.end[0], step):
            kept = self._kept(task.split, low, min(low + step, task.end[0]))[:left]
            left -= len(kept)
            if len(kept):
                yield Rows(kept, partial(self._values, kept))

    def _kept(self, split: str, start: int, stop: int) -> np.ndarray:
        """The rows of a split among [start, stop)."""
        return start + np.flatnonzero(_held_out(self.config, start, stop) == (split != "train"))

    def _values(self, kept: np.ndarray, names: Sequence[str]) -> list[tuple[str, Tensor]]:
        first = int(kept[0])
        rows = self.table.rows(first, int(kept[-1]) + 1)[torch.from_numpy(kept - first)]
        return [(name, rows) for name in names]

    def hints(self) -> dict[str, str]:
        return {"source": str(self.config.path)}

    def elsewhere(self) -> Callable[[], RowSource]:
        return self.opener


def _held_out(config: TableConfig, start: int, stop: int) -> np.ndarray:
    """bool [stop - start]: whether rows are held out."""
    first = start // BLOCK
    drawn = [_bits(config.seed, block) for block in range(first, -(-stop // BLOCK))]
    bits = np.concatenate(drawn)[start - first * BLOCK : stop - first * BLOCK]
    return bits < np.uint64(config.validation * 2.0**64) if config.validation else np.zeros(stop - start, bool)


@lru_cache(maxsize=2)
def _bits(seed: int, block: int) -> np.ndarray:
    """uint64 [BLOCK]: raw bits of PCG64, which NumPy promises for ever."""
    digest = hashlib.sha256(f"table {seed} {block}".encode()).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(BLOCK)


def _digest(table: Table, progress: Progress) -> str:
    """SHA-256 of the shape and of all rows as little-endian float32. Raises SaeError for what is no number."""
    found = hashlib.sha256(f"{table.n} {table.d}\n".encode())
    step = max(1, PART // (4 * table.d))
    progress.start(f"read {table.path.name}", table.n, "rows")
    try:
        for low in range(0, table.n, step):
            rows = table.rows(low, min(low + step, table.n))
            found.update(rows.numpy().astype("<f4", copy=False).tobytes())
            progress.advance(len(rows))
    finally:
        progress.finish()
    return found.hexdigest()


def _stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that change when a file, or one of those in a folder, is written."""
    try:
        every = [one.stat() for one in (path, *(path.rglob("*") if path.is_dir() else ()))]
    except OSError as error:
        raise SaeError(f"table = {path}: cannot be read ({error.strerror})") from error
    return len(every), sum(one.st_size for one in every), max(one.st_mtime_ns for one in every)


@lru_cache(maxsize=1)
def _opened(opener: Opener) -> TableSource:
    """The table, opened once in a worker process."""
    config = opener.config
    if _stamp(config.path) != opener.stamp:
        raise SaeError(f"table = {config.path}: is another file there; give all machines the same")
    return TableSource(opener, opened(config.path, config.array, Choice(config.columns)))
