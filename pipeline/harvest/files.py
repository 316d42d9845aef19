"""Rows in files of the user's: what the sources of them have in common.

A store of such is named by what its rows are, not by where they lie, so its files are looked for again (`hints`), and
what is found is compared with what the store was made from.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError

LETTERS = 40  # of a file's name that are in a store's


def slug_of(path: Path, usual: str) -> str:
    """What a file is called in the names of its stores; `usual` where none of its letters can be in one."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", path.stem).strip("-")[:LETTERS] or usual


def others(store: ActivationStore, source: str, what: str, files: str) -> SaeError:
    """The error for a source whose rows, called `what`, are not those that a store was made from."""
    return SaeError(
        f"source = {source}: has other {what} than those {store.key} was made from, so nothing was repaired; give "
        f"{files} with `source`, or remove the store (`remove()`) and make it again"
    )


@contextmanager
def by_worker(task: str) -> Iterator[None]:
    """Say of an error which machine's worker cannot do its task ("read the rows")."""
    try:
        yield
    except SaeError as error:
        raise type(error)(f"a worker on {socket.gethostname()} cannot {task}: {error}") from error
