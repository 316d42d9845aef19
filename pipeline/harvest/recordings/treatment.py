"""What is done to the steps of a series before they become rows: a robust scale, a clip, a band-pass, a scale again.

All of it is measured on training steps alone, and the filter looks back only: no row knows of a step after it, and none
of training knows of one that is held out.

Given up: filters of no delay, which go over the whole recording backwards, too.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sae.cache.errors import SaeError

NORMAL = 1.4826  # standard deviations of a normal variable in its median absolute deviation
SAMPLE = 1 << 24  # values that medians are taken of, at most: evenly spaced steps


class Scale(NamedTuple):
    """Median and robust standard deviation of each channel, float64 [c]."""

    center: np.ndarray
    width: np.ndarray

    def of(self, steps: np.ndarray) -> np.ndarray:
        return (steps - self.center) / self.width


@dataclass(frozen=True, eq=False)
class Treatment:
    """From steps of a file to those that rows are made of.

    raw: of the file's values. clip: how many robust deviations from the median a value is kept within. sections:
    of a filter, float64 [n, 6]. filtered: of what comes out of it.
    """

    raw: Scale
    clip: float | None = None
    sections: np.ndarray | None = None
    filtered: Scale | None = None

    def __call__(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Steps of one part of a recording, from its first on, in blocks of any size: float32 [n, c].

        The filter begins as if the first step had always been. Raises SaeError for numbers beyond float32.
        """
        state: np.ndarray | None = None
        for block in blocks:
            steps = self.raw.of(block.astype(np.float64))
            if self.clip is not None:
                steps = steps.clip(-self.clip, self.clip)
            if self.sections is not None:
                from scipy.signal import sosfilt, sosfilt_zi

                if state is None:
                    state = sosfilt_zi(self.sections)[:, :, None] * steps[0]
                steps, state = sosfilt(self.sections, steps, axis=0, zi=state)
            if self.filtered is not None:
                steps = self.filtered.of(steps)
            with np.errstate(over="ignore"):
                out = steps.astype(np.float32)
            if not np.isfinite(out).all():
                raise SaeError("harvest.clip: steps lie so far out that float32 does not hold them; give a clip, as 20")
            yield out


def robust(blocks: Iterable[np.ndarray], steps: int, channels: Sequence[str], where: str) -> Scale:
    """The scale of so many steps, by medians of evenly spaced ones. Raises SaeError for a channel that has none."""
    every, seen = max(1, -(-steps * len(channels) // SAMPLE)), 0
    kept = []
    for block in blocks:
        kept.append(block[-seen % every :: every])
        seen += len(block)
    sample = np.concatenate(kept).astype(np.float64)
    center = np.median(sample, axis=0)
    width = NORMAL * np.median(np.abs(sample - center), axis=0)
    if (flat := np.flatnonzero(~(width > 0))).size:
        name = channels[int(flat[0])]
        raise SaeError(
            f"{where}: channel {name} is {center[flat[0]]:g} in half of the training steps or more, in float32; it has "
            f"no scale, so leave it out with `harvest.without = {name}`"
        )
    return Scale(center, width)


def band_pass(band: Sequence[float], rate: float, order: int) -> np.ndarray:
    """The sections of a Butterworth filter; from 0 on it is a low-pass. Raises SaeError where there is none."""
    from scipy.signal import butter, sosfilt_zi

    low, high = band
    said = f"harvest.band = [{low:g}, {high:g}]"
    if not 0 <= low < high < rate / 2:
        raise SaeError(
            f"{said}: at {rate:g} steps a second a band lies between 0 and {rate / 2:g} Hz, its lower end first"
        )
    sections = butter(order, high if low == 0 else (low, high), "low" if low == 0 else "band", fs=rate, output="sos")
    poles = np.concatenate([np.roots(section[3:]) for section in sections])
    if not (np.abs(poles) < 1 - 1e-9).all() or not np.isfinite(sosfilt_zi(sections)).all():
        raise SaeError(f"{said}: so narrow or low a filter is not stable; widen it, or lower `harvest.order`")
    return sections


@dataclass
class Outliers:
    """Steps that lie far out, by channel: how many there are, and the farthest."""

    beyond: float
    steps: int = 0
    channels: dict[str, tuple[int, float, int]] = field(default_factory=dict)  # how many, how far, at which step

    def __str__(self) -> str:
        several = [
            f"{name} {count:,} up to {far:,.0f} (step {at:,})" for name, (count, far, at) in self.channels.items()
        ]
        more = f", and {len(several) - 6} channels more" if len(several) > 6 else ""
        return f"beyond {self.beyond:g} robust deviations: {', '.join(several[:6])}{more}"


def outliers(blocks: Iterable[np.ndarray], scale: Scale, beyond: float, channels: Sequence[str]) -> Outliers:
    """Look for steps that lie more than so many robust deviations from the median."""
    found = Outliers(beyond)
    for block in blocks:
        far = np.abs(scale.of(block.astype(np.float64)))
        for column in np.flatnonzero((far > beyond).any(axis=0)).tolist():
            count, most, at = found.channels.get(channels[column], (0, 0.0, 0))
            here = int(far[:, column].argmax())
            if far[here, column] > most:
                most, at = float(far[here, column]), found.steps + here
            found.channels[channels[column]] = (count + int((far[:, column] > beyond).sum()), most, at)
        found.steps += len(block)
    return found
