"""The folder of a run: how it begins, what its config.json says it is, and the JSON in it; `runs` has the rest.

A folder of another tool may lie among ours: it is told apart (`foreign`), and no run begins in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from sae.cache.disk import removal
from sae.cache.disk.durable import read, write_in
from sae.cache.disk.locks import LOCK, Lock
from sae.cache.disk.parsing import MOST_BYTES, as_written, inner, parsed_mapping, whole
from sae.cache.disk.processes import final_name
from sae.cache.disk.sealed import CRC, sealed, unsealed
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.seen import Seen

CONFIG = "config.json"


class RunFolder:
    """The folder of a run. Raises NotFound where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).exists():
            raise NotFound(f"{path}: is not a run folder (no {CONFIG}); `choices()` shows the runs")
        self.sealed = True  # whether its files carry checksums: those of version 0.1.0 do not
        try:
            self.config, self.sealed = _config(self._bytes(CONFIG))
            if not (self.sealed or self.foreign) and self.config.keys() != {"train", "activations"}:
                raise ValueError("its checksum is missing")
        except ValueError as error:
            if isinstance(error, SaeError):
                raise
            raise DamagedStore(
                f"{path / CONFIG}: is not what was written ({error}); a run keeps the settings it began with: put them "
                "back, and train others as a run of their own"
            ) from error
        self._made: bytes | None = None  # config.json, where this very object made the folder

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def foreign(self) -> bool:
        """Return True if the folder is another tool's, whose config.json is of something else."""
        return not (self.sealed or _is_ours(self.config))

    @property
    def decomposes(self) -> bool:
        """Return True if the run is of a decomposition of weights, not of a dictionary."""
        return not self.foreign and "decompose" in self.config

    @cached_property
    def imported(self) -> dict[str, Any] | None:
        """The facts about another tool's dictionary that this is the run of; None for one that is trained here."""
        with as_written(self.path / CONFIG):
            return inner(self.config, "imported") if "imported" in self.config else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of its training, as its stage reads them. Raises DamagedStore where there are none.

        Of an imported dictionary, what is known of it.
        """
        with as_written(self.path / CONFIG):
            if self.decomposes:
                return inner(self.config, "decompose")
            return inner(self.config, "train") if self.imported is None else self.imported

    @cached_property
    def revision(self) -> int:
        """Of what its settings mean, which its stage knows. Raises DamagedStore where it is no number."""
        with as_written(self.path / CONFIG):
            return whole(self.config, "revision", 1) if "revision" in self.config else 1

    @cached_property
    def seen(self) -> Seen:
        """The stores it was asked to be trained on. Raises DamagedStore where that is nothing that can be."""
        with as_written(self.path / CONFIG):
            return Seen.from_json(self.config)

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> Self:
        """A new run folder. Raises SaeError where one exists already, or something else of that name."""
        if not _is_vacant(path):
            run = cls(path) if (path / CONFIG).exists() else None
            what = f"is there, and is not a run (it has no {CONFIG})" if run is None else "exists"
            what = "is another tool's folder" if run is not None and run.foreign else what
            cure = "choose" if run is None or run.foreign or run.imported else "continue it with `resume` or choose"
            raise SaeError(f"name = {path.name}: {path} {what}; {cure} another `name`")
        removal.finish(path.parent, is_begun)
        data = sealed(config)
        with Lock(path):  # of two at once, one begins it
            if not _is_vacant(path):
                raise SaeError(f"name = {path.name}: {path} exists; continue it with `resume` or choose another `name`")
            write_in(path, CONFIG, data)
            run = cls(path)
        run._made = data
        return run

    def discard(self) -> None:
        """Remove a folder that this very object made, where there is nothing in it yet but what it was made with.

        Does nothing for any other folder, nor where another process has begun to train in it.
        """
        if self._made is None or not (self.path / CONFIG).exists():
            return
        with suppress(SaeError), Lock(self.path) as lock:  # it stays where another holds it, or it may not be removed
            if read(self.path / CONFIG) == self._made and not removal.strangers(self.path, is_begun):
                removal.remove(self.path, is_begun, lock)

    def lock(self) -> Lock:
        """Exclusive use for training."""
        return Lock(self.path)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder. Raises DamagedStore when it is not what was written."""
        data = self._bytes(name)
        with as_written(self.path / name):
            content, checked = unsealed(data)
            if self.sealed and not checked:
                raise ValueError("its checksum is missing")
            return content

    def _bytes(self, name: str) -> bytes:
        data = read(self.path / name, MOST_BYTES)
        if data is None:
            raise NotFound(f"{self.path / name}: not there yet")
        return data

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write a JSON file of the folder atomically. SaeError for NaN and infinity: they are not JSON."""
        path = self.path / name
        try:
            data = sealed(content)
        except ValueError as error:
            raise SaeError(
                f"{path}: not written, a figure is NaN or infinite; rows or weights hold numbers too large to square"
            ) from error
        return write_in(self.path, name, data)


def _config(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the content of a config.json, and whether it has a checksum. Raises ValueError where it is not ours.

    That of another tool may be JSON as Python writes it, with NaN and infinity.
    """
    try:
        return unsealed(data)
    except ValueError:
        with suppress(ValueError):
            said = parsed_mapping(data, nan_is_null=True)
            if CRC not in said and not _is_ours(said):
                return said, False
        raise


def _is_ours(config: dict[str, Any]) -> bool:
    """Return True if a config.json is that of a run, whatever else is wrong with it."""
    return "decompose" in config or ("activations" in config and ("train" in config or "imported" in config))


@contextmanager
def discarding(runs: Sequence[RunFolder]) -> Iterator[None]:
    """Remove, where an error ends this, the folders that were made for it and in which nothing came to be."""
    try:
        yield
    except Exception:
        for run in runs:
            run.discard()
        raise


def is_begun(name: str) -> bool:
    """Return True if a file of a run folder, named relative to it, is there before training begins."""
    return name in (CONFIG, LOCK) or final_name(name) == CONFIG


def _is_vacant(path: Path) -> bool:
    """Return True if nothing is at a path but what is left of a run that was killed while it was begun."""
    if path.is_symlink() or (path.exists() and not path.is_dir()) or (path / CONFIG).exists():
        return False
    return not path.exists() or not removal.strangers(path, is_begun)
