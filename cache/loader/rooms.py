"""Rooms for the rows of a step, as they are stored: on the host, and beside it on the device that they are copied to.

Where the device is the host a room is all there is. A GPU is sent rows from pinned memory on a stream that does nothing
else, and events keep four things in order, for none of which the thread that takes batches, or other work of the GPU,
has to wait:

    a thread fills the host's side      only when the copy before has ended
    the copy starts                     only when what was to read the GPU's side before has done so
    the GPU reads its side              only when the copy has ended
    the memory is somebody else's       only when both have
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import cuda

from sae.cache.activations import ActivationStore
from sae.cache.store.codecs import Encoded, from_numpy


class Room:
    """Room for up to `rows` rows of each of several stores: `host`, which is filled, and the same `there`, on a device.

    A thread calls `begin`, fills `host`, and calls `send`. Then another calls `receive`, reads `there`, and calls
    `leave`; only after that may the room be filled anew. At the end of all `close` is called.
    """

    def __init__(self, stores: Sequence[ActivationStore], rows: int, *, pinned: bool = False) -> None:
        self.host: list[Encoded] = []
        for store in stores:
            stored = from_numpy(np.empty(0, store.codec.numpy_dtype)).dtype
            scale = torch.empty(rows, dtype=torch.float16, pin_memory=pinned) if store.codec.has_row_scale else None
            self.host.append(Encoded(torch.empty((rows, store.d), dtype=stored, pin_memory=pinned), scale))
        self.there = self.host

    def begin(self) -> None:
        """Return when the host's side may be filled."""

    def send(self, rows: int) -> None:
        """The first rows are there now: have them copied."""

    def receive(self) -> None:
        """Let what the device is asked for from now on read `there`."""

    def leave(self) -> None:
        """Nothing more will be asked for that reads `there`."""

    def close(self) -> None:
        """Let the memory go to others."""


class CopiedRoom(Room):
    """A room whose rows are copied to a device at once."""

    def __init__(self, stores: Sequence[ActivationStore], rows: int, device: torch.device) -> None:
        super().__init__(stores, rows, pinned=device.type == "cuda")
        self.device = device
        self.there = [one.like(device) for one in self.host]

    def send(self, rows: int) -> None:
        for mine, its in zip(self.host, self.there, strict=True):
            its.part(0, rows).take(mine.part(0, rows))


class StreamedRoom(CopiedRoom):
    """A room whose rows are copied on a stream of their own; whoever reads them does so on the current one."""

    def __init__(
        self, stores: Sequence[ActivationStore], rows: int, device: torch.device, copying: cuda.Stream
    ) -> None:
        super().__init__(stores, rows, device)
        self._copying, self._owner = copying, cuda.current_stream(device)
        self._arrived, self._left = cuda.Event(blocking=True), cuda.Event()
        self._left.record(self._owner)  # which may not be done yet with what the memory held before

    def begin(self) -> None:
        with cuda.device(self.device):
            self._arrived.synchronize()

    def send(self, rows: int) -> None:
        with cuda.device(self.device), cuda.stream(self._copying):
            self._copying.wait_event(self._left)
            super().send(rows)
            self._arrived.record(self._copying)

    def receive(self) -> None:
        cuda.current_stream(self.device).wait_event(self._arrived)

    def leave(self) -> None:
        self._left.record(cuda.current_stream(self.device))

    def close(self) -> None:
        self.leave()
        for event in (self._left, self._arrived):
            self._owner.wait_event(event)


def rooms(stores: Sequence[ActivationStore], rows: int, device: torch.device, count: int) -> Sequence[Room]:
    """So many rooms, whose rows are read on a device."""
    if device.type == "cpu":
        return [Room(stores, rows) for _ in range(count)]
    if device.type != "cuda":
        return [CopiedRoom(stores, rows, device) for _ in range(count)]
    copying = cuda.Stream(device)
    return [StreamedRoom(stores, rows, device, copying) for _ in range(count)]
