"""Rows of a damaged activation store, made again by the source they came from (`cache.upkeep.repair` does the rest).

What the source finds has to be what the recipe says, or nothing is repaired.
"""

from functools import partial

from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.manifest import Manifest, Window
from sae.cache.store.store import Store
from sae.cache.upkeep.repair import RebuiltWindow
from sae.pipeline.harvest.sources import WindowTask, source_of
from sae.pipeline.harvest.windows import arrays_of, compute
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress


class RowMaker:
    """The windows of an activation store, computed as a harvest computes them."""

    def __init__(self, store: ActivationStore, origins: Origins, progress: Progress) -> None:
        self.store, self.progress, self.source = store, progress, source_of(store, origins)
        self.stream = self.source.streams[0].name

    def window(self, before: Store, window: Window, *, lost: bool) -> RebuiltWindow:
        assert isinstance(before, ActivationStore)
        task = self._task(before, window, lost)
        source = self.source.as_made(self.store.manifest.windows, window)
        try:
            kept = before.columns if before.n_rows else None
        except DamagedStore:  # to be made again
            kept = None
        stores = {self.stream: before if kept is not None else ActivationStore(before.path, Manifest())}
        self.progress.start(f"repair {self.store.key}", task.rows, "rows")
        try:
            buffers = compute(source, task, stores, partial(self.progress.advance, window=task.window))
            arrays = arrays_of(source, task, buffers)[self.stream]
        finally:
            self.progress.finish()
        if kept is not None and window.index == 0:
            arrays = {**arrays, "col_mean": kept.mean.numpy(), "col_scale": kept.scale.numpy()}
        return RebuiltWindow(arrays, source.notes(task))

    def file(self, name: str) -> bytes:
        raise AssertionError(f"activations have no {name}")

    def _task(self, before: ActivationStore, window: Window, lost: bool) -> WindowTask:
        """Return where a window starts and ends: the lines around it say so, or else the source has to count."""
        index, lines, folder = window.index, before.manifest.windows, self.store.path
        start = self.source.noted(lines[index - 1] if index else None, folder)
        end = None if lost else self.source.noted(lines[index], folder)
        rows = window.stop - window.start
        if start is None or end is None:
            supply = self.source.supply(self.store.split, "all")
            rows = min(window.stop, supply.rows) - window.start
            if rows <= 0:
                raise SaeError(
                    f"{folder}: window {index} was made from rows that its source does not have any more; "
                    f"{self.source.remedy(self.store.split, supply, window.stop)}"
                )
            start, end = start or supply.place(index), supply.place(index + 1)
        return WindowTask(self.store.split, index, rows, start, end, (self.stream,))
