"""A store: a folder named by its recipe, holding a Zarr v3 group that grows by whole, checked windows.

    <kind>/<slug>-<hash8>/
        recipe.json      what the bytes are: the canonical recipe, readable
        manifest.jsonl   what is committed (see cache.manifest): the one truth about how many rows there are
        request.json     how many rows the last writer was asked for
        hints.json       where this machine found what the recipe names (paths); no part of the identity
        zarr.json        the group; one folder an array beside it, opened as they are by zarr, dask, xarray, tensorstore
        lock             held by the one living writer

Readers see committed windows only, and never a byte that does not match its checksum.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from cache import manifest
from cache.arrays import NAMES, ArraySpec, group_metadata
from cache.durable import PARTIAL, checksum, unreadable, write_atomic
from cache.errors import DamagedStore, NotFound, SaeError
from cache.identity import Recipe, digest
from cache.identity import key as store_key
from cache.locks import Lock, held
from cache.manifest import Manifest, Window, Windows

FORMAT = 1
RECIPE = "recipe.json"
REQUEST = "request.json"
HINTS = "hints.json"
WRITERS = 8  # files encoded and flushed side by side


class Store:
    """The reading side: one recipe, its arrays, and the rows committed when it was opened."""

    kind: ClassVar[str]

    def __init__(self, path: Path) -> None:
        self.path = path = path.resolve()  # its own name, also where the way to it is a link or "."
        head = read_head(path, self.kind)
        self.recipe: Recipe = head["recipe"]
        self.slug: str = head["slug"]
        self.key = path.name
        self.arrays = {spec.name: spec for spec in self.specs(self.recipe)}
        self.windows = self.layout(self.recipe)
        self.manifest = Manifest.read(path)

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
        """Whether the source ended: there is nothing to grow into."""
        return self.manifest.closed

    @property
    def requested(self) -> int:
        """Rows the last writer was asked for."""
        path = self.path / REQUEST
        try:
            return int(json.loads(path.read_bytes())["rows"]) if path.exists() else 0
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedStore(f"{path}: is not what was written; ask for the rows again") from error

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for is there."""
        return self.closed or (self.n_rows > 0 and self.n_rows >= self.requested)

    @property
    def hints(self) -> dict[str, str]:
        """Where this machine found what the recipe names: {"model": "/models/mine", ...}; {} where nobody said."""
        path = self.path / HINTS
        try:
            return dict(json.loads(path.read_bytes())) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise DamagedStore(
                f"{path}: is not what was written; remove it and name the model on the command line"
            ) from error

    def refreshed(self) -> Self:
        """The same store with what has been committed since."""
        return type(self)(self.path)

    def chunk(self, array: str, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [index * chunk_rows, ...) of an array, checked against the manifest: [<= chunk_rows, *row_shape].

        Raises DamagedStore, naming the file, when it is missing or its bytes are not those committed.
        """
        spec = self.arrays[array]
        rows = spec.decode(self.stored(spec.chunk_file(index)), out)
        return rows[: self.n_rows - index * spec.chunk_rows] if spec.grows else rows

    def stored(self, name: str) -> bytes:
        """The checked bytes of one committed file."""
        window = self._window_of(name)
        size, crc = window.files[name]
        path = self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise DamagedStore(
                f"{path}: missing, though it was committed; `sae cache verify {self.key}` tells more"
            ) from error
        except OSError as error:
            raise unreadable(error, path) from error
        if len(data) != size or checksum(data) != crc:
            raise DamagedStore(f"{path}: damaged (its checksum differs); `sae cache verify {self.key}` tells more")
        return data

    def _window_of(self, name: str) -> Window:
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

    def committed_files(self) -> Iterable[str]:
        """Every file the manifest lists, in commit order."""
        for window in self.manifest.windows:
            yield from sorted(window.files)

    def metadata(self) -> dict[str, bytes]:
        """The `zarr.json` files as they must be for the committed rows."""
        files = {f"{spec.name}/zarr.json": spec.metadata(self.n_rows) for spec in self.arrays.values()}
        return {"zarr.json": group_metadata({"kind": self.kind, "recipe": self.recipe}), **files}

    def describe(self) -> dict[str, Any]:
        """What `sae cache inspect` shows: recipe, arrays, windows."""
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

    def damage(self, name: str) -> str | None:
        """What is wrong with one file, or None."""
        path = self.path / name
        try:
            if name.endswith("zarr.json"):
                committed = self.refreshed().metadata()[name]  # the store may have grown since it was opened
                stale = not path.exists() or path.read_bytes() != committed
                if stale and not held(self.path):  # a living writer is about to bring it up to date
                    return f"{path}: missing or not as committed; repeat the command that made the store"
            else:
                self.stored(name)
        except DamagedStore as error:
            return str(error)
        return None


class Writer:
    """The writing side: takes the lock, heals what a crash left, appends whole windows.

    Use as a context manager. `store` is the reading side and follows every commit.
    """

    store_class: ClassVar[type[Store]]

    def __init__(self, root: Path, slug: str, recipe: Recipe, *, wait: bool = False) -> None:
        self.path = root / self.store_class.kind / store_key(slug, recipe)
        self._recipe, self._slug = recipe, slug
        self._lock = Lock(self.path, wait=wait)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        try:
            if not (self.path / RECIPE).exists():
                head = {"format": FORMAT, "kind": self.store_class.kind, "slug": self._slug, "recipe": self._recipe}
                write_atomic(self.path / RECIPE, json.dumps(head, indent=2).encode())
            self.store = self.store_class(self.path)
            assert self.store.recipe == json.loads(json.dumps(self._recipe)), "a recipe must be plain JSON"
            self._heal()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SaeError) and not self.store.n_rows:
            with suppress(OSError):  # where the disk refuses this as well, the next writer takes up what is left
                self._lock.erase()  # a store that never had a row would only be in the way
        self._lock.__exit__(kind, error, trace)

    @property
    def notice(self) -> str | None:
        """What the user should know about how this store was found."""
        return self._lock.stale

    def request(self, rows: int) -> None:
        """Note how many rows are wanted, so that an interrupted store is known as incomplete."""
        write_atomic(self.path / REQUEST, json.dumps({"rows": rows}).encode())

    def hint(self, **where: str) -> None:
        """Note where things named by the recipe were found."""
        write_atomic(self.path / HINTS, json.dumps(where).encode())

    def append(self, arrays: dict[str, np.ndarray], notes: dict[str, Any]) -> Window:
        """Commit the next window: the rows of every growing array, as many for each, and in window 0 the others.

        Returns when the window survives `kill -9` and a power cut.
        """
        index = len(self.store.manifest.windows)
        start, stop = self.store.windows.bounds(index)
        counts = {len(rows) for name, rows in arrays.items() if self.store.arrays[name].grows}
        assert len(counts) == 1, counts
        assert set(arrays) == {s.name for s in self.store.arrays.values() if s.grows or index == 0}, sorted(arrays)
        rows = counts.pop()
        assert 0 < rows <= stop - start and not self.store.closed, (rows, start, stop)
        assert start == self.store.n_rows, "only the last window of a closed store may be short"
        specs = self.store.arrays
        files = self._write(
            [
                (file, specs[name].encode, part)
                for name, values in arrays.items()
                for file, part in _chunks(specs[name], values, start)
            ]
        )
        window = Window(index, start, start + rows, files, notes)
        manifest.commit(self.path, window)
        self._published()
        return window

    def close(self) -> None:
        """Say that the source has ended: the store is all there will ever be."""
        manifest.close(self.path, self.store.n_rows)
        self._published()

    def _write(
        self, files: Sequence[tuple[str, Callable[[np.ndarray], bytes], np.ndarray]]
    ) -> dict[str, tuple[int, str]]:
        """Encode and write files by (name, encoder, rows), side by side: flushing to the disk is mostly waiting."""

        def write(file: tuple[str, Callable[[np.ndarray], bytes], np.ndarray]) -> tuple[str, tuple[int, str]]:
            name, encode, rows = file
            data = encode(rows)
            write_atomic(self.path / name, data)
            return name, (len(data), checksum(data))

        with ThreadPoolExecutor(WRITERS) as pool:
            return dict(pool.map(write, files))

    def _published(self) -> None:
        """Take up what the manifest now says, and bring the Zarr metadata to it."""
        self.store = self.store.refreshed()
        stale = [(n, d) for n, d in self.store.metadata().items() if not _holds(self.path / n, d)]
        with ThreadPoolExecutor(WRITERS) as pool:
            for done in [pool.submit(write_atomic, self.path / name, data) for name, data in stale]:
                done.result()

    def _heal(self) -> None:
        """Remove what a crash left half done: temporary files, chunks no manifest line lists, stale metadata."""
        listed = set(self.store.committed_files())
        for path in [p for p in self.path.rglob("*") if p.is_file()]:
            name = path.relative_to(self.path).as_posix()
            if name.endswith(PARTIAL) or ("/c/" in name and name not in listed):
                path.unlink()
        self._published()


def _chunks(spec: ArraySpec, values: np.ndarray, start: int) -> Iterator[tuple[str, np.ndarray]]:
    """(file, rows) of every chunk of an array's new rows, the first of which is row `start`."""
    first = start // spec.chunk_rows if spec.grows else 0
    for i in range(-(-len(values) // spec.chunk_rows)):
        yield spec.chunk_file(first + i), values[i * spec.chunk_rows : (i + 1) * spec.chunk_rows]


def _holds(path: Path, data: bytes) -> bool:
    return path.exists() and path.read_bytes() == data


def read_head(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The contents of recipe.json, checked: readable, of this kind and format, and of the hash its folder carries."""
    file = path / RECIPE
    try:
        head = json.loads(file.read_bytes())
        recipe, found, version = head["recipe"], head["kind"], head["format"]
    except FileNotFoundError as error:
        raise NotFound(f"{path}: is not a store (no {RECIPE}); `sae cache ls` lists what is there") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedStore(f"{file}: is not readable as a recipe; remove the store and make it again") from error
    except OSError as error:
        raise unreadable(error, file) from error
    if version != FORMAT:
        raise SaeError(f"{path}: format {version}, this version reads {FORMAT}; use the version that wrote it")
    if kind is not None and found != kind:
        raise SaeError(f"{path}: holds {found}, not {kind}; `sae cache ls` lists the stores")
    if not path.name.endswith(digest(recipe)):
        raise DamagedStore(f"{file}: its recipe hashes to {digest(recipe)}, not to the folder's name; it was changed")
    return dict(head)
