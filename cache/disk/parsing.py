"""Files are read strictly: JSON that may come from anyone, and values of the one type and range they may have.

A file of a cache or of a run folder is read once, at its border, into what the program goes on with. Whatever is not
what this program would have written raises ValueError there, with a reason of a few words; who reads the file turns it
into the one line that names it.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sae.cache.errors import DamagedStore

MOST_BYTES = 64 << 20  # of a file that describes something
MOST_DEPTH = 64  # of what is inside what
MOST_DIGITS = 40  # of a whole number
MOST_LETTERS = 255  # of a name: what file systems allow


@contextmanager
def as_written(path: Path, part: str = "") -> Iterator[None]:
    """Make of what is wrong with a file, or a part of it, the one line that names it: ValueErrors inside."""
    try:
        yield
    except ValueError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise DamagedStore(f"{path}: {part}is not what was written ({said})") from error


def parse(data: bytes, *, nan_is_null: bool = False) -> Any:
    """The value of a JSON text. With `nan_is_null` what Python writes of NaN and infinity is null.

    Raises ValueError where it is too large or too deep, not UTF-8, says a name twice, or holds what JSON has no word
    for (NaN, infinity, half a surrogate pair).
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_float=_finite, parse_int=_bounded,
            parse_constant=_null if nan_is_null else _no_constant,
        )  # fmt: skip
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError:
        raise ValueError("not JSON") from None
    if data.count(b"[") + data.count(b"{") > MOST_DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair in a text") from None
    return value


def mapping(value: Any) -> dict[str, Any]:
    """`value`, which must be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} where an object should be")
    return value


def parsed_mapping(data: bytes, *, nan_is_null: bool = False) -> dict[str, Any]:
    """The object of a JSON text."""
    return mapping(parse(data, nan_is_null=nan_is_null))


def field(of: dict[str, Any], name: str) -> Any:
    """A value that must be there."""
    if name not in of:
        raise ValueError(f"{name} is missing")
    return of[name]


def whole(of: dict[str, Any], name: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    """A whole number from `low` to `high`; true and false are none."""
    value = field(of, name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, not a whole number from {low:,} to {high:,}")
    return value


def text(of: dict[str, Any], name: str, most: int = MOST_LETTERS) -> str:
    """A text of at most so many letters, none of them a control character."""
    value = field(of, name)
    if not isinstance(value, str) or len(value) > most or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value):
        raise ValueError(f"{name} is {shown(value)}, not a text of one line with at most {most} letters")
    return value


def name_of_file(of: dict[str, Any], name: str) -> str:
    """A name that stays in its folder wherever it is put: letters, digits, dots, dashes and underscores."""
    value = field(of, name)
    if not isinstance(value, str) or not is_plain_name(value):
        raise ValueError(f"{name} is {shown(value)}, which is not the name of a file or folder")
    return value


def is_plain_name(value: str) -> bool:
    """Return True if a text names something inside a folder, on any system."""
    return len(value) <= MOST_LETTERS and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", value) is not None


def figure(of: dict[str, Any], name: str) -> float | None:
    """A number, or nothing where the figure is not defined or not there."""
    value = of.get(name)
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{name} is {shown(value)}, not a number")
    return value


def inner(of: dict[str, Any], name: str) -> dict[str, Any]:
    """An object inside an object."""
    value = field(of, name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not an object")
    return value


def shown(value: Any) -> str:
    """A value in a few letters, for the line that says it is wrong."""
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:37]}..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(n for n in names if names.count(n) > 1))} is said twice")
    return found


def _null(said: str) -> None:
    return None


def _no_constant(said: str) -> NoReturn:
    raise ValueError(f"{said} is not a number of JSON")


def _finite(said: str) -> float:
    value = float(said)
    if not math.isfinite(value):
        raise ValueError(f"{said[:40]} is beyond what a number holds")
    return value


def _bounded(said: str) -> int:
    if len(said) > MOST_DIGITS:
        raise ValueError(f"a number of {len(said)} digits")
    return int(said)


def _is_deep(value: Any) -> bool:
    """Return True if more is inside each other than MOST_DEPTH."""
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            part
            for one in level
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return False
    return True
