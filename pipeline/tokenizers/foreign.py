"""Files of a tokenizer's folder, which anyone may have written: read whole, checked, and never run or waited for."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from sae.cache.errors import SaeError
from sae.cache.printable import printable

MOST_BYTES = 1 << 28  # the largest tokenizers in use take some 40 MB


def foreign_json(path: Path, option: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file.

    Raises SaeError (one line that begins with `option`) for anything but a regular file with one JSON object in it, in
    which no key comes twice and every number is one.
    """
    data = foreign_bytes(path, option)
    if data is None:
        return None
    try:
        found = json.loads(data, object_pairs_hook=_distinct, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SaeError(f"{option}: its {path.name} is not sound JSON ({said(error)}); fetch it again") from None
    if not isinstance(found, dict):
        raise SaeError(f"{option}: its {path.name} holds no JSON object; fetch it again")
    return found


def foreign_bytes(path: Path, option: str) -> bytes | None:
    """Return the bytes of a regular file, or of a link to one, else None. Pipes and devices are not waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise SaeError(f"{option}: its {path.name} is a link to nothing; give a whole copy") from None
        return None
    except OSError as error:
        raise SaeError(f"{option}: its {path.name} cannot be read ({error.strerror}); give a whole copy") from None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise SaeError(f"{option}: its {path.name} is not a file; give a whole copy")
        if about.st_size > MOST_BYTES:
            raise SaeError(f"{option}: its {path.name} has {about.st_size:,} bytes, which no tokenizer needs")
        with open(handle, "rb", closefd=False) as stream:
            return stream.read(MOST_BYTES)
    finally:
        os.close(handle)


def said(error: BaseException) -> str:
    """Return the message of an error, in one line of printable characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text[:200])


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:40]!r} comes twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
