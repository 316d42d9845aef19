"""The time of the steps among the columns of a recording: no measurement, but it says whether they are in order."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sae.cache.errors import SaeError
from sae.pipeline.runtime.progress import Progress

NAMED = re.compile(r"(time|timestamp|datetime|date)\b|time_", re.IGNORECASE)
LEAST = 16  # steps at all of which a channel rises that is taken for a clock whatever its name
UNEVEN = 2.0  # times the mean step from which on there is a gap


class Clock(NamedTuple):
    """A channel that counts time, or is named as if it did. falls, gap: the first step that is before the one before
    it, and the one that is farthest from it, where it is far; None where there is none."""

    recording: str
    channel: str
    falls: int | None
    gap: int | None


class Clocks:
    """Looks for the clocks of a recording, whose steps float32 [n, c] it is given in their order."""

    def __init__(self, channels: Sequence[str]) -> None:
        self._channels, self._steps = channels, 0
        c = len(channels)
        self._first, self._last = np.zeros(c), np.zeros(c)
        self._least, self._most = np.full(c, np.inf), np.full(c, -np.inf)
        self._fall, self._far = np.full(c, -1), np.full(c, -1)

    def look(self, steps: np.ndarray) -> None:
        steps = steps.astype(np.float64)
        if not self._steps:
            self._first = self._last = steps[0]
        risen = np.diff(steps, axis=0, prepend=self._last[None])[0 if self._steps else 1 :]
        at = self._steps + len(steps) - len(risen)
        if len(risen):
            fallen, far = risen < 0, risen.argmax(0)
            new = (self._fall < 0) & fallen.any(0)
            self._fall = np.where(new, at + fallen.argmax(0), self._fall)
            self._far = np.where(risen.max(0) > self._most, at + far, self._far)
            self._least, self._most = np.minimum(self._least, risen.min(0)), np.maximum(self._most, risen.max(0))
        self._steps, self._last = self._steps + len(steps), steps[-1]

    def found(self, recording: str) -> Iterator[Clock]:
        mean = (self._last - self._first) / max(1, self._steps - 1)
        for i, channel in enumerate(self._channels):
            if NAMED.match(channel) or (self._steps >= LEAST and self._least[i] > 0):
                falls = int(self._fall[i]) if self._fall[i] >= 0 else None
                yield Clock(recording, channel, falls, int(self._far[i]) if self._most[i] > UNEVEN * mean[i] else None)


def expect_order(clocks: Iterable[Clock], progress: Progress) -> None:
    """Say which channels are clocks, each once. Raises SaeError for steps that are not in the order of one."""
    told = set()
    for one in clocks:
        if one.falls is not None:
            raise SaeError(
                f"recordings = {one.recording}: {one.channel} falls at step {one.falls:,}, so the steps are not in "
                f"order of time; sort them by it (or, if it is no time, give it another name)"
            )
        if one.channel not in told:
            gap = "" if one.gap is None else f", and leaps at step {one.gap:,}, where the steps are taken for even"
            progress.note(
                f"channel {one.channel} only rises, as a clock does{gap}; `harvest.without = {one.channel}` leaves it "
                "out of the rows"
            )
        told.add(one.channel)
