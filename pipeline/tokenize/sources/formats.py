"""Documents of one local file, by its suffix.

A reader yields (document, place): the place is where the next document begins, and reading from there gives the rest.
Memory holds a document (or a batch of rows), not a file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from sae.cache.errors import SaeError
from sae.pipeline.tokenize.sources import lines, tables
from sae.pipeline.tokenize.sources.base import Document
from sae.pipeline.tokenize.sources.opened import COMPRESSED, File

Reader = Callable[[File, int, str], Iterator[tuple[Document, int]]]
READERS: dict[str, Reader] = {
    ".parquet": tables.parquet,
    ".arrow": tables.arrow,
    ".jsonl": lines.json_lines,
    ".ndjson": lines.json_lines,
    ".json": lines.json_texts,
    ".csv": tables.separated,
    ".tsv": tables.separated,
    ".txt": lines.plain,
}
_SEEKING = (".parquet", ".arrow")  # read from the file itself, never from a stream


def kind(file: File) -> str | None:
    """The suffix that decides how a file is read, or None for one that is not text as we know it."""
    name = file.path.name.lower()
    bare = name
    for suffix in COMPRESSED:
        bare = bare.removesuffix(suffix)
    found = Path(bare).suffix
    return found if found in READERS and (bare == name or found not in _SEEKING) else None


def read(file: File, place: int, column: str) -> Iterator[tuple[Document, int]]:
    """(document, place of the next one) from `place` on; null and empty records give an empty text.

    Raises SaeError, in one line, for bytes that are damaged or not what the file's name says.
    """
    import pyarrow
    import zstandard

    found = kind(file)
    assert found is not None
    try:
        for one, after in READERS[found](file, place, column):
            yield one, after
            place = after
    except SaeError:
        raise
    except (EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        if file.is_pointer():
            raise file.error("is only a pointer of git-lfs; run git lfs pull") from error
        raise file.error(f"damaged, or not what its name says: {_first_line(error)}") from error
    except OSError as error:
        raise file.error(f"cannot be read: {error.strerror or _first_line(error)}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # what a library made of odd data and nobody foresaw
        raise file.error(f"cannot be read behind place {place}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
