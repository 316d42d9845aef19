"""Names of the files that a store's folder may hold, and of what a crash leaves of them. All else is not ours."""

import re
from pathlib import Path

from sae.cache.disk.durable import read
from sae.cache.disk.identity import Recipe, digest
from sae.cache.disk.locks import LOCK
from sae.cache.disk.parsing import MOST_BYTES, inner, parsed_mapping, text
from sae.cache.disk.processes import PARTIAL, final_name
from sae.cache.store import scratch
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import MANIFEST
from sae.cache.store.store import HINTS, REQUEST, VOCABULARY

FILES = {RECIPE, MANIFEST, REQUEST, HINTS, LOCK, VOCABULARY, "zarr.json"}
ARRAYS = (
    "tokens", "document", "length", "rows", "row_scale", "row_norm", "position", "col_mean", "col_scale", "truth",
    "coefficient", "weight", "bias",
)  # fmt: skip
CHUNK = re.compile(rf"(?:{'|'.join(ARRAYS)})/c/\d+(?:/0)*")
LEASE = re.compile(rf"lease-[0-9a-f]{{16}}{re.escape(PARTIAL)}")


def is_own(name: str) -> bool:
    """Return True if a file of a store's folder, named relative to it, is one that writers of stores make."""
    return _is_whole(name) or is_temporary(name)


def is_chunk(name: str) -> bool:
    """Return True if a file holds a chunk of an array."""
    return CHUNK.fullmatch(name) is not None


def is_temporary(name: str) -> bool:
    """Return True if a file is one that was being written, a lease of workers, or rows kept of an unfinished window."""
    folder, slash, file = name.rpartition("/")
    whole = final_name(file)
    if LEASE.fullmatch(name) or scratch.NAME.fullmatch(name):
        return True
    return whole is not None and (_is_whole(f"{folder}{slash}{whole}") or scratch.NAME.fullmatch(whole) is not None)


def group_recipe(path: Path) -> tuple[str, Recipe] | None:
    """Kind and recipe by the attributes of the Zarr group, which say them too; None where they are not the folder's."""
    try:
        attributes = inner(parsed_mapping(read(path / "zarr.json", MOST_BYTES) or b""), "attributes")
        kind, recipe = text(attributes, "kind"), inner(attributes, "recipe")
    except ValueError:
        return None
    return (kind, recipe) if path.name.endswith(digest(recipe)) else None


def _is_whole(name: str) -> bool:
    array, _, file = name.partition("/")
    return name in FILES or is_chunk(name) or (array in ARRAYS and file == "zarr.json")
