"""The number of cores that this process has to itself: those it may use, less those that are busy with something else.

Two threads on a core that is taken wait for each other at every step: on a busy machine they are many times slower than
one. Given up: what begins a moment later is not seen; `--threads` says otherwise.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sae.cache.errors import SaeError

LOOK = 0.2  # seconds between two looks at what the cores do
CROWD = 8  # processes a core that cannot be meant: each takes memory, and waits for the others

CGROUPS, MINE, STAT = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc/stat")


def mine() -> set[int]:
    """The cores this process is bound to, or all there are."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def usable() -> int:
    """Cores this process may use: those it is bound to, as far as the quotas of its cgroups allow; at least 1."""
    return max(1, int(min([len(mine()), *_quotas()])))


def free() -> int:
    """Of the usable cores, those that nothing else keeps busy; at least 1."""
    return max(1, min(usable(), len(mine()) - round(_busy())))


def expect_few(processes: int, asked: str, note: Callable[[str], None]) -> None:
    """Note where so many processes that compute have fewer cores between them; asked: the option, as `workers =`.

    Raises SaeError for a crowd.
    """
    there = usable()
    has = f"{there} core{'s' if there > 1 else ''}"
    if processes > CROWD * there:
        raise SaeError(f"{asked} {processes}: so many processes have {has} between them here; try {there}")
    if processes > there:
        note(f"{asked} {processes}: so many processes have {has} between them here, and are no faster than {there}")


def _quotas() -> Iterator[float]:
    """Cores by the quotas of this process' cgroups and those around them, version 2 and 1."""
    try:
        lines = MINE.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (CGROUPS / "cpu", CGROUPS / controllers) if controllers else (CGROUPS, CGROUPS / "unified"):
            inner = top / path.lstrip("/")
            for folder in [inner, *(above for above in inner.parents if above.is_relative_to(top))]:
                found = _numbers(folder / "cpu.max") or [
                    *_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")
                ]  # fmt: skip
                if len(found) == 2 and min(found) > 0:
                    yield found[0] / found[1]


def _numbers(path: Path) -> list[float]:
    """The numbers in a file of the kernel's; none where it is not there, or says `max`."""
    try:
        return [float(word) for word in path.read_text().split() if word.lstrip("-").isdigit()]
    except OSError:
        return []


def _busy() -> float:
    """Cores of ours that are busy while this process waits a moment: by what they do now and by the load of the last
    minute, whichever is less (a command that has just ended counts in the one, a moment's work in the other).
    """
    load = os.getloadavg()[0]
    before = _times()
    if not before:
        return load
    time.sleep(LOOK)
    after = _times()
    shares = []
    for core, (idle, total) in after.items():
        was_idle, was = before.get(core, (idle, total))
        shares.append(1 - (idle - was_idle) / (total - was) if total > was else 0.0)
    return min(load, sum(shares))


def _times() -> dict[int, tuple[int, int]]:
    """Of each of our cores, the time it was idle and the time in all, in ticks; nothing where nobody tells."""
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in mine():
            spent = [int(tick) for tick in ticks[:8]]  # the rest is counted in these
            found[int(name[3:])] = spent[3] + spent[4], sum(spent)
    return found
