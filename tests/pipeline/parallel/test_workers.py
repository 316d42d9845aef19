"""Workers that come and go, are paused or ended, or have other versions: what is said of them, and who gets tasks."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.cache.errors import SaeError
from sae.pipeline.parallel import dask_cluster
from sae.pipeline.parallel.dask_workers import ENDED, Refusal, Workers, checked, versions
from sae.pipeline.runtime.progress import Silent

PROJECT = Path(__file__).resolve().parents[3]
HERE = {"python": "3.11", "torch": "2.0"}


class Scheduler:
    """What `Workers` asks of a dask client, answered from `workers` and `versions`."""

    def __init__(self) -> None:
        self.workers: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, object] = {}
        self.heard: dict[str, Callable[[Any], None]] = {}

    def subscribe_topic(self, topic: str, handler: Callable[[Any], None]) -> None:
        self.heard[topic] = handler

    def scheduler_info(self) -> dict[str, Any]:
        return {"workers": dict(self.workers)}

    def run(self, _: object, workers: list[str], on_error: str) -> dict[str, object]:
        assert on_error == "return"
        return {worker: self.versions.get(worker, HERE) for worker in workers}

    def put(self, worker: str, status: str = "running", nthreads: int = 1) -> None:
        self.workers[worker] = {
            "status": status, "nthreads": nthreads, "memory_limit": 4_000_000_000, "metrics": {"memory": 3_300_000_000},
        }  # fmt: skip


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)

    def taken(self) -> list[str]:
        """The lines since this was last asked."""
        lines, self.lines = self.lines, []
        return lines

    def has(self, *words: str) -> bool:
        return all(any(word in line for line in self.lines) for word in words)


def watched(there: Scheduler, expected: dict[str, str] | None = HERE) -> tuple[Workers, Callable[[], list[str]]]:
    notes = Notes()
    workers = Workers(there, "scheduler = x", notes.note, expected)

    def look() -> list[str]:
        workers.look()
        return notes.taken()

    return workers, look


def test_those_that_come_and_go() -> None:
    there = Scheduler()
    there.put("a", nthreads=2)
    workers, look = watched(there)
    assert (workers.size, look()) == (2, [])
    there.put("b")
    assert look() == ["scheduler = x: b has come; 2 workers now"]
    assert (workers.size, workers.known) == (3, {"a", "b"})
    del there.workers["a"]
    assert look() == ["scheduler = x: a is gone; what it was at is done again by another, 1 worker now"]
    assert (workers.size, workers.lack()) == (1, None)
    del there.workers["b"]
    assert look() == ["scheduler = x: b is gone; what it was at is done again by another, 0 workers now"]
    assert workers.lack() == "scheduler = x: has no workers at the moment; waiting for one"


@pytest.mark.parametrize("at_once", [True, False])
def test_a_paused_one(at_once: bool) -> None:
    """Paused before we come, too."""
    there = Scheduler()
    there.put("a", "paused" if at_once else "running")
    notes = Notes()
    workers = Workers(there, "scheduler = x", notes.note, HERE)
    there.put("a", "paused")
    workers.look()
    workers.look()
    assert notes.taken() == [
        "scheduler = x: a is paused and takes up nothing new: it uses 3.3 of its 4.0 GB; give workers more (dask "
        "worker --memory-limit) or start fewer of them"
    ]
    assert workers.lack() == "scheduler = x: has no workers that are not paused at the moment; waiting for one"
    there.put("a")
    workers.look()
    assert (notes.taken(), workers.size, workers.lack()) == (["scheduler = x: a goes on"], 1, None)


def test_one_that_is_ended_for_its_memory() -> None:
    """It is said once, also where it is still there for a moment."""
    there = Scheduler()
    there.put("a")
    _, look = watched(there)
    there.heard[ENDED]((0.0, {"worker": "a", "pid": 7, "rss": 3_900_000_000}))
    assert look() == [
        "scheduler = x: a was ended by dask: it used 3.9 GB, almost all it may; what it was at is done again. Give "
        "workers more (dask worker --memory-limit), or ask for less at once (harvest.batch_tokens)"
    ]
    assert look() == []
    del there.workers["a"]
    assert look() == []
    there.put("a2")
    assert look() == ["scheduler = x: a2 has come; 1 worker now"]


@pytest.mark.parametrize(
    ("versions", "why"),
    [
        ({"python": "3.11", "torch": "2.1"}, "b has torch 2.1, here it is 2.0"),
        ({"python": "3.11"}, "b has torch none, here it is 2.0"),
        ({**HERE, "jax": "1"}, "b has jax 1, here it is none"),
        (ModuleNotFoundError("No module named 'pipeline'"), "b cannot run this program (No module named 'pipeline')"),
        (AttributeError("module has no versions"), "b cannot run this program (module has no versions)"),
    ],
)
def test_one_with_other_versions(versions: object, why: str) -> None:
    there = Scheduler()
    there.put("a")
    there.versions["b"] = versions
    workers, look = watched(there)
    there.put("b")
    assert look() == [f"scheduler = x: {why}; it is given nothing"]
    assert (look(), workers.known, workers.refused) == ([], {"a"}, True)
    del there.workers["a"]
    look()
    assert workers.lack() == "scheduler = x: has no workers of the same versions at the moment; waiting for one"
    with pytest.raises(SaeError, match=r"^scheduler = x: b .*; install the same versions \(constraints\.txt\)"):
        watched(there)
    assert watched(there, expected=None)[0].known == {"b"}


def test_one_that_is_gone_before_it_is_asked() -> None:
    there = Scheduler()
    there.versions["a"] = OSError("timed out")
    there.put("a")
    workers, look = watched(there)
    assert workers.known == set()
    there.versions["a"] = HERE
    assert look() == ["scheduler = x: a has come; 1 worker now"]


def test_what_a_task_found_is_noted_once() -> None:
    there = Scheduler()
    there.put("a")
    notes = Notes()
    workers = Workers(there, "scheduler = x", notes.note, HERE)
    for _ in range(2):
        workers.refuse(Refusal("b", {**HERE, "torch": "3"}))
    there.put("b")
    workers.look()
    assert notes.taken() == ["scheduler = x: b has torch 3, here it is 2.0; it is given nothing"]
    assert workers.known == {"a"}


def test_a_task_is_done_where_versions_are_alike() -> None:
    assert checked(abs, None, -3) == checked(abs, versions(), -3) == 3


# --- real workers -----------------------------------------------------------------------------------------------------

OTHER = (
    "from sae.pipeline.parallel import dask_workers as w; there = w.versions(); "
    "w.versions = lambda: {**there, 'torch': '9.9'}"
)
LACKING = "import sys; sys.modules['sae.pipeline.parallel.dask_workers'] = None"


@contextmanager
def scheduler(failures: int, **options: Any) -> Iterator[str]:
    from dask import config
    from distributed import LocalCluster

    options = {
        "n_workers": 1,
        "threads_per_worker": 1,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": 50,
        **options,
    }
    memory = {"pause": 0.6, "terminate": 0.9, "target": False, "spill": False}
    settings = {f"distributed.worker.memory.{name}": value for name, value in memory.items()}
    with (
        config.set({"distributed.scheduler.allowed-failures": failures, **settings}),
        LocalCluster(**options) as there,
    ):
        yield there.scheduler_address


@contextmanager
def late(address: str, folder: Path, *preloads: str) -> Iterator[None]:
    """Workers that come later, each changed by a line."""
    started, paths = [], [str(PROJECT), str(PROJECT / "tests"), str(Path(__file__).parent)]
    for number, preload in enumerate(preloads):
        script = folder / f"preload_{number}.py"
        script.write_text(f"import sys; sys.path[:0] = {paths!r}; {preload}\n")
        command = [sys.executable, "-m", "dask", "worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
        with (folder / f"log_{number}").open("wb") as log:
            started.append(subprocess.Popen([*command, "--preload", str(script)], cwd=PROJECT, stdout=log, stderr=log))
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.wait()


def whose(seconds: float) -> str:
    """Who does a task that takes so long."""
    from distributed import get_worker

    time.sleep(seconds)
    return str(get_worker().address)


@pytest.mark.slow
def test_workers_that_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of other versions and one without this program do nothing; one that is alike does its share."""
    monkeypatch.setattr(dask_cluster, "LOOK", 0.3)
    notes = Notes()
    did: list[str] = []

    def until(enough: Callable[[], bool]) -> Iterator[float]:
        end = time.monotonic() + 90
        while not enough() and time.monotonic() < end:
            yield 0.05

    with scheduler(3) as address, dask_cluster.connected(1, address, notes) as there:
        assert there is not None and there.size == 1
        with late(address, tmp_path, OTHER, LACKING):
            tasks = until(lambda: notes.has("has torch 9.9, here it is", "cannot run this program"))
            did += [worker for _, worker in there.ordered(whose, tasks, lambda size: size + 3, str)]
            assert len(set(did)) == 1 and notes.has("has torch 9.9, here it is", "cannot run this program")
            with late(address, tmp_path, ""):
                tasks = until(lambda: len(set(did)) == 2)
                for _, worker in there.ordered(whose, tasks, lambda size: size + 3, str):
                    did.append(worker)
                assert len(set(did)) == 2 and notes.has("has come; 2 workers now") and there.size == 2
            tasks = until(lambda: notes.has("is gone; what it was at is done again by another, 1 worker now"))
            did = [worker for _, worker in there.ordered(whose, tasks, lambda size: size + 3, str)]
            assert there.size == 1 and notes.has("is gone; what it was at is done again by another, 1 worker now")


def fill(megabytes: int) -> int:
    """Take memory for a while."""
    room = np.ones(megabytes << 17)
    time.sleep(3)
    return len(room) >> 17


@pytest.mark.slow
def test_workers_that_use_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "LOOK", 0.3)
    notes = Notes()
    with scheduler(1, memory_limit="1000MiB") as address, dask_cluster.connected(1, address, notes) as there:
        assert there is not None
        assert [n for n, _ in there.ordered(fill, [600, 1], lambda size: size + 1, str)] == [600, 1]
        assert notes.has("is paused and takes up nothing new: it uses", "goes on")
        with pytest.raises(SaeError, match="a worker died at it every time"):
            list(there.ordered(fill, [1000], lambda size: size + 1, str))
        assert notes.has("was ended by dask: it used ")
