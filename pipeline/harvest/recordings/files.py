"""Recordings in files: a table of numbers [steps, channels], or what MNE reads.

An .npz without the name of an array has a recording in each array [n, c].
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae.cache.errors import SaeError
from sae.pipeline.harvest.recordings.mne_files import SUFFIXES, Measured
from sae.pipeline.harvest.tables import KINDS, Choice, Table, opened

STEPS = 1 << 14  # read at a time, at most
VALUES = 1 << 20  # of all channels, read at a time, about
FORMATS = (*KINDS, *SUFFIXES)


@contextmanager
def of_recordings() -> Iterator[None]:
    """Let what is wrong with a table be said of a recording."""
    try:
        yield
    except SaeError as error:
        raise type(error)(str(error).replace("table = ", "recordings = ", 1)) from error


@dataclass(frozen=True)
class Recording:
    """A series of steps without a gap. rate: steps a second, as the file says; array: which one of an .npz."""

    path: Path
    table: Table
    rate: float | None = None
    array: str | None = None

    @property
    def where(self) -> str:
        """What messages call it."""
        return str(self.path) if self.array is None else f"{self.path} ({self.array})"

    @property
    def steps(self) -> int:
        return self.table.n

    @property
    def channels(self) -> list[str]:
        return self.table.names

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """The steps [start, stop) in order: float32 [n, channels], a few at a time. SaeError for what is no number."""
        stop, size = self.steps if stop is None else stop, max(1, min(STEPS, VALUES // len(self.channels)))
        for low in range(start, stop, size):
            with of_recordings():
                steps = self.table.rows(low, min(low + size, stop)).numpy()
            yield steps


def read(path: Path, array: str | None, columns: Choice) -> list[Recording]:
    """The recordings of a file. Raises SaeError where there is none, or what it has is no series."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES and array is not None:
        raise SaeError(f"harvest.array = {array}: a {suffix} file has one recording; leave it out")
    if suffix not in FORMATS and path.is_file():
        raise SaeError(f"recordings = {path}: is no recording; give one of {', '.join(FORMATS)}")
    with of_recordings():
        if suffix in SUFFIXES:
            measured = Measured(path, columns)
            found = [Recording(path, measured, measured.rate)]
        else:
            arrays = _arrays(path) if suffix == ".npz" and array is None else [array]
            found = [Recording(path, opened(path, name, columns), array=name) for name in arrays]
    for one in found:
        if len(one.channels) > one.steps:
            raise SaeError(
                f"recordings = {one.where}: has {one.steps:,} steps of {len(one.channels):,} channels; a series is "
                "[steps, channels], so transpose it"
            )
    return found


def _arrays(path: Path) -> list[str | None]:
    """The arrays of two axes in an .npz, in their order; [None] where there are not several."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if len(_shape(path, name)) == 2]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return [None]  # `opened` says what is wrong with it
    return [*names] if len(names) > 1 else [None]


def _shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of an array, by its head alone."""
    from numpy.lib import format as layout

    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = layout.read_magic(file)
        return (layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0)(file)[0]
