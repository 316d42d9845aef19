"""recipe.json: what a store is, sealed by a checksum, in a folder that carries its hash."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.cache.disk.durable import checksum, read
from sae.cache.disk.identity import Recipe, canonical, digest
from sae.cache.disk.parsing import inner, parsed_mapping, text, whole
from sae.cache.errors import DamagedStore, NotFound, SaeError

FORMAT = 2
RECIPE = "recipe.json"
MOST_HEAD = 1 << 24  # bytes of recipe.json
HEAD = {"format", "kind", "slug", "recipe", "crc"}  # what it says


@dataclass(frozen=True)
class Head:
    """The content of recipe.json."""

    kind: str
    slug: str
    recipe: Recipe


def head_bytes(kind: str, slug: str, recipe: Recipe) -> bytes:
    """recipe.json as it is written: every byte of it follows from what it says."""
    head = {"format": FORMAT, "kind": kind, "slug": slug, "recipe": recipe}
    return _layout({**head, "crc": checksum(canonical(head).encode())})


def read_head(path: Path, kind: str | None = None) -> Head:
    """The contents of recipe.json, checked: as written, of this kind and format, and of the hash its folder carries."""
    file = path / RECIPE
    data = read(file, MOST_HEAD)
    if data is None:
        raise NotFound(f"{path}: is not a store (no {RECIPE}); `stores()` lists what is there")
    try:
        said = parsed_mapping(data)
        version, head = whole(said, "format"), Head(text(said, "kind"), text(said, "slug"), inner(said, "recipe"))
        crc = checksum(canonical({name: said[name] for name in said if name != "crc"}).encode())
    except ValueError as error:
        raise DamagedStore(
            f"{file}: is not readable as a recipe ({error}); remove the store and make it again"
        ) from error
    if version != FORMAT and "crc" not in said:  # the one before had no checksum
        raise SaeError(f"{path}: format {version}, this version reads {FORMAT}; use the version that wrote it")
    if _layout(said) != data or said.get("crc") != crc or said.keys() != HEAD:
        raise DamagedStore(f"{file}: damaged (its checksum differs); remove the store and make it again")
    if version != FORMAT:
        raise SaeError(f"{path}: format {version}, this version reads {FORMAT}; use the version that wrote it")
    if kind is not None and head.kind != kind:
        raise SaeError(f"{path}: holds {head.kind}, not {kind}; `stores()` lists the stores")
    if not path.name.endswith(name := digest(head.recipe)):
        raise DamagedStore(f"{file}: its recipe hashes to {name}, not to the folder's name; it was changed")
    return head


def _layout(head: dict[str, Any]) -> bytes:
    return json.dumps(head, indent=2).encode()
