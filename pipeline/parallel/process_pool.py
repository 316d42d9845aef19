"""Processes of this machine that encode text: the interface of `pipeline.parallel.dask_cluster` without a scheduler.

dask passes every piece through this process' event loop three times, which on two cores costs a third of the speed. A
process that dies ends the command, which goes on from the last window when it is repeated.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from sae.cache.errors import SaeError
from sae.pipeline.runtime.interrupts import interrupts_withheld

Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool:
    """`size` processes, as a context manager."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pool = ProcessPoolExecutor(size, get_context("spawn"))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def everywhere(self, call: Callable[..., Result], *args: Any) -> dict[str, Result]:
        """Call a function as often as there are processes, which starts them all."""
        futures = [self._submit(call, *args) for _ in range(self.size)]
        return {str(number): future.result() for number, future in enumerate(futures)}

    def ordered(
        self,
        call: Callable[[Task], Result],
        tasks: Iterable[Task],
        ahead: Callable[[int], int],
        _what: Callable[[Task], str],
    ) -> Iterator[tuple[Task, Result]]:
        """Each task and its result, in order; at most `ahead(size)` are given out. SaeError where a process died."""
        waiting: deque[tuple[Task, Future[Result]]] = deque()
        source = iter(tasks)
        try:
            while True:
                while len(waiting) < ahead(self.size) and (task := next(source, None)) is not None:
                    waiting.append((task, self._submit(call, task)))
                if not waiting:
                    return
                turn, future = waiting.popleft()
                yield turn, future.result()
        except BrokenProcessPool as error:
            raise SaeError(
                f"workers = {self.size}: one of them died; if memory ran out ask for fewer, then repeat the command"
            ) from error

    def _submit(self, call: Callable[..., Result], *args: Any) -> Future[Result]:
        with interrupts_withheld():  # a process may be begun for it
            return self._pool.submit(call, *args)
