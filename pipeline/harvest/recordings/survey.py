"""The look at a series before any of it is stored: channels, rate and content, what is held out, scale and filter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae.cache.activations import MOST_WIDTH
from sae.cache.errors import SaeError
from sae.pipeline.harvest.recordings.clocks import Clock, Clocks
from sae.pipeline.harvest.recordings.files import Recording, read
from sae.pipeline.harvest.recordings.treatment import Treatment, band_pass, outliers, robust
from sae.pipeline.harvest.tables import Choice
from sae.pipeline.harvest.tables.base import Table
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.worlds.series import Noisy, NoisySeries

if TYPE_CHECKING:
    from sae.pipeline.harvest.sources.series import SeriesConfig

FAR = 20.0  # robust deviations from which on a value is said to lie far out


class Part(NamedTuple):
    """Steps [start, stop) of one recording that are of one split, and the rows in them."""

    recording: int
    start: int
    stop: int
    rows: int
    position: int  # of the first row


class Made(Table):
    """A series of known noise, as a table: with the noise, or without."""

    def __init__(self, config: Noisy, *, clean: bool) -> None:
        super().__init__(Path("noisy"))
        self._series, self._clean = NoisySeries(config), clean
        self.expect_rows((config.steps, config.channels))

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        first = 0
        for made in self._series.blocks():
            if first + len(made.clean) > start:
                yield first, made.clean if self._clean else made.noisy
            first += len(made.clean)


@dataclass(frozen=True)
class Known:
    """What is known of a series once its files were read: how they are split, scaled and called."""

    parts: dict[str, tuple[Part, ...]]
    treatment: Treatment
    digest: str | None
    stamps: tuple[tuple[int, int], ...]
    rate: float | None
    far: dict[str, int]
    clocks: tuple[Clock, ...]


def looked_at(config: SeriesConfig, progress: Progress) -> Known:
    """Read the whole series, and find what is to be known of it. Raises SaeError for what cannot be rows."""
    stamps = stamps_of(config)
    recordings = opened(config)
    rate = _rate(config, recordings)
    channels = recordings[0].channels
    for one in recordings[1:]:
        if one.channels != channels and (len(one.channels) != len(channels) or one.path.suffix != ".npz"):
            here, first = (", ".join(names[:20]) for names in (one.channels, channels))
            raise SaeError(
                f"recordings = {one.where}: has the channels {here}, and {recordings[0].path.name} has {first}; choose "
                "the same of each with `harvest.columns = [a, b]`"
            )
    if config.window * len(channels) > MOST_WIDTH:
        raise SaeError(
            f"harvest.window = {config.window}: with {len(channels)} channels rows would be too wide; lower it"
        )
    if config.band and rate is None:
        raise SaeError(
            f"harvest.band = {list(config.band)}: how many steps a second has is in no file; give `harvest.rate`"
        )
    sections = band_pass(config.band, rate, config.order) if config.band and rate is not None else None
    digests, clocks = _digests(recordings, progress) if config.recordings else (["noisy"], ())
    parts = _parts(config, recordings, digests)
    training = [(recordings[part.recording], part) for part in parts["train"]]
    count = sum(part.stop - part.start for part in parts["train"])
    if not count:
        raise SaeError(f"harvest.validation = {config.validation:g}: leaves no step to train on; lower it")
    where = f"recordings = {recordings[0].where}" if len(recordings) == 1 else "recordings"

    def raw() -> Iterator[np.ndarray]:
        return chain.from_iterable(one.blocks(part.start, part.stop) for one, part in training)

    scale = robust(raw(), count, channels, where)
    treatment = Treatment(scale, config.clip, sections)
    if sections is not None:
        passed = (treatment(one.blocks(part.start, part.stop)) for one, part in training)
        filtered = robust(chain.from_iterable(passed), count, channels, f"{where}, filtered")
        treatment = replace(treatment, filtered=filtered)
    far = outliers(chain.from_iterable(one.blocks() for one in recordings), scale, config.clip or FAR, channels)
    if far.channels:
        done = "kept as they are; `harvest.clip = 20` pulls them in" if config.clip is None else "clipped to that"
        progress.note(f"outliers {far}; they are {done}")
    whole = None if not config.recordings else hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    counts = {name: count for name, (count, _, _) in far.channels.items()}
    return Known(parts, treatment, whole, stamps, rate, counts, clocks)


def opened(config: SeriesConfig, *, clean: bool = False) -> list[Recording]:
    if not config.recordings:
        return [Recording(Path("noisy"), Made(config.made, clean=clean), config.made.rate)]
    if twice := [one for i, one in enumerate(config.recordings) if one in config.recordings[:i]]:
        raise SaeError(f"recordings = {twice[0]}: is named twice; give each recording once")
    return [
        one
        for path in config.recordings
        for one in read(Path(path), config.array, Choice(config.columns or (), config.without or ()))
    ]


def _rate(config: SeriesConfig, recordings: Sequence[Recording]) -> float | None:
    """The steps a second of all recordings. Raises SaeError where they differ among themselves or from the setting."""
    said = {one.rate: one.path.name for one in recordings if one.rate is not None}
    if config.rate is not None and (other := [rate for rate in said if rate != config.rate]):
        raise SaeError(f"harvest.rate = {config.rate:g}: {said[other[0]]} says {other[0]:g}; leave it out")
    if len(said) > 1:
        rates = ", ".join(f"{name} has {rate:g}" for rate, name in said.items())
        raise SaeError(f"recordings: differ in their steps a second ({rates}); give those of one rate")
    return config.rate or next(iter(said), None)


def split_of(config: SeriesConfig, recordings: int) -> str:
    return config.split if config.split != "auto" else "recording" if recordings > 1 else "time"


def _parts(
    config: SeriesConfig, recordings: Sequence[Recording], digests: Sequence[str]
) -> dict[str, tuple[Part, ...]]:
    """The parts of each split, recordings in the order of their digests, not in that of the files."""
    split = split_of(config, len(recordings))
    if split == "recording" and len(recordings) < 2:
        raise SaeError("harvest.split = recording: there is one recording; give several, or split by time")
    drawn = sorted(digests, key=lambda digest: hashlib.sha256(f"series {config.seed} {digest}".encode()).digest())
    count = min(max(round(config.validation * len(digests)), 1), len(digests) - 1) if config.validation else 0
    held_out = set(drawn[:count]) if split == "recording" else set()
    found: dict[str, list[Part]] = {"train": [], "validation": []}
    position = 0
    for i in sorted(range(len(digests)), key=lambda i: digests[i]):
        one, digest = recordings[i], digests[i]
        end = one.steps - round(config.validation * one.steps) if split == "time" else one.steps
        pieces = [("train", 0, end), ("validation", end, one.steps)]
        if digest in held_out:
            pieces = [("validation", 0, end)]
        for name, start, stop in pieces:
            rows = max(0, (stop - start - config.window) // config.step + 1)
            if stop > start:
                found[name].append(Part(i, start, stop, rows, position + start))
        position += one.steps + config.step
    return {name: tuple(parts) for name, parts in found.items()}


def _digests(recordings: Sequence[Recording], progress: Progress) -> tuple[list[str], tuple[Clock, ...]]:
    """What the steps of each recording are, and which channels are clocks.

    Raises SaeError for what is no number, and for two recordings that are the same.
    """
    looks = [Clocks(one.channels) for one in recordings]
    progress.start("read the series", sum(one.steps for one in recordings), "steps")
    try:
        found = [_digest(one, clocks, progress) for one, clocks in zip(recordings, looks, strict=True)]
    finally:
        progress.finish()
    for i, digest in enumerate(found):
        if digest in found[:i]:
            twin = recordings[found.index(digest)].where
            raise SaeError(f"recordings = {recordings[i].where}: has the same steps as {twin}; give each once")
    return found, tuple(clock for one, look in zip(recordings, looks, strict=True) for clock in look.found(one.where))


def _digest(recording: Recording, clocks: Clocks, progress: Progress) -> str:
    """SHA-256 of the shape and of all steps as little-endian float32."""
    found = hashlib.sha256(f"{recording.steps} {len(recording.channels)}\n".encode())
    for block in recording.blocks():
        found.update(np.ascontiguousarray(block, "<f4").tobytes())
        clocks.look(block)
        progress.advance(len(block))
    return found.hexdigest()


def stamps_of(config: SeriesConfig) -> tuple[tuple[int, int], ...]:
    """Numbers that change when one of the files is written."""
    try:
        return tuple((one.stat().st_size, one.stat().st_mtime_ns) for one in map(Path, config.recordings))
    except OSError as error:
        raise SaeError(f"recordings = {error.filename}: cannot be read ({error.strerror})") from error


def expect_same(config: SeriesConfig, known: Known) -> None:
    if stamps_of(config) != known.stamps:
        raise SaeError("recordings: are other files there; give all machines the same")
