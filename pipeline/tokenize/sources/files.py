"""Local text: a file, a folder or a glob of parquet, arrow, JSON lines, JSON, CSV or plain text, compressed or not.

Files are read in the order of their names and streamed. Records whose text is null or empty are left out. A column may
be a field inside others (`doc.text`), and may hold ready-made token ids where it is not of text.

| suffix | a document is |
|---|---|
| `.parquet`, `.arrow` | the text column of a row |
| `.jsonl`, `.ndjson` (`.gz`, `.zst`) | the text field of a line, or a line that is a JSON string |
| `.json` (`.gz`, `.zst`) | an element of an array, a line, or the whole file where it is one object |
| `.csv`, `.tsv` (`.gz`, `.zst`) | the field of a row under the column's name in the first row |
| `.txt` (`.gz`, `.zst`) | what stands between lines that are `<|endoftext|>`; without any the file, cut at blank |
|                         | lines into parts of at least 1,000 bytes where it is longer than 64 KiB                |
"""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.cache.errors import SaeError
from sae.pipeline.tokenize.sources.base import Document, DocumentStream, TextSource, source
from sae.pipeline.tokenize.sources.folders import texts_in
from sae.pipeline.tokenize.sources.formats import READERS, kind, read
from sae.pipeline.tokenize.sources.opened import COMPRESSED, File

_KINDS = "parquet, arrow, jsonl, json, csv, tsv or txt (also .gz, .zst)"


class FileSource:
    """Documents of local files, in the order of the files' names."""

    def __init__(self, files: list[File], slug: str, column: str) -> None:
        self.files, self.slug, self.column = files, slug, column

    @functools.cached_property
    def _contents(self) -> list[dict[str, Any]]:
        import xxhash

        contents = []
        for file in self.files:
            digest, size = xxhash.xxh3_128(), 0
            try:
                with file.path.open("rb") as raw:
                    while block := raw.read(1 << 20):
                        digest.update(block)
                        size += len(block)
            except OSError as error:
                raise file.error(f"cannot be read: {error.strerror or error}") from error
            contents.append({"name": file.name, "bytes": size, "xxh3": digest.hexdigest()})
        return contents

    def recipe(self) -> dict[str, Any]:
        """Identity: names, sizes and content of the files, and the column where there are records.

        Reads every byte, once for the life of the object.
        """
        column = {} if kind(self.files[0]) == ".txt" else {"column": self.column}
        return {"source": "files", "files": self._contents, **column}

    def open(self, state: dict[str, Any] | None = None) -> DocumentStream:
        """All documents from the beginning, or from `state`."""
        return FileStream(self, state)


class FileStream:
    """`state()` is the file, the place in it, and how many documents came before."""

    def __init__(self, owner: FileSource, state: dict[str, Any] | None) -> None:
        self._owner = owner
        self._state = {"file": 0, "place": 0, "documents": 0} if state is None else dict(state)
        self._reader: Iterator[tuple[Document, int]] | None = None

    def __iter__(self) -> FileStream:
        return self

    def __next__(self) -> Document:
        while self._state["file"] < len(self._owner.files):
            if self._reader is None:
                self._reader = read(self._owner.files[self._state["file"]], self._state["place"], self._owner.column)
            for document, place in self._reader:
                self._state["place"] = place
                if len(document):
                    self._state["documents"] += 1
                    return document
            self._reader = None
            self._state |= {"file": self._state["file"] + 1, "place": 0}
        if not self._state["documents"]:
            raise SaeError(f"source = {self._owner.slug}: holds no text; give a file with at least one document")
        raise StopIteration

    def state(self) -> dict[str, Any]:
        return dict(self._state)


@source("files", order=10, help=f"a local file, folder or glob of {_KINDS}")
def _resolve(spec: str, offline: bool, column: str) -> TextSource | None:
    path = Path(spec).expanduser()
    try:
        files = _found(spec, path)
    except (OSError, RuntimeError) as error:  # no right to look there, a name too long, a loop of links
        raise SaeError(f"source = {spec}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if files is None:
        return None
    for file in files:
        if kind(file) is None:
            raise SaeError(f"source = {spec}: {file.name} is not {_KINDS}; convert it, or leave it out")
    kinds = sorted({str(kind(file)) for file in files})
    if len(kinds) > 1:
        raise SaeError(f"source = {spec}: holds {' and '.join(kinds)} files; use a glob that ends in *{kinds[0]}")
    return FileSource(files, _slug(spec, path), column)


def _found(spec: str, path: Path) -> list[File] | None:
    """The files that `spec` names, or None where it does not look like a path at all."""
    if path.is_dir():
        files = [file for file in texts_in(spec, path) if kind(file) is not None]
        if not files:
            raise SaeError(f"source = {spec}: no {_KINDS} files in this folder")
        return files
    if path.is_file():
        return [File(path.name, path)]
    if path.exists():  # it would be waited for, and it is read more than once
        raise SaeError(f"source = {spec}: is not a regular file; put its text into one")
    if re.search(r"[*?\[]", spec):
        return _matching(spec)
    if kind(File(path.name, path)) is not None or spec.startswith((".", "/", "~")) or "\\" in spec:
        raise SaeError(f"source = {spec}: no such file or folder")
    return None


def _matching(pattern: str) -> list[File]:
    paths = [Path(p) for p in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise SaeError(f"source = {pattern}: no file matches; try a wider pattern, in quotes")
    fixed = Path(pattern).expanduser()
    while re.search(r"[*?\[]", str(fixed)):
        fixed = fixed.parent
    return sorted(File(path.relative_to(fixed).as_posix(), path) for path in paths)


def _slug(spec: str, path: Path) -> str:
    """A readable name: the file's without its suffixes, the folder's, or the fixed part of a glob."""
    name = path.resolve().name if path.exists() else Path(spec).name
    for suffix in (*COMPRESSED, *READERS):
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "files"
