"""Inspects a damaged store: what can still be read of it, and which bytes differ from what was committed.

A store whose manifest has damaged lines cannot be opened; its other lines say as much as ever. A lost window is known
by the gap it leaves; after the last good line, by a line too many and by its first chunk on the disk.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from sae.cache import catalogue
from sae.cache.disk.paths import is_remote, listing
from sae.cache.errors import DamagedStore
from sae.cache.store.manifest import MANIFEST, Manifest, Window, end_line, lines_of, read_line, read_manifest
from sae.cache.store.store import HINTS, REQUEST, Store

THREADS = 8  # reading waits for disks and networks; checking costs 0.2 s of one core a GB


@dataclass(frozen=True)
class DamagedStoreView:
    """A store as far as it can be read. Windows of `lost` have no line: empty ones stand in for them.

    `lines` says, line by line, what is wrong with the manifest. `open_end`: nothing says where the last window ends.
    """

    store: Store
    lost: frozenset[int] = frozenset()
    lines: tuple[str, ...] = ()
    open_end: bool = False
    link: Path | None = None  # on the way to it: nothing is written through that

    @cached_property
    def files(self) -> dict[str, int]:
        """Every file that can be checked, with its size. Zarr's metadata follows a whole manifest, so only then."""
        sizes = {name: size for window in self.store.manifest.windows for name, (size, _) in window.files.items()}
        described = {} if self.lines else {name: len(data) for name, data in self.store.metadata().items()}
        described |= {name: 0 for name in (REQUEST, HINTS) if (self.store.path / name).exists()}
        return described | {name: sizes.get(name, 0) for name in self.store.committed_files()}


class Finding(NamedTuple):
    """A damaged file, and what is wrong with it in one line."""

    store: Store
    name: str
    says: str


def inspect_damage(folder: Path) -> DamagedStoreView:
    """Return what is left of the store in a folder. Raises DamagedStore where its recipe cannot be read."""
    links = [] if is_remote(folder) else [path for path in (folder, folder.parent) if path.is_symlink()]
    return replace(_inspect(folder), link=links[0] if links else None)


def _inspect(folder: Path) -> DamagedStoreView:
    path = folder / MANIFEST
    try:
        store = catalogue.opened(folder)
        if not _is_doubtful(store):
            return DamagedStoreView(store)
        why = f"{path}: lists less than is on the disk, and no zarr.json can be read that would say how much there was"
    except DamagedStore as error:
        why = str(error)
    empty = catalogue.opened(folder, Manifest())  # raises again where it is not the manifest
    lines = lines_of(read_manifest(folder))
    most = len(lines) + len(listing(folder))  # windows that can have been: what a line says is not all believed
    windows: dict[int, Window] = {}
    end: int | None = None
    wrong: list[str] = []
    tail: list[bytes] = []  # damaged lines after the last good one
    for number, text in enumerate(lines, 1):
        line = read_line(text)
        if isinstance(line, Window):
            line = line if line.index < most and empty.fits(line) else None
        elif line is not None and line > empty.windows.start(most):
            line = None
        if isinstance(line, Window):
            windows[line.index], tail = line, []
        elif line is not None:
            end, tail = line, []
        else:
            wrong.append(f"{path}: line {number} is damaged; `verify()` tells more")
            tail.append(text)
    whole = max(windows, default=-1) + 1
    rows = windows[whole - 1].stop if whole else 0
    count, closed = whole, end is not None
    for text in tail if end is None else ():
        if _was_end(text, rows):
            closed = True
        elif _is_on_disk(empty, count):
            count += 1
    shown = max(empty.rows_by_metadata().values(), default=0)  # lines may be gone without a trace
    while (empty.windows.start(count) < shown or not empty.rows_by_metadata()) and _is_on_disk(empty, count):
        count += 1
    short = count > 0 and empty.windows.start(count - 1) < shown < empty.windows.start(count)
    closed = closed or short or empty.closed_by_metadata()
    if closed and end is None:
        end = shown if shown > rows else rows if count == whole else None
    count = max(count, 0 if end is None else empty.windows.count(end))
    every = tuple(windows.get(index) or _stand_in(empty, index, end) for index in range(count))
    store = catalogue.opened(folder, Manifest(every, closed))
    lost = frozenset(range(count)) - windows.keys()
    return DamagedStoreView(store, lost, tuple(wrong or [why]), end is None and count - 1 in lost)


def verify(stores: Sequence[DamagedStoreView], advance: Callable[[int], None]) -> list[Finding]:
    """Read every file of some stores; the damaged ones, in order. `advance` is told the bytes of each that was read."""
    work = [(one.store, name, size) for one in stores for name, size in one.files.items()]
    found: list[Finding] = []
    pool = ThreadPoolExecutor(THREADS)
    try:
        for (store, name, size), says in zip(work, pool.map(lambda file: file[0].damage(file[1]), work), strict=True):
            found += [Finding(store, name, says)] if says is not None else []
            advance(size)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files in hand, not for all
    return found


def _was_end(text: bytes, rows: int) -> bool:
    """Return True if a damaged line was the one that closes a store of so many rows: short, and half of it readable."""
    return len(text) <= len(end_line(rows)) + 1 and (b'"end":' in text or f":{rows}}}}}".encode() in text)


def _is_doubtful(store: Store) -> bool:
    """Return True if windows may have lost their lines unnoticed: their chunks are there, and nothing witnesses the
    number."""
    return not store.closed and not store.rows_by_metadata() and _is_on_disk(store, len(store.manifest.windows))


def _is_on_disk(store: Store, window: int) -> bool:
    """Return True if a window was written: the first chunk of one of its arrays is there."""
    start = store.windows.start(window)
    growing = [spec for spec in store.arrays.values() if spec.grows]
    return any((store.path / spec.chunk_file(start // spec.chunk_rows)).exists() for spec in growing)


def _stand_in(store: Store, index: int, end: int | None) -> Window:
    """A window of which nothing is known but its bounds."""
    start, stop = store.windows.bounds(index)
    return Window(index, start, stop if end is None else min(stop, end), {}, {})
