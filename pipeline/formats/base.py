"""What a format is, and reading and writing by whichever fits.

A format is one file in this package with a class under @register: how one tool lays out a trained dictionary. It
translates between that tool's names and the terms of `pipeline.saes.inference`, so a format knows no architecture, and
an architecture no format. What is read is anyone's: it is never unpickled, its types, shapes and numbers are checked,
and whatever is not as it should be is one SaeError.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from sae.cache.disk.durable import unreadable
from sae.cache.errors import NotFound, SaeError
from sae.pipeline.saes.dictionary import Dictionary, FixedDictionary, Metadata
from sae.pipeline.saes.inference import Formula

__all__ = ["FORMATS", "Format", "Metadata", "Reading", "detect", "read", "register", "write"]


class Reading(NamedTuple):
    """What was read: the dictionary, on the CPU in float32 and in evaluation mode, and where it belongs."""

    dictionary: Dictionary
    metadata: Metadata


class Format(ABC):
    """One tool's layout of a folder. The first sentence of its docstring is what `sae list` shows."""

    name: ClassVar[str]

    @abstractmethod
    def detects(self, folder: Path) -> bool:
        """Return True if a folder is laid out like this, by the names of its files."""

    @abstractmethod
    def formula(self, folder: Path) -> tuple[Formula, Metadata]:
        """What the files say. Raises ValueError, in a few words, where that is no dictionary that can be computed."""

    @abstractmethod
    def write(self, formula: Formula, metadata: Metadata, folder: Path) -> None:
        """Write the files into a folder. Raises ValueError where the tool has no words for such a dictionary."""


FORMATS: dict[str, Format] = {}
"""Every registered format by its name."""

F = TypeVar("F", bound=type[Format])


def register(format: F) -> F:
    """Class decorator: make a format known under its name."""
    assert format.name not in FORMATS, f"the name {format.name!r} is taken"
    FORMATS[format.name] = format()
    return format


def detect(path: Path | str) -> Format:
    """The format of a folder. Raises NotFound where there is no folder, SaeError where it has no known format."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            raise NotFound(f"{path}: is no folder on this machine; name the one that holds a dictionary's files")
        found = [format for format in FORMATS.values() if format.detects(folder)]
    except OSError as error:
        raise unreadable(error, folder) from error
    if not found:
        raise SaeError(f"{path}: holds no dictionary in a format that is known; those are {', '.join(sorted(FORMATS))}")
    return found[0]


def read(path: Path | str) -> Reading:
    """The dictionary in another tool's folder, in the units of that tool's data. Raises SaeError where there is none.

    Weights of other precisions become float32.
    """
    format, folder = detect(path), Path(path)
    try:
        formula, metadata = format.formula(folder)
    except SaeError:
        raise
    except ValueError as error:
        raise SaeError(f"{path}: is no {format.name} dictionary that can be read: {error}") from error
    dictionary = FixedDictionary(formula)
    dictionary.metadata = metadata
    return Reading(dictionary, metadata)


def write(dictionary: Dictionary, metadata: Metadata, path: Path | str, format: str = "saelens") -> None:
    """Write a dictionary into a new or empty folder, as the format's tool opens it.

    Raises SaeError where the folder holds something, or the tool has no words for such a dictionary.
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
        FORMATS[format].write(dictionary.formula(), metadata, folder)
    except SaeError:
        raise
    except ValueError as error:
        raise SaeError(f"{path}: not written, {format} cannot say this dictionary: {error}") from error
