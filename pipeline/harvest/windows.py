"""One window of a harvest: its rows computed, encoded, its files written. In any process.

A window's bytes depend on the recipe, the window and how the source cuts it alone: an interrupted, a grown, a
distributed and an uninterrupted harvest write the same. What a window's rows have become is kept on the disk while it
takes long (`pipeline.harvest.keeping`).

A worker process writes files of windows that only the client commits. It may do so while the client's lease exists, a
file in the store: so it proves that it sees the client's file system, and stops when the client has gone. (The next
writer of a store removes a lease that was left behind.)
"""

import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import read
from sae.cache.errors import SaeError
from sae.cache.store.manifest import Window
from sae.cache.store.writer import Arrays, write_window
from sae.cache.window_buffer import Memory, WindowBuffer
from sae.pipeline.harvest.keeping import Keeper
from sae.pipeline.harvest.keeping import Window as KeptWindow
from sae.pipeline.harvest.sources import RowSource, Stream, WindowTask
from sae.pipeline.parallel.dask_workers import versions

PATIENCE = 5.0  # seconds a network file system may take to show a new file


def compute(
    source: RowSource, task: WindowTask, stores: Mapping[str, ActivationStore], done: Callable[[int], None],
    keeper: Keeper | None = None, memory: Memory | None = None,
) -> dict[str, WindowBuffer]:  # fmt: skip
    """The window's rows for every stream, some of them still on their way from a device: `arrays_of` waits for them.

    Calls `done` with the number of rows after each part.

    Stores must hold window 0 for any later one: it calibrates their columns. With a keeper, what there is of a long
    window is kept in the stores' folders, and what was kept before is taken up.
    """
    buffers = {
        name: WindowBuffer(
            stores[name], task.window, task.rows, stores[name].columns if stores[name].n_rows else None, memory
        )
        for name in task.streams
    }
    parts = list(source.window(task))
    ends = np.cumsum([len(part.position) for part in parts]).tolist()
    assert ends[-1:] == [task.rows], (ends[-1:], task)
    window = None
    if keeper is not None:
        span = [task.rows, *task.start, *task.end]
        made = {"span": span, "batches": len(parts), "made": source.notes(task).get("made"), "versions": versions()}
        positions = np.concatenate([part.position for part in parts])
        folders = {name: stores[name].path for name in task.streams}
        window = KeptWindow(keeper, task.window, made, folders, buffers, positions, ends)
        window.take_up()
    for part, end in zip(parts, ends, strict=True):
        lacking = [name for name in task.streams if buffers[name].filled < end]
        if not lacking:
            continue
        for name, values in part.values(lacking):
            of_toy = None if part.coefficients is None else part.coefficients(name)
            buffers[name].add(values, part.position, of_toy)
        done(len(part.position))
        if window is not None:
            window.after_batch()
    return buffers


def arrays_of(source: RowSource, task: WindowTask, buffers: Mapping[str, WindowBuffer]) -> dict[str, Arrays]:
    """The arrays of a computed window for every stream, as they are stored."""
    constants = {stream.name: _constants(stream) if task.window == 0 else {} for stream in source.streams}
    return {name: {**buffer.arrays(), **constants[name]} for name, buffer in buffers.items()}


def _constants(stream: Stream) -> dict[str, np.ndarray]:
    """Return what is known of how the rows were made, which window 0 has."""
    truth = {} if stream.truth is None else {"truth": stream.truth.numpy()}
    return truth if stream.toy is None else {**truth, "weight": stream.toy[0].numpy(), "bias": stream.toy[1].numpy()}


@dataclass(frozen=True)
class WindowJob:
    """The part that the windows of a harvest have in common, for a worker process."""

    source: Callable[[], RowSource]
    stores: tuple[tuple[str, Path], ...]
    threads: int | None  # that compute; None: as many as the dask worker has
    lease: Path


_turn = threading.Lock()


def harvest_window(job: WindowJob, task: WindowTask) -> dict[str, Window]:
    """Compute a window and write its files, in a worker process: what the client commits."""
    paths = dict(job.stores)
    with _turn:  # a worker of several threads computes one window while it writes another
        expect_lease(job.lease)
        torch.set_num_threads(job.threads or _threads())
        source = job.source()
        stores = {name: ActivationStore(paths[name]) for name in task.streams}
        keeper = Keeper(note=lambda _: None, took=lambda _: None)
        arrays = arrays_of(source, task, compute(source, task, stores, lambda _: expect_lease(job.lease), keeper))
    return {
        name: write_window(stores[name], task.window, arrays.pop(name), source.notes(task)) for name in task.streams
    }


def expect_lease(lease: Path) -> None:
    """Raise SaeError unless this process sees the lease of the client."""
    patience = time.monotonic() + PATIENCE
    while read(lease) is None:
        if time.monotonic() > patience:
            raise SaeError(
                f"a worker on {socket.gethostname()} does not see {lease.parent}; give all workers the file system of "
                "the cache, or `cache` a place that all of them reach"
            )
        time.sleep(0.1)


def _threads() -> int:
    from distributed import get_worker

    return int(get_worker().state.nthreads)
