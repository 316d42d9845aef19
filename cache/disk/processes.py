"""The identity of this process, and whether another one is gone: locks and temporary files name who holds them."""

import hashlib
import os
import re
import secrets
import socket
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

PARTIAL = ".partial"
MACHINE_ID = Path("/etc/machine-id")
# a temporary file's name: what it will be called, and the process that writes it (version 0.1.0: its number)
TEMPORARY = re.compile(rf"(.+)\.(?:([0-9a-f]{{8}})-(\d+)-(\d+)-[0-9a-f]{{8}}|\d+){re.escape(PARTIAL)}")


def space() -> str:
    """The name space our process numbers are of, and its machine: containers may share a host's name, but not its
    processes, and hosts may share a name (localhost) beside a file system."""
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""
    with suppress(OSError):
        return f"{numbers} {MACHINE_ID.read_text('ascii', 'replace').strip()}"
    return numbers


def is_gone(pid: int, since: int = 0) -> bool:
    """Return True if no process of this machine has the number any more (or another that began at another time has
    it)."""
    try:
        with suppress(PermissionError):  # another user's, alive
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # or no process can have it
        return True
    return since > 0 and _began(pid) not in (0, since)


def temporary(name: str) -> str:
    """A name for what will be called `name`: no two are alike, and each tells whether its writer is gone."""
    return f"{name}.{_own(os.getpid())}-{secrets.token_hex(4)}{PARTIAL}"


def final_name(temporary_name: str) -> str | None:
    """Return the name that a temporary file was to take; None for a name that is none of ours."""
    found = TEMPORARY.fullmatch(temporary_name)
    return found[1] if found else None


def left_behind(name: str) -> bool | None:
    """Return True if the writer of a temporary file is gone; None where that cannot be known here."""
    found = TEMPORARY.fullmatch(name)
    if found is None or found[2] != _machine():
        return None
    return is_gone(int(found[3]), int(found[4]))


@lru_cache(maxsize=1)
def _machine() -> str:
    """Eight hex digits for this machine and its processes' name space."""
    return hashlib.sha256(f"{socket.gethostname()} {space()}".encode()).hexdigest()[:8]


@lru_cache(maxsize=1)
def _own(pid: int) -> str:
    """The part of a temporary file's name that says whose it is."""
    return f"{_machine()}-{pid}-{_began(pid)}"


def _began(pid: int) -> int:
    """When a process began, in ticks since this machine did; 0 where that is not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:  # not Linux, or gone
        return 0
    return int(fields[19])
