"""A store as it is read: a folder named by its recipe, a Zarr v3 group that grows by whole, checked windows.

    <kind>/<slug>-<hash8>/
        recipe.json      what the bytes are: the canonical recipe, readable, sealed by a checksum
        manifest.jsonl   what is committed (see cache.store.manifest): the one truth about how many rows there are
        request.json     how many rows the last writer was asked for
        hints.json       where this machine found what the recipe names (paths); no part of the identity
        zarr.json        the group; one folder an array beside it, opened as they are by zarr, dask, xarray, tensorstore
        lock             held by the one living writer

Readers see committed windows only, and never a byte that does not match its checksum. `cache.store.writer` writes them.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sae.cache.disk.durable import checksum, read
from sae.cache.disk.identity import Recipe
from sae.cache.disk.locks import held
from sae.cache.disk.parsing import MOST_BYTES, field, parsed_mapping, shown, text, whole
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.arrays import NAMES, ArraySpec, group_metadata
from sae.cache.store.head import RECIPE, read_head
from sae.cache.store.manifest import MANIFEST, Manifest, Window, Windows
from sae.cache.store.notes import read_note

REQUEST = "request.json"
HINTS = "hints.json"
MOST_PATH = 4096  # letters of a path
VOCABULARY = "vocabulary.json"  # tokens only


class Store:
    """The reading side: one recipe, its arrays, and the rows committed when it was opened."""

    kind: ClassVar[str]
    beside: ClassVar[tuple[str, ...]] = ()  # files of the whole store that the first window lists

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        """`manifest` stands in for the one on the disk, where that is damaged or about to be written."""
        self.path = path = path.resolve()  # its own name, also where the way to it is a link or "."
        head = read_head(path, self.kind)
        self.recipe, self.slug, self.key = head.recipe, head.slug, path.name
        try:
            self.expect(self.recipe)
        except ValueError as error:
            if isinstance(error, SaeError):
                raise
            raise DamagedStore(f"{path / RECIPE}: is not a recipe of {self.kind} ({error}); remove it") from error
        self.arrays = {spec.name: spec for spec in self.specs(self.recipe)}
        self.windows = self.layout(self.recipe)
        if manifest is None:
            rows, closed = self.rows_by_metadata(), self.closed_by_metadata()  # first: a writer writes them last
            self.manifest = Manifest.read(path)
            for number, window in enumerate(self.manifest.windows, 1):
                if not self.fits(window):
                    raise DamagedStore(
                        f"{path / MANIFEST}: line {number} lists what no window {window.index} of this recipe has; "
                        "`verify()` tells what else is damaged"
                    )
            self._expect_all_lines(rows, closed)
        else:
            self.manifest = manifest

    @classmethod
    def expect(cls, recipe: Recipe) -> None:
        """Raise ValueError, saying what is wrong, unless all that decides memory, names and shapes is as it may be."""
        raise TypeError(f"{cls.__name__} has no recipes")

    @classmethod
    def specs(cls, recipe: Recipe) -> list[ArraySpec]:
        """The arrays a recipe asks for."""
        raise TypeError(f"{cls.__name__} declares no arrays")

    @classmethod
    def layout(cls, recipe: Recipe) -> Windows:
        """The window boundaries a recipe asks for."""
        raise TypeError(f"{cls.__name__} declares no windows")

    @property
    def n_rows(self) -> int:
        return self.manifest.rows

    @property
    def closed(self) -> bool:
        """Return True if the source ended: there is nothing to grow into."""
        return self.manifest.closed

    @property
    def requested(self) -> int:
        """Rows the last writer was asked for."""
        said = read_note(self.path / REQUEST, _rows, "remove it and ask for the rows again")
        return 0 if said is None else said

    @property
    def complete(self) -> bool:
        """Return True if everything that was asked for is there."""
        return self.closed or (self.n_rows > 0 and self.n_rows >= self.requested)

    @property
    def hints(self) -> dict[str, str]:
        """The places where this machine found what the recipe names: {"model": "/models/mine", ...}; {} where nobody
        said.

        Whoever made the store chose them, so they are no more than a suggestion.
        """
        remedy = "remove it and name the model on the command line"
        return read_note(self.path / HINTS, _hints, remedy) or {}

    def refreshed(self) -> Self:
        """The same store with what has been committed since."""
        return type(self)(self.path)

    def chunk(self, array: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [index * chunk_rows, ...) of an array, checked against the manifest: [<= chunk_rows, *row_shape].

        Raises DamagedStore, naming the file, when it is missing or its bytes are not those committed.
        """
        spec = self.arrays[array]
        name = spec.chunk_file(index)
        rows = self.decoded_chunk(name, self.stored(name), out)
        return rows[: self.n_rows - index * spec.chunk_rows] if spec.grows else rows

    def decoded_chunk(self, name: str, data: bytes | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The whole chunk that the checked bytes of a file are. Raises DamagedStore where they are none."""
        try:
            return self.arrays[name.partition("/")[0]].decode(data, out)
        except ValueError as error:
            raise DamagedStore(
                f"{self.path / name}: is not a chunk of this store ({error}); remove the store and make it again"
            ) from error

    def committed(self, name: str) -> tuple[int, str]:
        """Size and checksum with which a file was committed."""
        return self._window_of(name).files[name]

    def stored(self, name: str) -> bytes:
        """The checked bytes of one committed file."""
        size, crc = self.committed(name)
        path = self.path / name
        data = read(path, size)
        if data is None:
            raise self.missing(path)
        if len(data) != size or checksum(data) != crc:
            raise self.damaged(path)
        return data

    def missing(self, path: Path) -> DamagedStore:
        """The error for a committed file that is not there."""
        return DamagedStore(f"{path}: missing, though it was committed; `verify({self.key})` tells more")

    def damaged(self, path: Path) -> DamagedStore:
        """The error for a committed file whose bytes are others."""
        return DamagedStore(f"{path}: damaged (its checksum differs); `verify({self.key})` tells more")

    def _window_of(self, name: str) -> Window:
        if "/" not in name:
            return self.manifest.windows[0]  # where a file of the whole store is listed
        array, _, chunk, *_ = name.split("/")
        spec = self.arrays[array]
        window = self.windows.count(int(chunk) * spec.chunk_rows + 1) - 1 if spec.grows else 0
        assert window < len(self.manifest.windows), (name, self.n_rows)
        return self.manifest.windows[window]

    def read(self, array: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a growing array, from as many chunks as it takes."""
        assert 0 <= start <= stop <= self.n_rows, (start, stop, self.n_rows)
        size = self.arrays[array].chunk_rows
        parts = [
            self.chunk(array, i)[max(start - i * size, 0) : stop - i * size]
            for i in range(start // size, -(-stop // size))
        ]
        if not parts:
            return np.empty((0, *self.arrays[array].row_shape), self.arrays[array].dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def fits(self, window: Window) -> bool:
        """Return True if a window is one that the recipe asks for: its rows, and its files with the sizes they can
        have."""
        start, stop = self.windows.bounds(window.index)
        if window.start != start or not start < window.stop <= stop:
            return False
        sizes = {
            spec.chunk_file(chunk): spec.stored_bytes
            for spec in self.arrays.values()
            for chunk in (range(start // spec.chunk_rows, -(-window.stop // spec.chunk_rows)) if spec.grows else [0])
            if spec.grows or window.index == 0
        }
        if window.index == 0:
            sizes |= {name: range(MOST_BYTES + 1) for name in self.beside if name in window.files}
        return sizes.keys() == window.files.keys() and all(
            size in sizes[name] for name, (size, _) in window.files.items()
        )

    def committed_files(self) -> Iterable[str]:
        """Every file the manifest lists, in commit order."""
        for window in self.manifest.windows:
            yield from sorted(window.files)

    def metadata(self) -> dict[str, bytes]:
        """The `zarr.json` files as they must be for the committed rows."""
        files = {f"{spec.name}/zarr.json": spec.metadata(self.n_rows) for spec in self.arrays.values()}
        return {"zarr.json": self._group(self.closed), **files}

    def _group(self, closed: bool) -> bytes:
        return group_metadata({"kind": self.kind, "recipe": self.recipe, "closed": closed})

    def describe(self) -> dict[str, Any]:
        """Return the content of `sae cache inspect`: recipe, arrays, windows."""
        return {
            "recipe": self.recipe,
            "arrays": {
                spec.name: {
                    "dtype": NAMES[spec.dtype],
                    "row": list(spec.row_shape),
                    "chunk_rows": spec.chunk_rows,
                    "zstd": spec.zstd,
                    "bytes": sum(
                        size
                        for window in self.manifest.windows
                        for name, (size, _) in window.files.items()
                        if name.startswith(f"{spec.name}/")
                    ),
                }
                for spec in self.arrays.values()
            },
            "windows": len(self.manifest.windows),
            "closed": self.closed,
            "requested": self.requested,
        }

    def rows_by_metadata(self) -> dict[str, int]:
        """Rows of each growing array by its `zarr.json`; without those that are missing or not as they were written."""
        found = {}
        for spec in self.arrays.values():
            if spec.grows and (data := read(self.path / f"{spec.name}/zarr.json")) is not None:
                rows = rows_shown(data)
                if rows is not None and data == spec.metadata(rows):
                    found[spec.name] = rows
        return found

    def closed_by_metadata(self) -> bool:
        """Return True if the group's `zarr.json` says that the source has ended."""
        return read(self.path / "zarr.json") == self._group(True)

    def _expect_all_lines(self, shown: dict[str, int], closed: bool) -> None:
        """Raise DamagedStore where Zarr's metadata was written for more than the manifest lists.

        The manifest comes first, so it has lost whole lines. Without this they would not be missed, and the next writer
        would clear away the chunks they listed.
        """
        for array, rows in shown.items():
            if rows > self.n_rows:
                raise DamagedStore(
                    f"{self.path / MANIFEST}: ends at row {self.n_rows:,}, but {self.path / array}/zarr.json is that "
                    f"of {rows:,}, so one of the two was changed; `verify()` tells more"
                )
        if closed and not self.closed:
            raise DamagedStore(
                f"{self.path / MANIFEST}: does not say that the source has ended, but {self.path}/zarr.json does, so "
                "one of the two was changed; `verify()` tells more"
            )

    def damage(self, name: str) -> str | None:
        """Return what is wrong with one file, or None."""
        path = self.path / name
        try:
            if name in (REQUEST, HINTS):
                _ = self.requested if name == REQUEST else self.hints
            elif name.endswith("zarr.json"):
                # a living writer is about to bring it up to date; one that has ended did so between two of our looks
                if not (self._as_committed(name) or held(self.path) or self._as_committed(name)):
                    return f"{path}: missing or not as committed; repeat the command that made the store"
            else:
                self.stored(name)
        except DamagedStore as error:
            return str(error)
        return None

    def _as_committed(self, name: str) -> bool:
        """Return True if a `zarr.json` is as it must be for the rows that are committed now."""
        committed = self.refreshed().metadata()[name]  # the store may have grown since it was opened
        return read(self.path / name) == committed


def rows_shown(metadata: bytes) -> int | None:
    """Rows of an array by its `zarr.json`, or None where it is not one."""
    try:
        shape = field(parsed_mapping(metadata), "shape")
        return whole({"rows": shape[0]}, "rows") if isinstance(shape, list) and shape else None
    except ValueError:
        return None


def _rows(note: dict[str, Any]) -> int:
    if note.keys() != {"rows"}:
        raise ValueError(f"it says {', '.join(map(shown, sorted(note)))} where rows alone should be")
    return whole(note, "rows")


def _hints(note: dict[str, Any]) -> dict[str, str]:
    if unknown := note.keys() - {"model", "source", "tokenizer"}:
        raise ValueError(f"{shown(min(unknown))} is not a hint")
    return {name: text(note, name, MOST_PATH) for name in note}
