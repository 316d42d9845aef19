"""The device of tensors and the number of threads that compute: `--device` and `--threads`."""

import os
from collections.abc import Callable

import torch

from sae.cache.errors import SaeError
from sae.pipeline.runtime import cores

_said = False  # whether the number of threads is the user's word, which a checkpoint's does not change


def resolve_device(name: str | torch.device) -> torch.device:
    """The device a name stands for: auto (a GPU where there is one), cpu, cuda, cuda:1, ...

    Raises SaeError where it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        raise SaeError(f"device = {name}: not usable here (no such device); try auto, cpu or cuda:1") from None
    try:
        torch.empty(1, device=found).item()  # the device `meta` keeps no values
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        first = str(error).partition("\n")[0]
        raise SaeError(f"device = {name}: not usable here ({first[:200]}); try auto or cpu") from None
    return found


def halves(device: torch.device) -> bool:
    """Return True if a device takes products in bfloat16 many times as fast as in float32: a card with cores for it,
    which are those for TF32, too.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def take_threads(said: int | None, note: Callable[[str], None]) -> None:
    """Compute with so many threads on the CPU from now on; None: as many as there are cores free, which is noted where
    it is not all.

    OMP_NUM_THREADS, where it is set, has had its say. Raises SaeError for more than there are cores.
    """
    global _said
    _said = said is not None
    there = cores.usable()
    if said is not None:
        if said > there:
            raise SaeError(f"threads = {said}: this process may use {there} core{'s' if there > 1 else ''}; give fewer")
        torch.set_num_threads(said)
    elif not os.environ.get("OMP_NUM_THREADS"):
        free = cores.free()
        torch.set_num_threads(free)
        if free < there:
            note(f"threads: {free} of {there}, the other cores are busy; `threads = N` says otherwise")


def take_threads_again(before: int) -> None:
    """Compute with as many threads as before, which rounds sums as before, unless the user has said how many."""
    if not _said and 1 <= before <= cores.usable():
        torch.set_num_threads(before)


def threads_of_each(processes: int) -> tuple[int, bool]:
    """For `take_share` in each of so many new processes of this machine: its threads, and whether the user said so."""
    return max(1, torch.get_num_threads() // processes), _said


def take_share(share: tuple[int, bool]) -> None:
    """Take what `threads_of_each` gave this new process."""
    global _said
    threads, _said = share
    torch.set_num_threads(threads)
