"""The contract of a format, and reading and writing by whichever fits.

A format is one file in this package with a class under @register: how one tool lays out a trained dictionary. It
translates between that tool's names and the terms of `pipeline.saes.inference`, so a format knows no architecture, and
an architecture no format. What is read is anyone's: it is never unpickled, its types, shapes and numbers are checked,
and whatever is not as it should be is one SaeError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from sae.cache.disk.durable import unreadable
from sae.cache.errors import NotFound, SaeError
from sae.pipeline.declared.importing import enter
from sae.pipeline.saes.clt import CLT
from sae.pipeline.saes.contract import LatentCoder
from sae.pipeline.saes.dictionary import Dictionary, FixedDictionary, Metadata
from sae.pipeline.saes.inference import Formula

__all__ = ["FORMATS", "Format", "Metadata", "Reading", "detect", "read", "register", "write", "write_set"]


class Reading(NamedTuple):
    """The result of reading: the dictionary, on the CPU in float32 and in evaluation mode, and where it belongs."""

    dictionary: Dictionary
    metadata: Metadata


class Format(ABC):
    """One tool's layout of a folder. The first sentence of its docstring is what `sae list` shows."""

    name: ClassVar[str]
    holds: ClassVar[tuple[str, ...]] = ()
    """Names of the files that make a folder one of these, all of them."""
    several_stores: ClassVar[bool] = False
    """Whether it has dictionaries whose rows are of several stores."""

    def detects(self, path: Path) -> bool:
        """Return True if a folder (or a file, of a tool that keeps many in one folder) is laid out like this."""
        return bool(self.holds) and all((path / name).is_file() for name in self.holds)

    @abstractmethod
    def formula(self, path: Path) -> tuple[Formula, Metadata]:
        """Read the files. Raises ValueError, in a few words, where they hold no dictionary that can be computed."""

    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        """Write the files into a folder. Raises ValueError where the tool has no words for such a dictionary."""
        raise ValueError("its layout is read alone")

    def write_set(self, parts: Sequence[tuple[Formula, Metadata]], folder: Path) -> None:
        """Write several dictionaries into one folder, of a tool that keeps sets. Raises ValueError likewise."""
        if len(parts) != 1:
            raise ValueError("a folder of it holds one dictionary; write each into a folder of its own")
        self.write(*parts[0], folder)

    def write_layers(self, clt: CLT, folder: Path) -> None:
        """Write a cross-layer transcoder. Raises ValueError where the tool has no words for it."""
        raise ValueError("it has no cross-layer transcoders")


FORMATS: dict[str, Format] = {}
"""Every registered format by its name."""

F = TypeVar("F", bound=type[Format])


def register(format: F) -> F:
    """Class decorator: make a format known under its name, which must be nobody else's."""
    enter(FORMATS, "format", format.name, format())
    return format


def detect(path: Path | str) -> Format:
    """The format of a folder or file. Raises NotFound where there is none, SaeError where it has no known format."""
    folder = Path(path)
    try:
        if not folder.exists():
            raise NotFound(f"{path}: is not a folder on this machine; name the one that holds a dictionary's files")
        found = [format for format in FORMATS.values() if format.detects(folder)]
    except OSError as error:
        raise unreadable(error, folder) from error
    if not found:
        raise SaeError(f"{path}: holds no dictionary in a format that is known; those are {', '.join(sorted(FORMATS))}")
    return found[0]


def read(path: Path | str) -> Reading:
    """The dictionary in another tool's files, in the units of that tool's data. Raises SaeError where there is none.

    Weights of other precisions become float32.
    """
    format = detect(path)
    try:
        formula, metadata = format.formula(Path(path))
    except SaeError:
        raise
    except ValueError as error:
        raise SaeError(f"{path}: is not a {format.name} dictionary that can be read: {error}") from error
    dictionary = FixedDictionary(formula)
    dictionary.metadata = metadata
    return Reading(dictionary, metadata)


def write(dictionary: LatentCoder, metadata: Metadata, path: Path | str, format: str = "saelens") -> None:
    """Write a dictionary into a new or empty folder, as the format's tool opens it; errors as of `write_set`."""
    write_set([(dictionary, metadata)], path, format)


def write_set(parts: Sequence[tuple[LatentCoder, Metadata]], path: Path | str, format: str) -> None:
    """Write dictionaries into a new or empty folder, several where the format keeps sets of them.

    Raises SaeError where the folder holds something, or the tool has no words for such dictionaries.
    """
    if format not in FORMATS:
        raise SaeError(f"{format}: unknown format; those are {', '.join(sorted(FORMATS))}")
    folder = Path(path)
    try:
        vacant = not (folder.exists() or folder.is_symlink()) or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise unreadable(error, folder) from error
    if not vacant:
        raise SaeError(f"{path}: is there already; name a folder that is not there or is empty")
    try:
        if any(isinstance(dictionary, CLT) for dictionary, _ in parts):
            if len(parts) > 1:
                raise ValueError("a cross-layer transcoder is of all layers; write it into a folder of its own")
            ((clt, metadata),) = parts
            assert isinstance(clt, CLT), "the only one"
            clt.metadata = metadata
            FORMATS[format].write_layers(clt, folder)
            return
        formulas = []
        for one, metadata in parts:
            if not isinstance(one, Dictionary):
                raise ValueError(f"it has sparse dictionaries, and a {type(one).__name__} is none")
            formulas.append((one.formula(), metadata))
        if any(formula.of_several_stores for formula, _ in formulas) and not FORMATS[format].several_stores:
            raise ValueError("it has none whose rows are of several stores")
        FORMATS[format].write_set(formulas, folder)
    except SaeError:
        raise
    except ValueError as error:
        what = "this dictionary" if len(parts) == 1 else "these dictionaries"
        raise SaeError(f"{path}: not written, {format} cannot say {what}: {error}") from error
