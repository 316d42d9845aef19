"""Rows of any source -> activation stores: one pass, one store for each of its streams.

A window of rows is the unit of work (`pipeline.harvest.windows`). Where each starts is known before anything is
computed, so windows are computed one after the other in this process, each written while the next is computed, or at
once by the workers of a cluster; this process holds the locks and commits them in order either way.
"""

import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk.durable import PARTIAL, write_atomic
from sae.cache.disk.paths import listing
from sae.cache.massive import FarRows, beyond_usual
from sae.cache.store import scratch
from sae.cache.store.contents import is_temporary
from sae.cache.store.space import expect_room
from sae.cache.window_buffer import Memory, WindowBuffer
from sae.pipeline.harvest.keeping import Keeper, rows_kept
from sae.pipeline.harvest.planning import Plan, planned
from sae.pipeline.harvest.sources import RowSource, WindowTask
from sae.pipeline.harvest.windows import WindowJob, arrays_of, compute, expect_lease, harvest_window
from sae.pipeline.parallel.dask_cluster import Cluster, connected
from sae.pipeline.runtime.interrupts import interruptible, telling
from sae.pipeline.runtime.progress import Progress

Writers = dict[str, ActivationWriter]  # by stream


@dataclass(frozen=True)
class HarvestResult:
    """The stores by split (empty for a dry run) and the plan that made them.

    far: rows of training stores, by key, that lie so far out that they hold much of the variance.
    """

    plans: list[Plan]
    stores: dict[str, list[ActivationStore]]
    far: dict[str, FarRows] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """Return what there is to say of the stores, for `--json`."""
        return {"far_rows": {key: rows.as_json() for key, rows in self.far.items()}}


def harvest(
    source: RowSource, root: Path, progress: Progress, *,
    dry_run: bool = False, wait: bool = False, workers: int = 1, scheduler: str | None = None,
) -> HarvestResult:  # fmt: skip
    """Make or continue one activation store for each stream and split of a source.

    The work is this process's, or that of `workers` processes on this machine, or of the workers of a dask `scheduler`.
    """
    jobs: list[_Job] = []
    plans: list[Plan] = []
    with ExitStack() as stack:
        for split in source.splits:  # all planned before the first is run: what cannot be done is said at once
            stack.enter_context(source.ready(split, progress))
            jobs.append(_Job(source, split, root, progress, wait))
            plans.append(jobs[-1].plan(timed=dry_run))
            progress.note(str(plans[-1]))
            if plans[-1].left_out:
                progress.note(f"{split}: {plans[-1].why}")
        if dry_run:
            return HarvestResult(plans, {})
        expect_room(root, sum(plan.new_bytes for plan in plans), "what harvest would add")
        work_left = any(plan.rows_to_do for plan in plans)
        cluster = stack.enter_context(connected(workers, scheduler, progress)) if work_left else None
        stores = {job.split: job.run(plan, cluster) for job, plan in zip(jobs, plans, strict=True)}
    for plan in plans:
        if plan.left_out:
            progress.note(f"{plan.split}: kept {plan.rows:,} rows, left out {plan.left_out:,} as said above")
    far = {
        store.key: found
        for store in stores.get("train", [])
        if (found := beyond_usual(store, store.n_rows)) is not None and found.notable
    }
    for key, found in far.items():
        progress.note(f"{key}: {found}; by default training {'leaves them out' if found.massive else 'keeps them'}")
    return HarvestResult(plans, stores, far)


@dataclass
class _Job:
    """One split's harvest: a source, and one writer for each of its streams."""

    source: RowSource
    split: str
    root: Path
    progress: Progress
    wait: bool

    def writers(self) -> Writers:
        return {
            stream.name: ActivationWriter(
                self.root, self.source.full_slug(stream, self.split), self.source.recipe(stream, self.split),
                wait=self.wait,
            )
            for stream in self.source.streams
        }  # fmt: skip

    def plan(self, *, timed: bool) -> Plan:
        self.supply = self.source.supply(self.split)
        folders = {name: writer.path for name, writer in self.writers().items()}
        return planned(self.source, self.split, self.supply, folders, self.progress, timed=timed)

    def run(self, plan: Plan, cluster: Cluster | None) -> list[ActivationStore]:
        """Write the windows the plan still lacks."""
        with ExitStack() as stack:
            writers = {name: stack.enter_context(writer) for name, writer in self.writers().items()}
            for writer in writers.values():
                if writer.notice:
                    self.progress.note(writer.notice)
                writer.request(max(plan.rows, writer.store.requested))
                if hints := self.source.hints():
                    writer.hint(**hints)
            tasks = self._tasks(plan, writers)
            stack.enter_context(telling(lambda: self._safe(plan, writers)))
            self._start(plan, self._committed(writers))
            try:
                if cluster is None:
                    self._alone(plan, tasks, writers)
                else:
                    self._together(cluster, tasks, writers)
            finally:
                self.progress.finish()
            for writer in writers.values():  # here, so that a store whose last window came earlier is closed, too
                if self.supply.ended and writer.store.n_rows == self.supply.rows and not writer.store.closed:
                    writer.close()
            return [writer.store for writer in writers.values()]

    def _tasks(self, plan: Plan, writers: Writers) -> list[WindowTask]:
        """The windows that some store lacks, in order."""
        there = {name: len(writer.store.manifest.windows) for name, writer in writers.items()}
        windows = next(iter(writers.values())).store.windows
        tasks = []
        for window in range(min(there.values()), windows.count(plan.rows)):
            start, stop = windows.bounds(window)
            place, end = self.supply.place(window), self.supply.place(window + 1)
            behind = tuple(name for name in writers if there[name] <= window)
            tasks.append(WindowTask(self.split, window, min(stop, plan.rows) - start, place, end, behind))
        return tasks

    def _start(self, plan: Plan, done: int) -> None:
        self.progress.start(f"harvest {plan.split}", plan.rows, "rows", done=done)

    def _committed(self, writers: Writers) -> int:
        return min(writer.store.n_rows for writer in writers.values())

    def _safe(self, plan: Plan, writers: Writers) -> str:
        """Return what an interruption leaves."""
        there = min(len(writer.store.manifest.windows) for writer in writers.values())
        kept = rows_kept([writer.path for writer in writers.values()], there)
        also = f", and {kept:,} of an unfinished window are kept to go on from" if kept else ""
        return f"{self._committed(writers):,} of {plan.rows:,} {plan.split} rows are committed{also}"

    def _alone(self, plan: Plan, tasks: Sequence[WindowTask], writers: Writers) -> None:
        """Compute in this process. A window is compressed and flushed while the next one is computed."""

        def append(task: WindowTask, buffers: dict[str, WindowBuffer]) -> None:
            arrays = arrays_of(self.source, task, buffers)
            for name in task.streams:
                writers[name].append(arrays.pop(name), self.source.notes(task))
                buffers.pop(name).release()

        def took(rows: int) -> None:
            self.progress.finish()  # begun anew, so that its rate is that of what is computed now
            self.progress.note(f"{rows:,} rows of an unfinished window were kept and are taken up")
            self._start(plan, self._committed(writers) + rows)

        with interruptible() as stopping, ThreadPoolExecutor(1) as committing:
            keeper, memory = Keeper(self.progress.note, took, stopping), Memory()
            under_way: Future[None] | None = None
            try:
                for task in tasks:
                    if under_way is not None and task.window == 1:  # window 0 has the columns later ones are coded by
                        under_way.result()
                    advance = partial(self.progress.advance, window=task.window)
                    stores = {name: writers[name].store for name in task.streams}
                    buffers = compute(self.source, task, stores, advance, keeper, memory)
                    if under_way is not None:
                        under_way.result()
                    under_way = committing.submit(append, task, buffers)
            finally:
                if under_way is not None:
                    under_way.result()

    def _together(self, cluster: Cluster, tasks: Sequence[WindowTask], writers: Writers) -> None:
        """Give the windows to workers, which write their files, and commit them here, in order.

        Window 0 comes before all others, which are coded by its columns.
        """
        with self._lease(writers) as lease:
            cluster.everywhere(expect_lease, lease)
            job = WindowJob(
                self.source.elsewhere(), tuple((name, writer.path) for name, writer in writers.items()), lease=lease,
                threads=max(1, torch.get_num_threads() // cluster.size) if cluster.is_local else None,
            )  # fmt: skip
            call = partial(harvest_window, job)
            for part in ([t for t in tasks if t.window == 0], [t for t in tasks if t.window > 0]):
                for task, windows in cluster.ordered(call, part, lambda size: size + 1, lambda t: f"window {t.window}"):
                    for name, window in windows.items():
                        writers[name].commit(window)
                    self.progress.advance(task.rows, window=task.window)

    @contextmanager
    def _lease(self, writers: Writers) -> Iterator[Path]:
        """The file that lets workers write; then, what workers that died left half written is removed
        (what they kept of unfinished windows is not)."""
        folders = [writer.path for writer in writers.values()]
        lease = folders[0] / f"lease-{secrets.token_hex(8)}{PARTIAL}"
        write_atomic(lease, b"while this file is here, workers may write")
        try:
            yield lease
        finally:
            lease.unlink(missing_ok=True)
        for folder in folders:
            for name in listing(folder):
                if is_temporary(name) and not scratch.is_wanted(name, 0):
                    (folder / name).unlink(missing_ok=True)
