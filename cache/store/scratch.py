"""Rows that have been computed of an unfinished window, beside its store's arrays, so that no end loses much of them.

    under-way-<window>.<start>-<stop>.partial    rows [start, stop) of the window, in the order they were computed

A file is a line that says what its numbers depend on (canonical JSON), the arrays one after the other, and the checksum
of all that. It is written whole or not at all. Nobody takes these rows for rows of the store: whoever computes the
window anew asks for the parts that follow each other from row 0 on, and gets back exactly the numbers that were kept,
or nothing where a byte or anything they depend on differs. They go when the window is committed, or is given up
(`sae cache gc`): then it is computed from its start.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sae.cache.disk.durable import PARTIAL, checksum, read, write_in
from sae.cache.disk.identity import Recipe, canonical

NAME = re.compile(rf"under-way-(\d{{1,9}})\.(\d{{1,12}})-(\d{{1,12}}){re.escape(PARTIAL)}")
CRC = 8  # letters of a checksum

Shape = tuple[str, tuple[int, ...]]  # of an array: NumPy's name of its type, and its axes


class Kept(NamedTuple):
    """A file of rows [start, stop) of a window."""

    path: Path
    window: int
    start: int
    stop: int


def kept(folder: Path) -> list[Kept]:
    """All such files in a store's folder."""
    found = []
    for path in folder.glob(f"under-way-*{PARTIAL}"):
        if named := NAME.fullmatch(path.name):
            window, start, stop = map(int, named.groups())
            found.append(Kept(path, window, start, stop))
    return found


def chain(folder: Path, window: int) -> list[Kept]:
    """The files that follow each other from the window's first row on, as far as they reach."""
    reaching: dict[int, Kept] = {}
    for one in kept(folder):
        if one.window == window and one.start < one.stop:
            reaching[one.start] = max(one, reaching.get(one.start, one), key=lambda part: part.stop)
    links: list[Kept] = []
    while (following := reaching.get(links[-1].stop if links else 0)) is not None:
        links.append(following)
    return links


def keep(folder: Path, window: int, start: int, stop: int, identity: Recipe, arrays: Sequence[np.ndarray]) -> None:
    """Make what rows [start, stop) of a window have become durable. `identity` is all that the numbers depend on."""
    data = b"".join([_head(identity), *(np.ascontiguousarray(array).tobytes() for array in arrays)])
    write_in(folder, f"under-way-{window}.{start}-{stop}{PARTIAL}", data + checksum(data).encode())


def take(part: Kept, identity: Recipe, shapes: Sequence[Shape]) -> list[np.ndarray] | None:
    """The arrays of a file; None where it is not what was written, or was written of something else."""
    head = _head(identity)
    sizes = [int(np.prod(axes)) * np.dtype(kind).itemsize for kind, axes in shapes]
    if part.path.stat().st_size != len(head) + sum(sizes) + CRC:
        return None
    data = read(part.path)
    if data is None or not data.startswith(head) or checksum(memoryview(data)[:-CRC]).encode() != data[-CRC:]:
        return None
    arrays, at = [], len(head)
    for (kind, axes), size in zip(shapes, sizes, strict=True):
        arrays.append(np.frombuffer(data, kind, count=int(np.prod(axes)), offset=at).reshape(axes))
        at += size
    return arrays


def remove(folder: Path, window: int, start: int = 0) -> None:
    """Remove what was kept of a window, from a row on."""
    for part in kept(folder):
        if part.window == window and part.start >= start:
            part.path.unlink(missing_ok=True)


def is_wanted(name: str, first: int | None) -> bool:
    """Return True if a file of a store's folder holds rows of a window from `first` on (None: the store is closed)."""
    named = NAME.fullmatch(name)
    return named is not None and first is not None and int(named[1]) >= first


def _head(identity: Recipe) -> bytes:
    return canonical(identity).encode() + b"\n"
