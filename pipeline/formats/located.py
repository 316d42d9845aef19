"""Where another tool's dictionary is: a folder or a file of this machine, or a folder of a repository on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from sae.cache.errors import NotFound
from sae.pipeline.runtime.network import Refused, snapshot

from .base import FORMATS

HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[\w./-]+))?")
"""`owner/name`, a folder or a file inside of it, and a branch, tag or commit: owner/name/folder@main."""

BESIDE = ("config.json",)
"""What a dictionary's folder may have above it, at the top of its repository."""


def located(source: str, *, offline: bool = False) -> Path:
    """The folder or file on this machine that a source names; what is on the hub is fetched, the dictionary alone.

    Raises NotFound where there is none, or the hub does not answer.
    """
    here = Path(source).expanduser()
    named = HUB.fullmatch(source)
    if here.exists() or named is None or source.startswith((".", "/", "~")):
        return here
    inside = named["inside"]
    if inside is not None and ".." in inside.split("/"):
        raise NotFound(f"{source}: leads out of its repository")
    names = sorted({name for format in FORMATS.values() for name in format.holds})
    wanted = names if inside is None else [inside, *(f"{inside}/{name}" for name in names), *BESIDE]
    try:
        folder = snapshot(named["repository"], wanted, revision=named["revision"], offline=offline)
    except Refused as refused:
        raise NotFound(f"{source}: is not a folder here, and on the hub: {refused}") from refused
    found = folder if inside is None else folder / inside
    if not found.exists() or (found.is_dir() and not any(format.detects(found) for format in FORMATS.values())):
        where = "there" if inside is not None else "at its top; name the folder inside of it, as owner/name/FOLDER"
        raise NotFound(f"{source}: the repository has no dictionary in a format that is known {where}")
    return found
