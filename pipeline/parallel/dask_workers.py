"""The workers of a dask cluster: who they are now, which of them may be given tasks, and what the user should know of
them. Workers come and go, are paused or ended where they use too much memory, and may have other versions.

A worker is asked for its versions when it is first seen, and one with others is given nothing from then on. What it was
given before that (it takes up tasks the moment it has come) it refuses itself, see `checked`.
"""

import functools
import platform
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from sae.cache.errors import SaeError

PACKAGES = ("sae-cache", "torch", "transformers", "transformer-lens", "tiktoken", "tokenizers", "numpy", "distributed")
ENDED = "worker-restart-memory"  # where dask says which worker it ended

Task = TypeVar("Task")
Result = TypeVar("Result")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that decide results: of Python and of the packages that compute."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # as where sae runs from its source
            found[package] = "none"
    return found


@dataclass(frozen=True)
class Refusal:
    """The answer of a worker that was given a task and has other versions."""

    worker: str
    versions: dict[str, str]


def checked(call: Callable[[Task], Result], expected: dict[str, str] | None, task: Task) -> Result | Refusal:
    """Do a task in a worker process, unless its versions are not the expected ones (None: they need not be asked)."""
    if expected is None or (here := versions()) == expected:
        return call(task)
    from distributed import get_worker

    return Refusal(get_worker().address, here)


@dataclass(frozen=True)
class Packed:
    """A call of `checked` that is made when its pickle is read, as a task of its own.

    dask ends a worker that cannot read what it is sent, as one without this program could not. Of this it can read all
    (bytes, and a function of dask's), and fails in the task instead.
    """

    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return checked, self.arguments


class Workers:
    """Those of a client's scheduler. `look` asks the scheduler, and notes what has changed since.

    Raises SaeError where a worker that is there at the start has other versions than `expected`.
    """

    def __init__(self, client: Any, name: str, note: Callable[[str], None], expected: dict[str, str] | None) -> None:
        self._client, self._name, self._note, self.expected = client, name, note, expected
        self._endings: deque[dict[str, Any]] = deque()  # filled by the client's own thread
        self._ended: set[str] = set()
        self._paused: set[str] = set()
        self._threads: dict[str, int] = {}  # of the workers that may be given tasks, paused ones included
        self._refused: dict[str, str] = {}  # worker -> why, also of those that are gone
        client.subscribe_topic(ENDED, lambda event: self._endings.append(event[1]))
        self._look()
        for why in self._refused.values():
            raise SaeError(f"{name}: {why}; install the same versions (constraints.txt)")

    @property
    def size(self) -> int:
        """Tasks they do at the same time."""
        return sum(threads for worker, threads in self._threads.items() if worker not in self._paused)

    @property
    def known(self) -> set[str]:
        """Those that may be given tasks."""
        return set(self._threads)

    @property
    def refused(self) -> bool:
        """Return True if there is or was one that may not."""
        return bool(self._refused)

    def look(self) -> None:
        """Find out who is there, and say what has changed."""
        before, refused = self.known, len(self._refused)
        self._say_ended()
        for worker in self._look():
            self._note(f"{self._name}: {worker} has come; {self._all()} now")
        for why in list(self._refused.values())[refused:]:
            self._note(f"{self._name}: {why}; it is given nothing")
        for worker in sorted(before - self.known - self._ended - self._refused.keys()):
            self._note(f"{self._name}: {worker} is gone; what it was at is done again by another, {self._all()} now")

    def refuse(self, refusal: Refusal) -> None:
        """Take note of what a worker answered."""
        if refusal.worker not in self._refused and self.expected is not None:
            self._refused[refusal.worker] = _other(refusal.worker, refusal.versions, self.expected)
            self._threads.pop(refusal.worker, None)
            self._note(f"{self._name}: {self._refused[refusal.worker]}; it is given nothing")

    def lack(self) -> str | None:
        """Why nobody does anything at the moment; None where somebody can."""
        if self.size:
            return None
        which = " that are not paused" if self._threads else " of the same versions" if self._refused else ""
        return f"{self._name}: has no workers{which} at the moment; waiting for one"

    def _look(self) -> list[str]:
        """Bring what is known to what is; those that have come."""
        found: dict[str, dict[str, Any]] = self._client.scheduler_info()["workers"]
        come = sorted(found.keys() - self._threads.keys() - self._refused.keys())
        if self.expected is not None:
            come = [worker for worker in come if self._is_alike(worker, self.expected)]
        known = {*self._threads, *come}
        self._threads = {worker: int(about["nthreads"]) for worker, about in found.items() if worker in known}
        paused = {worker for worker in self._threads if found[worker]["status"] == "paused"}
        for worker in sorted(paused - self._paused):
            used, limit = found[worker]["metrics"].get("memory", 0), found[worker]["memory_limit"] or 0
            self._note(
                f"{self._name}: {worker} is paused and takes up nothing new: it uses {used / 1e9:.1f} of its "
                f"{limit / 1e9:.1f} GB; give workers more (dask worker --memory-limit) or start fewer of them"
            )
        for worker in sorted((self._paused - paused) & self.known):
            self._note(f"{self._name}: {worker} goes on")
        self._paused = paused
        return come

    def _is_alike(self, worker: str, expected: dict[str, str]) -> bool:
        """Ask a worker that has come for its versions. False where they are others, or where it is gone already."""
        there = self._client.run(versions, workers=[worker], on_error="return").get(worker)
        if isinstance(there, dict):
            if there == expected:
                return True
            self._refused[worker] = _other(worker, there, expected)
        elif isinstance(there, Exception) and not isinstance(there, OSError):
            self._refused[worker] = f"{worker} cannot run this program ({there})"
        return False

    def _say_ended(self) -> None:
        while self._endings:
            ending = self._endings.popleft()
            self._ended.add(ending["worker"])
            self._note(
                f"{self._name}: {ending['worker']} was ended by dask: it used {ending['rss'] / 1e9:.1f} GB, almost all "
                "it may; what it was at is done again. Give workers more (dask worker --memory-limit), or ask for less "
                "at once (harvest.batch_tokens)"
            )

    def _all(self) -> str:
        return f"{len(self._threads)} worker{'' if len(self._threads) == 1 else 's'}"


def _other(worker: str, there: dict[str, str], here: dict[str, str]) -> str:
    """In what the versions of a worker are others."""
    package = next(name for name in [*here, *there] if here.get(name) != there.get(name))
    return f"{worker} has {package} {there.get(package, 'none')}, here it is {here.get(package, 'none')}"
