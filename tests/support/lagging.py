"""A GPU whose streams lag behind, on the CPU, for tests of what is to be done in which order."""

from __future__ import annotations

import random
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """Work that was asked for and has not been done, some of which waits for another stream's."""

    def __init__(self, fake: FakeCuda) -> None:
        self.fake, self.asked, self.done = fake, [], 0
        self.asked: list[Any]

    def ask(self, work: Any) -> None:
        with self.fake.lock:
            self.asked.append(work)
            self.fake.go_on()

    def wait_event(self, event: Event) -> None:
        self.ask(event.reached())

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event(Event(self.fake)))

    def record_event(self, event: Event) -> Event:
        event.record(self)
        return event

    def run(self, upto: int) -> None:
        before, self.fake.doing = self.fake.doing, threading.get_ident()
        while self.done < upto:
            self.done += 1  # before it: a wait leads to another stream, never back
            self.asked[self.done - 1]()
        self.fake.doing = before


class Event:
    def __init__(self, fake: FakeCuda) -> None:
        self.fake, self.at = fake, (Stream(fake), 0)

    def record(self, stream: Stream) -> None:
        with self.fake.lock:
            self.at = stream, len(stream.asked)

    def reached(self) -> Any:
        stream, upto = self.at
        return lambda: stream.run(upto)

    def synchronize(self) -> None:
        with self.fake.lock:
            self.reached()()


class Asked(TorchDispatchMode):
    """Copies within are asked of a stream, not done."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.stream.fake.doing == threading.get_ident():
            return func(*args, **(kwargs or {}))
        if name == "copy_":
            self.stream.ask(lambda: func(*args))
            return args[0]
        found = func(*args, **(kwargs or {}))
        if name in ("clone", "cat"):
            found.fill_(0)
            self.stream.ask(lambda: found.copy_(func(*args, **(kwargs or {}))))
        return found


class FakeCuda:
    """What is asked of torch.cuda, on the CPU: streams that do what they were asked when they must, or sooner."""

    def __init__(self, seed: int) -> None:
        self.lock, self.random = threading.RLock(), random.Random(seed)
        self.doing = 0  # the thread that does what was asked
        self.streams = [Stream(self)]

    def Stream(self, device: torch.device) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def Event(self, *, blocking: bool = False) -> Event:
        return Event(self)

    def device(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext()

    def stream(self, stream: Stream) -> Asked:
        return Asked(stream)

    def current_stream(self, device: torch.device) -> Stream:
        return self.streams[0]

    def go_on(self) -> None:
        stream = self.random.choice(self.streams)
        if self.random.random() < 0.5:
            stream.run(min(len(stream.asked), stream.done + self.random.randrange(4)))
