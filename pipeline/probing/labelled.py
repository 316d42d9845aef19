"""Labelled texts: files of anybody's with a column of texts and one of labels, and the sets of the sae-probes wheel.

A label is taken as the word it is written with, so that 1 in CSV and 1 in parquet are one class. Where a text or a
label is missing (null, NaN, nothing between two commas) nothing is guessed: the row is named.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.tokenize.sources.base import well_formed
from sae.pipeline.tokenize.sources.formats import kind
from sae.pipeline.tokenize.sources.opened import COMPRESSED, File

KINDS = "CSV, TSV, JSON lines, JSON or parquet (the text ones also .gz, .zst)"
LEAST = 4  # texts of a class: one to test, and some to train on
LISTED = 20  # names in a message
LONGEST_CELL = 1 << 28  # characters
PROBES = ("prompt", "target")  # columns of the sae-probes sets
PROBES_FOLDER = "cleaned_data"


@dataclass(frozen=True)
class Labelled:
    """Texts, and the class of each. `where` is how messages call it."""

    name: str
    where: str
    texts: list[str]
    labels: list[str]

    @property
    def classes(self) -> list[str]:
        """Their names, in order."""
        return sorted(set(self.labels))

    @property
    def digest(self) -> str:
        """What tells these texts and labels from others."""
        pairs = json.dumps([self.texts, self.labels]).encode()
        return hashlib.blake2b(pairs, digest_size=16).hexdigest()

    def expect_classes(self, most: int) -> None:
        """Raise SaeError unless labels are of some classes, with enough texts each."""
        names = self.classes
        if not names:
            raise SaeError(f"{self.where}: has no rows; give a file with texts and labels")
        if len(names) == 1:
            raise SaeError(f"{self.where}: every label is {names[0]!r}; there is nothing to tell apart")
        if len(names) > most:
            raise SaeError(
                f"{self.where}: has {len(names):,} different labels, as numbers have; name a column of classes, or "
                f"allow more with `probe.classes = {len(names)}`"
            )
        for name in names:
            if (there := self.labels.count(name)) < LEAST:
                raise SaeError(
                    f"{self.where}: has {there} text{'s' * (there != 1)} of the class {name!r}; a probe takes {LEAST}, "
                    "so leave it out"
                )


@dataclass(frozen=True)
class TextSet:
    """A file of labelled texts, or one inside an archive; read when its turn comes."""

    name: str
    where: str
    path: Path
    columns: tuple[str, str]
    member: str | None = None

    def read(self) -> Labelled:
        """Raises SaeError, in one line, for what is not such a file."""
        if self.member is None:
            return self._read(self.path)
        with tempfile.TemporaryDirectory() as folder, _said(self.where), zipfile.ZipFile(self.path) as archive:
            path = Path(folder) / Path(self.member).name
            path.write_bytes(archive.read(self.member))
            return self._read(path)

    def _read(self, path: Path) -> Labelled:
        file, texts, labels = File(path.name, path), [], []
        ending = kind(file)
        with _said(self.where, file):
            for row, (text, label) in enumerate(READERS[str(ending)](file, self.columns, self.where), 1):
                texts.append(_text(text, f"{self.where}: row {row}", self.columns[0]))
                labels.append(_label(label, f"{self.where}: row {row}", self.columns[1]))
        return Labelled(self.name, self.where, texts, labels)


def in_memory(name: str, texts: Sequence[Any], labels: Sequence[Any]) -> Labelled:
    """Texts and labels of a program. SaeError where they are not as many, or something is missing."""
    where = f"data = {name}"
    if len(texts) != len(labels):
        raise SaeError(f"{where}: has {len(texts)} texts and {len(labels)} labels; give a label for each text")
    return Labelled(
        name, where,
        [_text(one, f"{where}: row {row}", "texts") for row, one in enumerate(texts, 1)],
        [_label(one, f"{where}: row {row}", "labels") for row, one in enumerate(labels, 1)],
    )  # fmt: skip


def sets_of(
    files: Sequence[Path], sae_probes: Path | None, wanted: Sequence[str] | None, columns: tuple[str, str]
) -> list[TextSet]:
    """The sets of files and of sae-probes. Raises SaeError where two have one name."""
    found = [of_file(path, columns) for path in files]
    found += [] if sae_probes is None else of_sae_probes(sae_probes, wanted)
    names = [one.name for one in found]
    if twice := [one for one in found if names.count(one.name) > 1]:
        raise SaeError(f"{twice[-1].where}: there are two sets of the name {twice[-1].name!r}; rename one")
    return found


def of_file(path: Path, columns: tuple[str, str]) -> TextSet:
    """A file of labelled texts. Raises SaeError for what is no such file."""
    where = f"data = {path}"
    if not path.is_file():
        raise NotFound(f"{where}: no such file; give one of {KINDS}")
    if str(kind(File(path.name, path))) not in READERS:
        raise SaeError(f"{where}: is not {KINDS}; convert it")
    return TextSet(_bare(path.name), where, path, columns)


def of_sae_probes(source: Path, wanted: Sequence[str] | None) -> list[TextSet]:
    """The sets of the sae-probes package: of its wheel, or of a folder that has them, in the order of their numbers.

    wanted: their names, or the numbers these begin with; None: all of them. Nothing of the package is run.
    """
    where = f"sae_probes = {source}"
    if source.is_dir():
        every = [*source.rglob(f"{PROBES_FOLDER}/*.csv*")] or [*source.glob("*.csv*")]
        found = {_bare(path.name): TextSet(_bare(path.name), f"data = {path}", path, PROBES) for path in every}
    elif source.is_file():
        with _said(where), zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if Path(name).parent.name == PROBES_FOLDER and ".csv" in name]
        found = {_bare(name): TextSet(_bare(name), f"data = {name}", source, PROBES, name) for name in names}
    else:
        raise NotFound(f"{where}: no such file or folder; give the wheel (`pip download sae-probes`), or its data")
    if not found:
        raise SaeError(
            f"{where}: holds no {PROBES_FOLDER}/*.csv.zst; give the wheel of sae-probes, or a folder of sets"
        )
    ordered = sorted(found, key=lambda name: (not name[0].isdigit(), int(_number(name) or 0), name))
    if wanted is None:
        return [found[name] for name in ordered]
    by_word = {_number(name): name for name in ordered} | {name: name for name in ordered}
    if unknown := [word for word in wanted if word not in by_word]:
        there = ", ".join(ordered[:LISTED]) + (f" and {len(ordered) - LISTED} more" if ordered[LISTED:] else "")
        raise NotFound(f"sets = {unknown[0]}: no such set; there is {there}")
    return [found[name] for name in dict.fromkeys(by_word[word] for word in wanted)]


def _number(name: str) -> str:
    """The digits that a set's name begins with."""
    first = name.partition("_")[0]
    return first if first.isdigit() else ""


def _bare(name: str) -> str:
    """The name of a file without its endings."""
    bare = Path(name).name
    for ending in COMPRESSED:
        bare = bare.removesuffix(ending)
    return Path(bare).stem


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str) and not _missing(value):
        raise SaeError(f"{where}: holds a {type(value).__name__} in column {column!r}; name the column of the texts")
    if _missing(value):
        raise SaeError(f"{where}: has no text in column {column!r}; leave it out")
    return well_formed(value)


def _label(value: Any, where: str, column: str) -> str:
    if _missing(value):
        raise SaeError(f"{where}: has no label in column {column!r}; leave it out")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as a column of whole numbers becomes where one is missing
    if hasattr(value, "item"):
        return _label(value.item(), where, column)
    if not isinstance(value, str | int | float):
        raise SaeError(f"{where}: holds a {type(value).__name__} in column {column!r}; a label is a word or a number")
    return well_formed(value).strip() if isinstance(value, str) else str(value)


def _missing(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan"))


Pairs = Iterator[tuple[Any, Any]]


def _separated(file: File, columns: tuple[str, str], where: str) -> Pairs:
    csv.field_size_limit(LONGEST_CELL)
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    with file.open() as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        names = next(rows, [])
        text, label = (_place(names, column, where) for column in columns)
        for number, row in enumerate(filter(None, rows), 1):
            if len(row) != len(names):
                raise SaeError(
                    f"{where}: row {number} has {len(row)} fields, the first line {len(names)}; are fields with "
                    "commas in quotation marks?"
                )
            yield row[text], row[label]


def _place(names: Sequence[str], column: str, where: str) -> int:
    if names.count(column) != 1:
        times = f"{names.count(column)} columns" if column in names else "no column"
        there = ", ".join(names[:LISTED]) or "none"
        raise SaeError(
            f"{where}: has {times} {column!r}; it has {there}; say which with `probe.text_column` and "
            "`probe.label_column`"
        )
    return names.index(column)


def _json_lines(file: File, columns: tuple[str, str], where: str) -> Pairs:
    with file.open() as raw:
        for number, line in enumerate(raw, 1):
            if line.strip():
                yield _of_record(_parsed(line, f"{where}: line {number}"), columns, f"{where}: line {number}")


def _json(file: File, columns: tuple[str, str], where: str) -> Pairs:
    with file.open() as raw:
        whole = raw.read()
    if not whole.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_lines(file, columns, where)
        return
    for number, record in enumerate(_parsed(whole, where)):
        yield _of_record(record, columns, f"{where}: element {number}")


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SaeError(f"{where}: is not JSON ({str(error).splitlines()[0]}); mend or convert it") from error


def _of_record(record: Any, columns: tuple[str, str], where: str) -> tuple[Any, Any]:
    if not isinstance(record, dict):
        raise SaeError(f"{where}: is a JSON {type(record).__name__}, not a record with a text and a label")
    for column in columns:
        if column not in record:
            _place(list(record), column, where)
    return record[columns[0]], record[columns[1]]


def _parquet(file: File, columns: tuple[str, str], where: str) -> Pairs:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        for column in columns:
            _place(names, column, where)
        for batch in table.iter_batches(1024, columns=list(dict.fromkeys(columns))):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)


READERS = {
    ".csv": _separated, ".tsv": _separated, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json,
    ".parquet": _parquet,
}  # fmt: skip


@contextmanager
def _said(where: str, file: File | None = None) -> Iterator[None]:
    """Turn what the libraries say of a damaged file into one line."""
    import pyarrow
    import zstandard

    damage = (EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException, zipfile.BadZipFile, csv.Error)
    try:
        yield
    except SaeError:
        raise
    except UnicodeDecodeError as error:
        raise SaeError(f"{where}: is not UTF-8 text ({error.reason}); convert it with iconv") from error
    except damage as error:
        if file is not None and file.is_pointer():
            raise SaeError(f"{where}: is only a pointer of git-lfs; run git lfs pull") from error
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SaeError(f"{where}: is damaged, or not what its name says: {first}") from error
    except OSError as error:
        raise SaeError(f"{where}: cannot be read: {error.strerror or error}") from error
