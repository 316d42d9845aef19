"""A real dask cluster of two processes with the tests' small windows, and workers that die on purpose."""

import importlib
import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dask import config
from distributed import Client, LocalCluster, WorkerPlugin


class Small(WorkerPlugin):
    """Gives a worker process the small windows of `small_stores.shrunk`, also after it was started again."""

    def setup(self, worker: Any) -> None:
        import torch
        from support.small_stores import shrunk

        torch.set_num_threads(1)
        self.patched = shrunk()  # kept, since it ends with its context manager
        self.patched.__enter__()


class Dying(WorkerPlugin):
    """Ends a worker process as `kill -9` does when it calls a method: once, at the third call or later, for each file
    in `folder`; or at every call, while that has a file named always.
    """

    def __init__(self, module: str, kind: str, method: str, folder: Path) -> None:
        self.name = f"dying-{kind}"
        self.module, self.kind, self.method, self.folder = module, kind, method, folder

    def setup(self, worker: Any) -> None:
        owner = getattr(importlib.import_module(self.module), self.kind)
        call, calls = getattr(owner, self.method), itertools.count(1)

        def die_perhaps(*args: Any) -> Any:
            always, left = (self.folder / "always").exists(), list(self.folder.glob("*"))
            if always or (next(calls) > 2 and left):
                if not always:
                    left[0].unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        setattr(owner, self.method, die_perhaps)


@contextmanager
def small_cluster(*plugins: WorkerPlugin) -> Iterator[str]:
    """The address of the scheduler of two worker processes."""
    with (
        config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, memory_limit=None, dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        for plugin in (Small(), *plugins):
            client.register_plugin(plugin)
        yield cluster.scheduler_address
