"""A store as it is written: one holder of the lock, healing what a crash left, committing whole windows in order.

A window's files are written first (`write_window`, which any process may do for windows of its own), then its line is
appended to the manifest (`Writer.commit`, in the process that holds the lock).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from sae.cache.disk import removal
from sae.cache.disk.durable import checksum, expect_no_link, read, write_in
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.disk.identity import key as store_key
from sae.cache.disk.locks import Lock
from sae.cache.disk.paths import is_remote, listing
from sae.cache.errors import SaeError
from sae.cache.store import manifest, scratch
from sae.cache.store.arrays import ArraySpec
from sae.cache.store.contents import is_chunk, is_own, is_temporary
from sae.cache.store.head import RECIPE, head_bytes
from sae.cache.store.manifest import Manifest, Window
from sae.cache.store.notes import write_note
from sae.cache.store.store import HINTS, REQUEST, Store

WRITERS = min(16, max(8, os.cpu_count() or 1))  # files encoded and flushed side by side: the disk is waited for, too


@dataclass(frozen=True)
class Permuted:
    """Rows in another order than they are held in: row i is values[order[i]]. A slice of them is gathered anew."""

    values: np.ndarray
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.take(self.values, self.order[rows], axis=0)


Arrays = Mapping[str, np.ndarray | Permuted]
"""The rows of a window by array."""


class Writer:
    """The writing side: takes the lock, heals what a crash left, appends whole windows.

    Use as a context manager. `store` is the reading side and follows every commit.
    """

    store_class: ClassVar[type[Store]]

    def __init__(self, root: Path, slug: str, recipe: Recipe, *, wait: bool = False) -> None:
        self.path = root / self.store_class.kind / store_key(slug, recipe)
        self._recipe, self._slug = recipe, slug
        try:
            self.store_class.expect(recipe)
        except ValueError as error:  # before anything is written
            raise SaeError(f"{slug}: cannot be stored: {error}") from error
        self._lock = Lock(self.path, wait=wait)

    def __enter__(self) -> Self:
        expect_no_link(self.path.parent)
        self._finish_removals()
        self._expect_room()
        self._lock.__enter__()
        try:
            if not (self.path / RECIPE).exists():
                write_in(self.path, RECIPE, head_bytes(self.store_class.kind, self._slug, self._recipe))
            self.store = self.store_class(self.path)
            if canonical(self.store.recipe) != canonical(self._recipe):
                raise SaeError(f"{self.path}: holds another recipe of the same hash; remove it or take another cache")
            self._heal()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, SaeError):
                # a store that never had a row would only be in the way; where the folder is another one by now, holds
                # what is not ours, or the disk refuses this as well, it stays
                with suppress(SaeError):
                    if not Manifest.read(self.path).rows and not scratch.kept(self.path):
                        removal.remove(self.path, is_own, self._lock)
        finally:
            self._lock.__exit__(kind, error, trace)

    @property
    def notice(self) -> str | None:
        """A line for the user about how this store was found."""
        return self._lock.stale

    def request(self, rows: int) -> None:
        """Note how many rows are wanted, so that an interrupted store is known as incomplete."""
        write_note(self.path / REQUEST, {"rows": rows})

    def hint(self, **where: str) -> None:
        """Note where things named by the recipe were found. A path that is no text cannot be noted; it is asked for."""
        write_note(self.path / HINTS, {name: path for name, path in where.items() if path.isprintable()})

    def append(self, arrays: Arrays, notes: dict[str, Any]) -> Window:
        """Write and commit the next window. Returns when it survives `kill -9` and a power cut."""
        self._lock.confirm()
        return self.commit(write_window(self.store, len(self.store.manifest.windows), arrays, notes))

    def commit(self, window: Window) -> Window:
        """Count a written window as there: from here on its rows exist."""
        before = self.store.manifest
        assert window.index == len(before.windows) and window.start == before.rows and not before.closed, (
            "windows are committed in order, and only the last one of a closed store may be short"
        )
        self._lock.confirm()
        manifest.commit(self.path, window)
        self._published()
        return window

    def close(self) -> None:
        """Say that the source has ended: the store is all there will ever be."""
        self._lock.confirm()
        manifest.close(self.path, self.store.n_rows)
        self._published()

    def _published(self) -> None:
        """Take up what the manifest now says, and bring the Zarr metadata to it."""
        self.store = self.store.refreshed()
        stale = [(n, d) for n, d in self.store.metadata().items() if read(self.path / n) != d]
        with ThreadPoolExecutor(WRITERS) as pool:
            for done in [pool.submit(write_in, self.path, name, data) for name, data in stale]:
                done.result()

    def _heal(self) -> None:
        """Remove what a crash left half done: temporary files, chunks no manifest line lists, stale metadata.

        What is kept of a window that is not committed yet stays: whoever computes it takes it up.
        """
        listed = set(self.store.committed_files())
        coming = None if self.store.closed else len(self.store.manifest.windows)
        for name in listing(self.path):
            wanted = scratch.is_wanted(name, coming)
            if (is_temporary(name) and not wanted) or (is_chunk(name) and name not in listed):
                expect_no_link(self.path, name)
                (self.path / name).unlink()
        self._published()

    def _finish_removals(self) -> None:
        """Complete the removals beside this store that were cut short, its own among them."""
        if is_remote(self.path) or self.path.parent.is_dir():
            removal.finish(self.path.parent, is_own)

    def _expect_room(self) -> None:
        """Raise SaeError where the place of a store that is to be begun holds what is not a store's."""
        expect_no_link(self.path)
        if (self.path / RECIPE).exists() or not self.path.exists():
            return
        found = removal.strangers(self.path, is_own) if self.path.is_dir() else [""]
        if found:
            raise SaeError(f"{self.path / found[0]}: is in the place of a store to be written; move it away and repeat")


def write_window(store: Store, index: int, arrays: Arrays, notes: dict[str, Any]) -> Window:
    """Make the files of window `index` durable, for `Writer.commit` to count: the rows of every growing array, as many
    for each, and in window 0 the others.

    Needs no lock, since windows are disjoint files: several processes may each write windows of their own.
    """
    start, stop = store.windows.bounds(index)
    specs = store.arrays
    counts = {len(rows) for name, rows in arrays.items() if specs[name].grows}
    assert len(counts) == 1, counts
    assert set(arrays) == {s.name for s in specs.values() if s.grows or index == 0}, sorted(arrays)
    rows = counts.pop()
    assert 0 < rows <= stop - start, (rows, start, stop)

    def write(file: tuple[str, Callable[[], bytes]]) -> tuple[str, tuple[int, str]]:
        name, encode = file
        data = encode()
        write_in(store.path, name, data)
        return name, (len(data), checksum(data))

    with ThreadPoolExecutor(WRITERS) as pool:  # flushing to the disk is mostly waiting
        files = dict(pool.map(write, encoders(store, index, arrays).items()))
    return Window(index, start, start + rows, files, notes)


def encoders(store: Store, index: int, arrays: Arrays) -> dict[str, Callable[[], bytes]]:
    """The files of window `index`, each with what makes its bytes."""
    start = store.windows.start(index)
    return {
        file: partial(_encoded, store.arrays[name], values, rows)
        for name, values in arrays.items()
        for file, rows in _chunks(store.arrays[name], len(values), start)
    }


def _encoded(spec: ArraySpec, values: np.ndarray | Permuted, rows: slice) -> bytes:
    return spec.encode(values[rows])


def _chunks(spec: ArraySpec, rows: int, start: int) -> Iterator[tuple[str, slice]]:
    """(file, which rows) of every chunk of an array's new rows, the first of which is row `start` of the store."""
    first = start // spec.chunk_rows if spec.grows else 0
    for i in range(-(-rows // spec.chunk_rows)):
        yield spec.chunk_file(first + i), slice(i * spec.chunk_rows, (i + 1) * spec.chunk_rows)
