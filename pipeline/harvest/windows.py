"""One window of a harvest: the model over its contexts, its rows encoded, its files written. In any process.

A window's batches are cut from its own contexts, as even as they can be, so its bytes depend on the recipe, the window
and `batch` alone: an interrupted, a grown, a distributed and an uninterrupted harvest write the same. The context that
straddles two windows is computed for both.

What a window's rows have become is kept on the disk while it takes long (`pipeline.harvest.keeping`).

A worker process writes files of windows that only the client commits. It may do so while the client's lease exists, a
file in the store: so it proves that it sees the client's file system, and stops when the client has gone. (The next
writer of a store removes a lease that was left behind.)
"""

import functools
import itertools
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sae.cache.activations import ActivationStore, WindowBuffer
from sae.cache.disk.durable import read
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import SaeError
from sae.cache.store.manifest import Window
from sae.cache.store.writer import write_window
from sae.cache.tokens import TokenStore
from sae.pipeline.harvest.keeping import Keeper
from sae.pipeline.harvest.keeping import Window as KeptWindow
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.language_model.token_mask import Place, RowRule, RowsOf
from sae.pipeline.parallel.dask_workers import versions

PATIENCE = 5.0  # seconds a network file system may take to show a new file

Arrays = dict[str, np.ndarray]


class Task(NamedTuple):
    """One window, and the points whose stores lack it."""

    window: int
    rows: int
    start: Place
    end: Place
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Passes:
    """Runs a model over windows. `batch` is the largest number of contexts in a forward pass."""

    model: LanguageModel
    rows: RowsOf
    batch: int

    def compute(
        self,
        task: Task,
        stores: Mapping[Point, ActivationStore],
        done: Callable[[int], None],
        keeper: Keeper | None = None,
    ) -> dict[Point, Arrays]:
        """The window's arrays for every point, as they are stored. Calls `done` with the rows of each forward pass.

        Stores must hold window 0 for any later one: it calibrates their columns. With a keeper, what there is of a long
        window is kept in the stores' folders, and what was kept before is taken up.
        """
        buffers = {
            point: WindowBuffer(
                stores[point], task.window, task.rows, stores[point].columns if stores[point].n_rows else None
            )
            for point in task.points
        }
        batches = self._batches(task)
        window = None
        if keeper is not None:
            positions = np.concatenate([batch.positions for batch in batches])
            folders = {point: stores[point].path for point in task.points}
            identity = self._identity(task, len(batches))
            ends = [batch.end for batch in batches]
            window = KeptWindow(keeper, task.window, identity, folders, buffers, positions, ends)
            window.take_up(self.model.device)
        for batch in batches:
            lacking = [point for point in task.points if buffers[point].filled < batch.end]
            if not lacking:
                continue
            found = self.model.activations(torch.from_numpy(batch.tokens), lacking)
            index = torch.from_numpy(batch.keep).to(self.model.device)
            for point in lacking:
                values = found.pop(point).flatten(0, 1).index_select(0, index)
                buffers[point].add(values, batch.positions)
            done(len(batch.keep))
            if window is not None:
                window.after_batch()
        return {point: buffer.arrays() for point, buffer in buffers.items()}

    def notes(self, task: Task) -> dict[str, Any]:
        """Where the next window starts, and what byte identity is promised for: device kind, precision, batch shape."""
        made = {
            "device": self.model.device.type, "dtype": self.model.recipe()["dtype"], "contexts": self.batch,
        }  # fmt: skip
        return {"next": task.end._asdict(), "made": made}

    def _identity(self, task: Task, batches: int) -> Recipe:
        """All that decides the bits of a window's rows beside the store's recipe, as far as can be known."""
        span = [task.rows, *task.start, *task.end]
        return {"span": span, "batches": batches, "made": self.notes(task)["made"], "versions": versions()}

    def _batches(self, task: Task) -> list["Batch"]:
        first, last = task.start.context, task.end.context + (task.end.row > 0)
        parts = -(-(last - first) // self.batch)
        bounds = [first + (last - first) * i // parts for i in range(parts + 1)]
        batches: list[Batch] = []
        rows = 0
        for start, stop in itertools.pairwise(bounds):
            tokens, mask = self.rows.batch(start, stop)
            keep = np.flatnonzero(mask)[task.start.row if start == first else 0 :][: task.rows - rows]
            rows += len(keep)
            batches.append(Batch(tokens, keep, start * tokens.shape[1] + keep, rows))
        assert rows == task.rows, (rows, task)
        return batches


class Batch(NamedTuple):
    """Contexts of one forward pass: tokens [n, T], which of the n * T become rows, the positions of these, and how many
    rows of the window there are after it."""

    tokens: np.ndarray
    keep: np.ndarray
    positions: np.ndarray
    end: int


@dataclass(frozen=True)
class Origin:
    """Where a worker process finds the model, and the canonical recipe that it must then have."""

    model: str
    revision: str | None
    dtype: str
    device: str
    offline: bool
    identity: str


@dataclass(frozen=True)
class Work:
    """What the windows of a harvest have in common, for a worker process."""

    origin: Origin
    tokens: Path
    stores: tuple[tuple[Point, Path], ...]
    rule: RowRule
    batch: int
    threads: int | None  # of a forward pass; None: as many as the dask worker has
    lease: Path


_turn = threading.Lock()


def harvest_window(work: Work, task: Task) -> dict[Point, Window]:
    """Compute a window and write its files, in a worker process: what the client commits."""
    paths = dict(work.stores)
    with _turn:  # a worker of several threads computes one window while it writes another
        expect_lease(work.lease)
        torch.set_num_threads(work.threads or _threads())
        passes = Passes(_model(work.origin), RowsOf(TokenStore(work.tokens), work.rule), work.batch)
        stores = {point: ActivationStore(paths[point]) for point in task.points}
        keeper = Keeper(note=lambda _: None, took=lambda _: None)
        arrays = passes.compute(task, stores, lambda _: expect_lease(work.lease), keeper)
    return {p: write_window(stores[p], task.window, arrays.pop(p), passes.notes(task)) for p in task.points}


def expect_lease(lease: Path) -> None:
    """Raise SaeError unless this process sees the lease of the client."""
    patience = time.monotonic() + PATIENCE
    while read(lease) is None:
        if time.monotonic() > patience:
            raise SaeError(
                f"a worker on {socket.gethostname()} does not see {lease.parent}; give all workers the file system of "
                "the cache, or `--cache` a place that all of them reach"
            )
        time.sleep(0.1)


@functools.lru_cache(maxsize=1)
def _model(origin: Origin) -> LanguageModel:
    """The model, loaded once in a worker process."""
    try:
        model = LanguageModel.boot(
            origin.model, device=origin.device, dtype=origin.dtype, revision=origin.revision, offline=origin.offline
        )
    except SaeError as error:
        raise type(error)(f"a worker on {socket.gethostname()} cannot load the model: {error}") from error
    if canonical(model.recipe()) != origin.identity:
        raise SaeError(
            f"--model {origin.model}: a worker on {socket.gethostname()} has other weights of that name; give all "
            "machines the same"
        )
    return model


def _threads() -> int:
    from distributed import get_worker

    return int(get_worker().state.nthreads)
