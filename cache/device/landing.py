"""Tensors of a device that runs ahead, brought to the host behind what it computes next; and the way there.

Whoever sends them goes on at once. They are copied to pinned memory beside the device's other work, and a thread of
their own takes each to its place when it is there, in the order in which they were sent.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what lists stores needs no torch
    import torch
    from torch import Tensor

AHEAD = 8  # sendings under way, whoever sent them: pinned memory and the device hold no more

Copies = tuple[list["Tensor"], Callable[[], object]]
"""Tensors of the host, and what returns when they are filled."""


class Landing:
    """What is under way from one device. `copied` begins to copy tensors to the host."""

    def __init__(self, copied: Callable[[Sequence[Tensor]], Copies]) -> None:
        self._copied = copied
        self._room = threading.BoundedSemaphore(AHEAD)
        self._thread = ThreadPoolExecutor(1, "landing")

    def send(self, tensors: Sequence[Tensor], land: Callable[[list[Tensor]], None]) -> Future[None]:
        """Have `land` called with the tensors on the host. Waits where AHEAD sendings are under way.

        They may be freed meanwhile, not changed. What `land` raises is raised by the result.
        """
        self._room.acquire()
        try:
            return self._thread.submit(self._land, *self._copied(tensors), land)
        except BaseException:
            self._room.release()
            raise

    def _land(self, copies: list[Tensor], wait: Callable[[], object], land: Callable[[list[Tensor]], None]) -> None:
        try:
            wait()
            land(copies)
        finally:
            self._room.release()


@functools.cache
def landing(device: torch.device) -> Landing | None:
    """What is under way from a device; None for one whose numbers are at hand, or have to be waited for."""
    if device.type != "cuda":
        return None
    import torch

    beside = torch.cuda.Stream(device)

    def copied(tensors: Sequence[Tensor]) -> Copies:
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            copies = []
            for tensor in tensors:
                copies.append(torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True))
                tensor.record_stream(beside)
            # one that sleeps: the core that another would keep busy has windows to compress
            return copies, beside.record_event(torch.cuda.Event(blocking=True)).synchronize

    return Landing(copied)


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what that is at work on, as where one comes from the host."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)  # pinned as it is, it would share memory again
