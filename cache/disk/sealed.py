"""JSON that carries its own checksum: `{..., "crc": "<hex8>"}`, the crc32c of the rest in its canonical form."""

import json
from typing import Any

from sae.cache.disk.durable import checksum
from sae.cache.disk.identity import canonical
from sae.cache.disk.parsing import parsed_mapping

CRC = "crc"


def sealed(content: dict[str, Any]) -> bytes:
    """The text of a file; every byte of it follows from what it says. Raises ValueError for NaN and infinity."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({**plain, CRC: checksum(canonical(plain).encode())}, indent=2).encode()


def unsealed(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the content of a file, and whether it has a checksum: those of version 0.1.0 have none.

    Raises ValueError where it is not JSON as it may be, or a byte is not the one that was written.
    """
    content = parsed_mapping(data)
    if CRC not in content:
        return content, False
    del content[CRC]
    if sealed(content) != data:
        raise ValueError("its checksum differs")
    return content, True
