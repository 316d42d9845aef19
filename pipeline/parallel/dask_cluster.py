"""Worker processes, by dask.distributed: some on this machine (`--workers`), or those of a scheduler (`--scheduler`).

Results come in the order of the tasks and only so many tasks are under way, so that memory stays bounded and what is
written does not depend on how many workers there are, nor on when they come and go
(`pipeline.parallel.dask_workers`). A worker that dies costs the tasks it was at: dask gives them to another, and after
four deaths at one task gives up. Worker processes here get no memory limit, since dask would kill them in the middle of
a window.

The price is a second at the start. Workers of other machines must have the versions of this one, and are asked. Text on
this machine is encoded by `pipeline.parallel.process_pool`, which is faster for many small results.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sae.cache.errors import SaeError
from sae.pipeline.parallel.dask_workers import Packed, Refusal, Workers, versions
from sae.pipeline.runtime import cores
from sae.pipeline.runtime.interrupts import interrupts_withheld
from sae.pipeline.runtime.progress import Progress

PATIENCE = 5  # seconds for a scheduler to answer
PATIENCE_WORKERS = 30  # seconds for its first worker to come
LOOK = 5.0  # seconds after which it is looked who the workers are
REMINDER = 30.0  # seconds after which it is said again that there are none
TRIES = 4  # times that a task is given to workers all of which go
# dask tells glibc to give memory back at once, which every forward pass then takes again (see bench/RESULTS.md)
NO_TRIMMING = {"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}

Task = TypeVar("Task")
Result = TypeVar("Result")


class CannotRun(SaeError):
    """A worker lacks this program."""


@dataclass
class _Given(Generic[Task]):
    """A task that was given out; `only` to these workers, where some must not have it."""

    task: Task
    future: Any
    only: set[str] | None
    tries: int = 1


class Cluster:
    """Processes that do tasks. Made by `connected`."""

    def __init__(self, client: Any, scheduler: str | None, progress: Progress) -> None:
        self._client, self._progress = client, progress
        self.is_local = scheduler is None
        self._name = f"scheduler = {scheduler}" if scheduler else "workers = ..."
        with self._explained():
            self._workers = Workers(client, self._name, progress.note, None if self.is_local else versions())
        self._looked = self._reminded = time.monotonic()

    @property
    def size(self) -> int:
        """Tasks it does at the same time, at present; at least 1."""
        return max(1, self._workers.size)

    def everywhere(self, call: Callable[..., Result], *args: Any) -> dict[str, Result]:
        """Call a function in every worker process there is: worker's address -> what it returned."""
        with self._explained():
            return dict(self._client.run(call, *args, workers=sorted(self._workers.known)))

    def ordered(
        self, call: Callable[[Task], Result], tasks: Iterable[Task], ahead: Callable[[int], int],
        what: Callable[[Task], str],
    ) -> Iterator[tuple[Task, Result]]:  # fmt: skip
        """Each task and its result, in order; at most `ahead(size)` tasks are given out or waiting for their turn.

        Results are fetched as they come, so that a worker that dies later does not take them along. Raises SaeError
        where workers keep dying at a task (which `what` names) or the scheduler is lost.
        """
        numbered = enumerate(tasks)
        given: dict[int, _Given[Task]] = {}
        results: dict[int, Result] = {}
        try:
            for turn in itertools.count():
                while len(given) < ahead(self.size) and (item := next(numbered, None)) is not None:
                    number, task = item
                    given[number] = _Given(task, *self._submitted(call, task))
                if turn not in given:
                    return
                while turn not in results:
                    lacking = {number: one for number, one in given.items() if number not in results}
                    if not lacking[turn].future.done():
                        self._wait([one.future for one in lacking.values() if not one.future.done()])
                        self._look(call, lacking.values(), what)
                    # what failed waits for its turn
                    for number, one in lacking.items():
                        if one.future.status == "finished" or (number == turn and one.future.done()):
                            result = self._result(one, what(one.task))
                            if isinstance(result, Refusal):
                                self._give_again(call, one, what)
                            else:
                                results[number], one.future = result, None
                yield given.pop(turn).task, results.pop(turn)
        finally:
            self._client.cancel([one.future for one in given.values() if one.future is not None])

    def _submitted(self, call: Callable[[Task], Any], task: Task) -> tuple[Any, set[str] | None]:
        """A future, and the workers that alone may have it."""
        from distributed.protocol import pickle  # as everything between dask's processes is

        only = self._workers.known if self._workers.refused else None
        packed = pickle.dumps(Packed((call, self._workers.expected, task)))
        workers = None if only is None else sorted(only)
        return self._client.submit(pickle.loads, packed, pure=False, workers=workers), only

    def _give_again(self, call: Callable[[Task], Any], one: _Given[Task], what: Callable[[Task], str]) -> None:
        """Give a task to the workers that there are now."""
        if one.tries == TRIES:
            raise SaeError(
                f"{self._name}: {what(one.task)}: all workers that it was given to went, {TRIES} times; if memory ran "
                "out, ask for less at once or for fewer workers"
            )
        one.future.cancel()
        one.future, one.only = self._submitted(call, one.task)
        one.tries += 1

    def _wait(self, futures: list[Any]) -> None:
        """Until one of them is done, or it is time to look again."""
        from distributed import wait

        with suppress(TimeoutError), self._explained(), self._client.as_current():  # which `wait` asks
            wait(futures, timeout=LOOK, return_when="FIRST_COMPLETED")

    def _look(self, call: Callable[[Task], Any], given: Iterable[_Given[Task]], what: Callable[[Task], str]) -> None:
        """Follow the workers, at times; tasks that were only for workers that are gone are given to others."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        with self._explained():
            self._workers.look()
        if (lack := self._workers.lack()) is None:
            self._reminded = now
        elif now - self._reminded >= REMINDER:
            self._reminded = now
            self._progress.note(lack)
        for one in given:
            stuck = one.only is not None and not one.only & self._workers.known and not one.future.done()
            if stuck and self._workers.known:
                self._give_again(call, one, what)

    def _result(self, one: _Given[Any], what: str) -> Any:
        """Return the result of a task; a Refusal where it was given to a worker that must not have it."""
        from distributed import KilledWorker

        try:
            with self._explained():
                result = one.future.result()
                if isinstance(result, Refusal):
                    self._workers.refuse(result)
                return result
        except CannotRun:
            with self._explained():
                self._workers.look()
            if one.only is not None or not self._workers.refused:
                raise
            return Refusal("", {})
        except KilledWorker as error:
            with self._explained():
                self._workers.look()  # where dask ended it, it is said why
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
            # which arrive as they are, or as the text of another
            if ModuleNotFoundError.__name__ in repr(error) or "Can't get attribute" in str(error):
                raise CannotRun(
                    f"{self._name}: its workers cannot run this program ({error}); install sae there as it is here"
                ) from error
            raise


@contextmanager
def connected(workers: int, scheduler: str | None, progress: Progress) -> Iterator[Cluster | None]:
    """The cluster that `--workers` and `--scheduler` ask for, or None where this process is to work alone."""
    if scheduler is None and workers == 1:
        yield None
        return
    if scheduler is None:
        cores.expect_few(workers, "workers =", progress.note)
    from dask import config
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        if scheduler is None:
            with interrupts_withheld(), config.set(NO_TRIMMING):
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
            f"scheduler = {scheduler}: no scheduler answers there ({str(error)[:200]}); "
            "start one with `dask scheduler`, and give its address as tcp://host:8786"
        ) from error
    if not client.nthreads():
        progress.note(f"scheduler = {scheduler}: has no workers yet; waiting for one")
    try:
        client.wait_for_workers(1, timeout=PATIENCE_WORKERS)
    except TimeoutError as error:
        client.close()
        raise SaeError(
            f"scheduler = {scheduler}: has no workers; start some with `dask worker {scheduler} --nthreads 1`"
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
