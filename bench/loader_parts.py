"""The CPU time of the parts of one step of the loader, of which follows what any number of cores can give.

Threads that open chunks share nothing but Python's lock, so with n of them a step takes the longest of: the opening of
its chunk, shared by n; its gathering, shared by up to four; what holds the lock, shared by nobody. One thread of each
kind runs here, and CPU time is counted, so that a busy machine changes little. What memory can carry is another bound.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from bench.rows import Row
from sae.cache.activations import ActivationStore
from sae.cache.loader import chunks, prefetch
from sae.cache.loader.loader import Loader
from sae.cache.store import arrays

BATCH, STEPS = 4096, 64
OPENING, FILLING, FREE = "opening: ", "filling: ", ", lock let go"
TIMED: dict[str, tuple[Any, str]] = {
    f"{OPENING}decoding{FREE}": (arrays.Zstd, "decode"),
    f"{OPENING}reading{FREE}": (chunks.os, "preadv"),
    f"{OPENING}checking": (chunks, "crc32c_of"),
    f"{OPENING}the rest": (chunks.DecodingReader, "_opened"),
    f"{FILLING}gathering{FREE}": (chunks, "_gather"),
    f"{FILLING}the rest": (prefetch.Prefetcher, "_fill"),
}
CORES = (1, 2, 4, 8, 16)


class Spent(threading.local):
    """Seconds of the parts within the part that a thread is in."""

    within = 0.0


def parts(store: ActivationStore, name: str) -> list[Row]:
    """Microseconds of CPU of the parts of a step, of all; and the rows a second that follow for some numbers of cores.

    The store must have more chunks than are held, and be compressed.
    """
    spent: Counter[str] = Counter()
    nested = Spent()

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*args: Any, **kwargs: Any) -> Any:
            begun, before, nested.within = time.thread_time(), nested.within, 0.0
            try:
                return call(*args, **kwargs)
            finally:
                took = time.thread_time() - begun
                spent[part] += took - nested.within
                nested.within = before + took

        return taken

    with ExitStack() as stack:
        zstd = type("Timed", (arrays.Zstd,), {})  # the class itself takes no other method
        stack.enter_context(patch.object(arrays, "Zstd", zstd))
        for part, (owner, call) in TIMED.items():
            where = zstd if owner is TIMED[f"{OPENING}decoding{FREE}"][0] else owner
            stack.enter_context(patch.object(where, call, timed(part, getattr(where, call))))
        loader = stack.enter_context(Loader(store, BATCH, threads=1))
        batches = loader.encoded()
        steps = store.chunk_rows // BATCH
        for _ in range(steps * (loader.schedule.open + STEPS // 4)):
            next(batches)
        spent.clear()
        begun = time.thread_time()
        for _ in range(steps * STEPS):
            next(batches)
        spent["taking four batches, planning"] = time.thread_time() - begun
    each = {part: seconds / STEPS for part, seconds in spent.items()}
    opening, filling = (sum(s for part, s in each.items() if part.startswith(kind)) for kind in (OPENING, FILLING))
    held = sum(s for part, s in each.items() if not part.endswith(FREE))
    rows = [Row(f"{name}: {part}", 1e6 * s, "us", s / sum(each.values()), "all") for part, s in each.items()]
    for cores in CORES:
        step = max(sum(each.values()) / cores, opening / cores, filling / min(cores, prefetch.FILLING), held)
        rows.append(
            Row(
                f"{name}: by {cores} core{'s' if cores > 1 else ''}",
                store.chunk_rows / step,
                "rows/s",
                sum(each.values()) / step,
                "one",
            )
        )
    return rows
