"""Usage of the disk by a cache: by store, by array, a row, and as a share of plain float32."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.cache.disk.paths import listing
from sae.cache.store.store import Store
from sae.cache.upkeep import garbage


@dataclass(frozen=True)
class Part:
    """Bytes of something, for each row of its store, and (activations) as a share of their float32 rows."""

    bytes: int
    per_row: float | None
    of_float32: float | None

    def as_json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "bytes_per_row": self.per_row, "share_of_float32": self.of_float32}


@dataclass(frozen=True)
class Usage:
    """One store on the disk. `other` is what describes the arrays; `unaccounted` what a crash left."""

    key: str
    kind: str
    rows: int
    total: Part
    arrays: dict[str, Part]
    other: int
    unaccounted: int = 0
    left: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        arrays = {name: part.as_json() for name, part in self.arrays.items()}
        head = {"key": self.key, "kind": self.kind, "rows": self.rows, **self.total.as_json(), "arrays": arrays}
        return {**head, "other": self.other, "unaccounted": self.unaccounted, "unaccounted_files": list(self.left)}


def usage(store: Store) -> Usage:
    """Measure the files of a store as they are there."""
    listed, left = set(store.committed_files()), garbage.remains(store)
    arrays = dict.fromkeys(store.arrays, 0)
    other = unaccounted = 0
    for name, size in listing(store.path).items():
        array = name.partition("/")[0]
        if name in listed and array in arrays:
            arrays[array] += size
        elif name in left:
            unaccounted += size
        else:
            other += size
    plain = store.n_rows * 4 * int(store.recipe["d"]) if "d" in store.recipe else 0

    def part(size: int) -> Part:
        per_row = round(size / store.n_rows, 2) if store.n_rows else None
        return Part(size, per_row, round(size / plain, 4) if plain else None)

    parts = {name: part(size) for name, size in arrays.items()}
    total = part(sum(arrays.values()) + other + unaccounted)
    return Usage(store.key, store.kind, store.n_rows, total, parts, other, unaccounted, tuple(left))


def strays(root: Path, known: Sequence[Usage]) -> int:
    """Bytes of the folders of a cache that are no readable store: damaged ones, remains of removed ones."""
    keys = {(one.kind, one.key) for one in known}
    return sum(sum(listing(path).values()) for kind, path in garbage.folders(root) if (kind, path.name) not in keys)
