"""Worker processes, by dask.distributed: some on this machine (`--workers`), or those of a scheduler (`--scheduler`).

Results come in the order of the tasks and only so many tasks are under way, so that memory stays bounded and what is
written does not depend on how many workers there are. A worker that dies costs the tasks it was at: dask gives them to
another, and after four deaths at one task gives up. Worker processes here get no memory limit, since dask would kill
them in the middle of a window.

Given up: a second at the start; and workers elsewhere must have the versions that are here (they are asked). Text on
this machine is encoded by `pipeline.text.pool`, which is faster for many small results.
"""

import itertools
import logging
import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from cache.errors import SaeError
from pipeline.interrupts import interrupts_withheld
from pipeline.progress import Progress

PATIENCE = 5  # seconds for a scheduler to answer
PATIENCE_WORKERS = 30  # seconds for its first worker to come
REMINDER = 30  # seconds without a result, after which it is asked whether there are workers at all
PACKAGES = ("sae-cache", "torch", "transformers", "transformer-lens", "tiktoken", "tokenizers", "numpy", "distributed")

Task = TypeVar("Task")
Result = TypeVar("Result")


class Cluster:
    """Processes that do tasks. Made by `connected`."""

    def __init__(self, client: Any, scheduler: str | None, progress: Progress) -> None:
        self._client, self._progress = client, progress
        self.is_local = scheduler is None
        self._name = f"--scheduler {scheduler}" if scheduler else "--workers"
        self.size = max(1, sum(client.nthreads().values()))  # tasks it does at the same time, at first

    def everywhere(self, call: Callable[..., Result], *args: Any) -> dict[str, Result]:
        """Call a function in every worker process there is: worker's address -> what it returned."""
        with self._explained():
            return dict(self._client.run(call, *args))

    def ordered(
        self, call: Callable[[Task], Result], tasks: Iterable[Task], ahead: int, what: Callable[[Task], str]
    ) -> Iterator[tuple[Task, Result]]:
        """Each task and its result, in order; at most `ahead` tasks are given out or waiting for their turn.

        Results are fetched as they come, so that a worker that dies later does not take them along. Raises SaeError
        where workers keep dying at a task (which `what` names) or the scheduler is lost.
        """
        numbered = enumerate(tasks)
        given: dict[int, Task] = {}
        futures: dict[int, Any] = {}
        results: dict[int, Result] = {}
        try:
            for turn in itertools.count():
                while len(given) < ahead and (item := next(numbered, None)) is not None:
                    number, given[number] = item
                    futures[number] = self._client.submit(call, given[number], pure=False)
                if turn not in given:
                    return
                while turn not in results:
                    pending = [future for future in futures.values() if not future.done()]
                    if any(future is futures[turn] for future in pending):
                        self._wait(pending)
                    # what failed waits for its turn
                    for ready in [n for n, f in futures.items() if f.status == "finished" or (n == turn and f.done())]:
                        results[ready] = self._result(futures[ready], what(given[ready]))
                        del futures[ready]
                yield given.pop(turn), results.pop(turn)
        finally:
            self._client.cancel(list(futures.values()))

    def _wait(self, futures: list[Any]) -> None:
        """Until one of them is done, or it is time to look again."""
        from distributed import wait

        try:
            with self._explained(), self._client.as_current():  # which `wait` asks
                wait(futures, timeout=REMINDER, return_when="FIRST_COMPLETED")
        except TimeoutError:
            if not self._client.nthreads():
                self._progress.note(f"{self._name}: has no workers at the moment; waiting for one")

    def _result(self, future: Any, what: str) -> Any:
        from distributed import KilledWorker

        try:
            with self._explained():
                return future.result()
        except KilledWorker as error:
            raise SaeError(
                f"{self._name}: {what}: a worker died at it every time it was tried, the last one "
                f"{error.last_worker.address}; if memory ran out, ask for less at once or for fewer workers"
            ) from None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what dask says of a lost scheduler, or of workers without this program, into one line."""
        from distributed.comm import CommClosedError

        try:
            yield
        except (CancelledError, CommClosedError) as error:
            raise SaeError(
                f"{self._name}: the scheduler was lost; what was committed is safe, repeat the command"
            ) from error
        except Exception as error:
            if ModuleNotFoundError.__name__ in repr(error):  # which arrives as it is, or as the text of another
                raise SaeError(
                    f"{self._name}: its workers cannot run this program ({error}); install sae there as it is here"
                ) from error
            raise


@contextmanager
def connected(workers: int, scheduler: str | None, progress: Progress) -> Iterator[Cluster | None]:
    """The cluster that `--workers` and `--scheduler` ask for, or None where this process is to work alone."""
    if scheduler is None and workers == 1:
        yield None
        return
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if scheduler is None:
            with interrupts_withheld():
                local = LocalCluster(
                    n_workers=workers, threads_per_worker=1, processes=True, memory_limit=None, host="127.0.0.1",
                    dashboard_address="127.0.0.1:0", silence_logs=logging.ERROR,
                )  # fmt: skip
            stack.enter_context(local)
            client = stack.enter_context(Client(local, set_as_default=False, direct_to_workers=True))
        else:
            stack.enter_context(_logs_ignored())
            client = stack.enter_context(_client(scheduler, progress))
        cluster = Cluster(client, scheduler, progress)
        if scheduler is not None:
            _expect_same_versions(cluster, scheduler)
        processes = f"{cluster.size} worker{'s' if cluster.size > 1 else ''}"
        progress.note(f"{processes}; dashboard: {client.dashboard_link}")
        yield cluster


def _client(scheduler: str, progress: Progress) -> Any:
    """A client of a scheduler that has workers. Raises SaeError within seconds where there is none."""
    from distributed import Client

    try:
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise SaeError(
            f"--scheduler {scheduler}: no scheduler answers there ({str(error)[:200]}); "
            "start one with `dask scheduler`, and give its address as tcp://host:8786"
        ) from error
    if not client.nthreads():
        progress.note(f"--scheduler {scheduler}: has no workers yet; waiting for one")
    try:
        client.wait_for_workers(1, timeout=PATIENCE_WORKERS)
    except TimeoutError as error:
        client.close()
        raise SaeError(
            f"--scheduler {scheduler}: has no workers; start some with `dask worker {scheduler} --nthreads 1`"
        ) from error
    return client


@contextmanager
def _logs_ignored() -> Iterator[None]:
    """dask logs a stack trace for a scheduler that is lost; here it is an error of one line."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def versions() -> dict[str, str]:
    """What decides results: the versions of Python and of the packages that compute."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # as where sae runs from its source
            found[package] = "none"
    return found


def _expect_same_versions(cluster: Cluster, scheduler: str) -> None:
    here = versions()
    for worker, there in cluster.everywhere(versions).items():
        for package, mine in here.items():
            if there[package] != mine:
                raise SaeError(
                    f"--scheduler {scheduler}: {worker} has {package} {there[package]}, here it is {mine}; "
                    "install the same versions (constraints.txt)"
                )
