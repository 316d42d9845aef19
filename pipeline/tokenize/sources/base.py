"""The contract of a source of text, how one is found from `--source`, and the split into training and validation
documents.

A new source is one new file in this package with a function decorated by `source`; nothing else has to know of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sae.cache.errors import SaeError
from sae.pipeline.declared.importing import import_files

Document = str | np.ndarray  # text, or ready-made token ids (uint32)


class DocumentStream(Protocol):
    """Documents in a fixed order."""

    def __iter__(self) -> DocumentStream: ...

    def __next__(self) -> Document: ...

    def state(self) -> dict[str, Any]:
        """The place after the last document returned, as JSON; `TextSource.open(state)` continues there."""
        ...


class TextSource(Protocol):
    """A source of documents."""

    @property
    def slug(self) -> str:
        """Short readable name, for folders."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Identity, as JSON: everything that changes the text and nothing that does not (no absolute paths)."""
        ...

    def open(self, state: dict[str, Any] | None = None) -> DocumentStream:
        """From the beginning, or from the place `state` that a stream of the same source gave."""
        ...


@runtime_checkable
class Moving(TextSource, Protocol):
    """A source whose text may change under its name. `str()` is what `--source` reads it by as it is now."""

    def earlier(self, recipe: dict[str, Any]) -> TextSource | None:
        """The source as it was when it had that recipe; None where that recipe is not an older one of this source."""
        ...


class Unreachable(SaeError):
    """The error of a source whose content cannot be found out now."""


# resolve(spec, offline, column) -> the source, or None where `spec` is not its own; SaeError where it cannot be used.
Resolve = Callable[[str, bool, str], TextSource | None]


_LISTED = 30  # columns in a message


class Registered(NamedTuple):
    """One line of the registry: lower `order` is asked first; `help` is what `sae list` shows."""

    order: int
    name: str
    help: str
    resolve: Resolve


_REGISTRY: list[Registered] = []


def source(name: str, *, order: int, help: str) -> Callable[[Resolve], Resolve]:
    """Register a resolver. Order 0: fixed names and prefixes; 10: things on disk; 20: guesses such as `org/name`."""

    def register(resolve: Resolve) -> Resolve:
        _REGISTRY.append(Registered(order, name, help, resolve))
        return resolve

    return register


def registered() -> list[Registered]:
    """All sources, in the order in which they are asked."""
    import_files(__package__)
    return sorted(_REGISTRY)


def text_source(spec: str, *, offline: bool, column: str = "text") -> TextSource:
    """The source that `--source spec` names.

    `column` is the field that holds the text where documents are records (parquet, JSON, hub data sets).
    Raises SaeError where nothing goes by that name, or the thing it names cannot be read.
    """
    if not spec:
        raise SaeError("source = ...: is empty; try python, fineweb or a file")
    for entry in registered():
        found = entry.resolve(spec, offline, column)
        if found is not None:
            return found
    raise SaeError(
        f"source = {spec}: no such file, and not a source; try a file, a folder, a glob, "
        "org/name of a Hugging Face data set, python or fineweb"
    )


class Indexed:
    """A stream over documents held in memory; its state is the index of the next one."""

    def __init__(self, documents: Sequence[Document], state: dict[str, Any] | None = None) -> None:
        self._documents = documents
        self._next = 0 if state is None else int(state["document"])

    def __iter__(self) -> Indexed:
        return self

    def __next__(self) -> Document:
        if self._next >= len(self._documents):
            raise StopIteration
        self._next += 1
        return self._documents[self._next - 1]

    def state(self) -> dict[str, Any]:
        return {"document": self._next}


def is_validation(document: Document, fraction: float) -> bool:
    """Return True if a document belongs to the validation split.

    Decided by a hash of the text (or the token ids) alone, so a document keeps its side whatever the order, the source
    or the number of workers, exact copies fall on one side, and a larger `fraction` only adds documents. Never for 0,
    always for 1.
    """
    # Lone surrogates occur in scraped JSON and have no UTF-8 form; the hash must still be defined for them.
    content = (
        document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document.astype("<u4").tobytes()
    )
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def missing_column(name: str, column: str, columns: list[str]) -> SaeError:
    """The error for records without the text column; lists what they have."""
    there = ", ".join(columns[:_LISTED]) + (", ..." if len(columns) > _LISTED else "")
    return SaeError(f"source = {name}: no column {column!r}; it has {there or 'none'}; try `tokenize.column = NAME`")


def field(name: str, record: dict[str, Any], column: str) -> Any:
    """A record's value under a name, or under names inside one another (`doc.text`); None where a record is null."""
    if column in record:
        return record[column]
    value: Any = record
    for part in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or part not in value:
            raise missing_column(name, column, list(_names(record)))
        value = value[part]
    return value


def _names(record: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from _names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def document(name: str, column: str, value: Any, where: str) -> Document:
    """A column's value as text or token ids: null is empty, anything else than text and integers is refused."""
    if value is None:
        return ""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list) and all(type(one) is int for one in value):
        return token_ids(name, column, value, where)
    kinds = sorted({type(one).__name__ for one in value}) if isinstance(value, list) else []
    what = type(value).__name__ + (f" of {' and '.join(kinds)}" if kinds else "")
    raise SaeError(
        f"source = {name}: column {column!r} holds {what} ({where}), neither text nor token ids; name another column"
    )


def token_ids(name: str, column: str, ids: Sequence[int] | np.ndarray, where: str) -> np.ndarray:
    """uint32: ready-made token ids."""
    ends = () if not len(ids) else (ids.min(), ids.max()) if isinstance(ids, np.ndarray) else (min(ids), max(ids))
    wrong = next((i for i in ends if not 0 <= i < 1 << 32), None)
    if wrong is not None:
        raise SaeError(
            f"source = {name}: column {column!r} holds {wrong} ({where}), which is not a token id; name another column"
        )
    return np.asarray(ids, np.uint32)


def well_formed(text: str) -> str:
    """`text` with lone surrogates, which scraped JSON may hold and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
