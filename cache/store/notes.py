"""Small files beside the data of a store: what was asked for, where things were found. Each carries a checksum.

{"rows": 5, "crc": "<hex8>"}: `crc` is the crc32c of the rest in its canonical form. Files of version 0.1.0 have none;
they are read as they are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sae.cache.disk.durable import checksum, read, write_in
from sae.cache.disk.identity import canonical
from sae.cache.disk.parsing import parsed_mapping
from sae.cache.errors import DamagedStore

MOST_NOTE = 1 << 20  # bytes

Said = TypeVar("Said")


def write_note(path: Path, content: dict[str, Any]) -> None:
    """Replace a note."""
    write_in(path.parent, path.name, note_bytes(content))


def note_bytes(content: dict[str, Any]) -> bytes:
    """A note with its checksum."""
    return json.dumps({**content, "crc": checksum(canonical(content).encode())}).encode()


def read_note(path: Path, says: Callable[[dict[str, Any]], Said], remedy: str) -> Said | None:
    """Return a note's content, by `says`, which raises ValueError for what no note says; None where there is none."""
    data = read(path, MOST_NOTE)
    if data is None:
        return None
    try:
        content = parsed_mapping(data)
        if "crc" in content and content.pop("crc") != checksum(canonical(content).encode()):
            raise ValueError("its checksum differs")
        return says(content)
    except ValueError as error:
        raise DamagedStore(f"{path}: is not what was written ({error}); {remedy}") from error
