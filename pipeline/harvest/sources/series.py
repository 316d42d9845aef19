"""Multivariate time series: recordings in files, or a series of known noise (`worlds.series`), as rows.

A row is one step, a value for each channel, or a window of several steps, the earliest first. Held out are the last
steps of every recording, or whole recordings; no row has steps of both. `recordings.treatment` says how steps are
scaled and filtered, by training steps alone.

A row's position is its first step, counted through all recordings, with a gap between two that no stride leaps over:
rows follow each other in time where their positions differ by the stride. A store is named by what the steps are;
the order in which recordings are given makes no difference.

The files are read up to three times, in order, and never held in memory.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sae.cache.activations import MOST_WIDTH, ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import text
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.codecs import codec
from sae.cache.store.head import RECIPE
from sae.cache.store.store import MOST_PATH
from sae.configs.base import Amount
from sae.pipeline.harvest.files import by_worker, others, slug_of
from sae.pipeline.harvest.recordings.clocks import expect_order
from sae.pipeline.harvest.recordings.files import FORMATS
from sae.pipeline.harvest.recordings.reader import Reader
from sae.pipeline.harvest.recordings.survey import Known, Part, expect_same, looked_at, opened, split_of, stamps_of
from sae.pipeline.harvest.tables import Name
from sae.pipeline.language_model import hints
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress, Silent
from sae.pipeline.worlds.series import GENERATOR, Noisy

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

PART = 1 << 20  # values of rows made at a time, about
TREATED = ("clip", "band", "order", "window", "stride", "split", "validation", "seed")  # settings that decide rows


class SeriesConfig(SourceConfig):
    """Settings of a time series: which recordings, how they are treated, and what is a row."""

    source: Literal["series"] = Field("series", description="where rows come from")
    codec: str = Field("float32", description="int8, bfloat16, float16 or float32; with settings as int8:step=0.11")
    recordings: tuple[str, ...] = Field(
        (), description="files of steps [n, channels]; [] makes a series of known noise"
    )
    noisy: Noisy | None = Field(
        None, description="the series of known noise that is made where there are no recordings"
    )
    array: str | None = Field(None, description="which array of an .npz, a .safetensors or a Zarr group")
    columns: tuple[Name, ...] | None = Field(
        None, description="channels by name or number, in this order; unset: all of them"
    )
    without: tuple[Name, ...] | None = Field(None, description="channels to leave out; unset: none")
    rate: float | None = Field(None, gt=0, description="steps a second; unset: what the files say")
    band: tuple[float, ...] | None = Field(
        None, description="ends of a band-pass that looks back only, in Hz, as [0.5, 45]; unset: no filter"
    )
    order: int = Field(4, ge=1, le=10, description="order of the band-pass, a Butterworth filter")
    clip: float | None = Field(
        20.0, gt=0, description="robust deviations from the median that values are kept within, before the filter; "
        "null: as they are"
    )  # fmt: skip
    window: int = Field(1, ge=1, le=MOST_WIDTH, description="steps in a row; 1 is a vector of all channels at one step")
    stride: int | None = Field(None, ge=1, description="steps from one row to the next; unset: those in a row")
    split: Literal["auto", "recording", "time"] = Field(
        "auto",
        description="what is held out: whole recordings, or the end in time of each; auto: recordings, of several",
    )
    validation: float = Field(0.2, ge=0, lt=1, description="share of the recordings or of their steps that is held out")
    seed: int = Field(0, ge=0, description="seed of the choice of held-out recordings")

    @field_validator("band")
    @classmethod
    def _has_two_ends(cls, band: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if band is not None and len(band) != 2:
            raise ValueError("input should be two frequencies, as [0.5, 45]")
        return band

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if not self.recordings:
            if said := [name for name in ("array", "columns", "without", "rate") if getattr(self, name)]:
                value = getattr(self, said[0])
                raise ValueError(f"{said[0]} = {value}: is of recordings; give files of them, or leave it out")
            if self.split == "recording":
                raise ValueError("split = recording: a series of known noise is one recording; take time")
        elif self.noisy is not None:
            raise ValueError("noisy: is of a series that is made; with recordings leave it out")
        return self

    @property
    def made(self) -> Noisy:
        """The series that is made."""
        return self.noisy or Noisy()

    @property
    def step(self) -> int:
        """Steps from one row to the next."""
        return self.stride or self.window


@dataclass(frozen=True, eq=False)
class Opener:
    """Opens the series again, in another process."""

    config: SeriesConfig
    splits: tuple[str, ...]
    streams: tuple[str, ...]
    known: Known

    def __call__(self) -> "SeriesSource":
        with by_worker("read the series"):
            expect_same(self.config, self.known)
            return SeriesSource(self)


@register
class SeriesSource(RowSource):
    """Time series of several channels (CSV, npz, EDF, ...), as steps or windows; see `sae synthesize series`."""

    name: ClassVar[str] = "series"
    settings: ClassVar[type[SourceConfig]] = SeriesConfig
    config: SeriesConfig
    remembered = 1  # not what is without noise

    def __init__(self, opener: Opener) -> None:
        self.config, self.splits, self.opener, self.known = opener.config, opener.splits, opener, opener.known
        self.several = not self.config.recordings
        self._recordings = {name: opened(self.config, clean=name == "clean") for name in opener.streams}
        self.channels = len(next(iter(self._recordings.values()))[0].channels)
        self.streams = tuple(Stream(name, self.config.window * self.channels) for name in opener.streams)
        self._readers: dict[str, Reader] = {}

    @classmethod
    def of_settings(cls, config: SeriesConfig, origins: Origins, progress: Progress) -> "SeriesSource":
        codec(config.codec)
        paths = [str(Path(one).expanduser().resolve()) for one in config.recordings]
        if paths:
            config = config.model_copy(update={"recordings": tuple(paths)})
        known = looked_at(config, progress)
        expect_order(known.clocks, progress)
        splits = tuple(split for split, parts in known.parts.items() if sum(part.rows for part in parts))
        if "train" not in splits:
            raise SaeError(f"harvest.window = {config.window}: no training part of the series is so long; lower it")
        if config.validation and "validation" not in splits:
            progress.note("no row is held out: `harvest.validation` leaves no window for it")
        return cls(Opener(config, splits, ("noisy", "clean") if not paths else (_stem(config),), known))

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> "SeriesSource":
        said = dict(store.recipe["source"])
        try:
            digest = None if "noisy" in said else text(said, "steps")
            settings = {name: said[name] for name in TREATED if name in said}
            choice = {name: said[name] for name in ("array", "columns", "without", "rate") if name in said}
            if "noisy" in said:
                made = dict(said["noisy"])
                if made.pop("generator", None) != GENERATOR:
                    raise SaeError("source series: made by another version; use the one that wrote the store")
                config = SeriesConfig.model_validate({**settings, "noisy": made})
            else:
                config = SeriesConfig.model_validate({**settings, **choice, "recordings": _files(store, origins)})
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedStore(f"{store.path / RECIPE}: is no recipe of a series; remove the store") from error
        known = looked_at(config, Silent())
        if known.digest != digest:
            raise others(store, ", ".join(config.recordings), "steps", "those recordings")
        return cls(Opener(config, (store.split,), (store.recipe.get("stream") or _stem(config),), known))

    def slug(self, stream: Stream, split: str) -> str:
        what = f"series-{stream.name}" if not self.config.recordings else f"series-{_stem(self.config)}"
        return what + ("" if split == "train" else f"-{split}")

    def identity(self) -> Recipe:
        """What a step is, and what is done to it. Settings that change nothing are left out."""
        config = self.config
        treated = config.model_dump(mode="json", include={*TREATED})
        treated |= {"stride": config.step, "split": split_of(config, self._count)}
        if not config.band:
            treated = {name: value for name, value in treated.items() if name not in ("band", "order")}
        if treated["split"] == "time":
            del treated["seed"]
        chosen = config.model_dump(mode="json", include={"array", "columns", "without"})
        return {
            **({"steps": self.known.digest} if config.recordings else {}), "channels": self.channels, **treated,
            **{name: value for name, value in chosen.items() if value},
            **({"rate": self.known.rate} if config.band and config.recordings else {}),
            **({"recordings": len(config.recordings)} if config.recordings else {}),
            **({} if config.recordings else {"noisy": {"generator": GENERATOR, **config.made.model_dump()}}),
        }  # fmt: skip

    @property
    def _count(self) -> int:
        return len(next(iter(self._recordings.values())))

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        rows, windows = sum(part.rows for part in self.known.parts[split]), ActivationStore.layout({})
        asked = rows if wanted is None or wanted == "all" else min(wanted, rows)
        return Supply(rows, asked, lambda i: (windows.start(i),), ended=True)

    def window(self, task: WindowTask) -> Iterator[Rows]:
        if self.known.stamps != stamps_of(self.config):
            raise SaeError("recordings: were changed while they were read; repeat with them as they are now")
        first, stop, before = task.start[0], task.start[0] + task.rows, 0
        step = max(1, PART // (self.config.window * self.channels))
        for part in self.known.parts[task.split]:
            low, high = max(first - before, 0), min(stop - before, part.rows)
            for start in range(low, high, step):
                rows = np.arange(start, min(start + step, high))
                yield Rows(part.position + rows * self.config.step, partial(self._values, part, rows))
            before += part.rows

    def _values(self, part: Part, rows: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        window, stride = self.config.window, self.config.step
        for name in names:
            reader = self._readers.get(name)
            if reader is None or reader.part != part:
                reader = self._readers[name] = Reader(
                    part, self._recordings[name][part.recording], self.known.treatment
                )
            steps = reader.steps(int(rows[0]) * stride, int(rows[-1]) * stride + window)
            seen = np.lib.stride_tricks.sliding_window_view(steps, window, axis=0)[::stride]  # [n, channels, window]
            yield name, torch.from_numpy(seen.transpose(0, 2, 1).reshape(len(rows), -1).copy())

    def hints(self) -> dict[str, str]:
        paths = self.config.recordings
        noted = os.pathsep.join(paths)
        if len(noted) > MOST_PATH:
            noted = str(Path(paths[0]).parent)
        return {"source": noted} if paths else {}

    def about(self) -> dict[str, Any]:
        """The steps, channels and recordings there are, and which values were far out."""
        known = {"channels": self.channels, "recordings": self._count}
        rate = self.known.rate if self.config.recordings else self.config.made.rate
        return {**known, **({} if rate is None else {"rate": rate}), "far_values": self.known.far}

    def elsewhere(self) -> Callable[[], RowSource]:
        return self.opener


def _stem(config: SeriesConfig) -> str:
    stem = slug_of(Path(config.recordings[0]), "recording")
    return stem if len(config.recordings) == 1 else f"{stem}-and-{len(config.recordings) - 1}"


def _files(store: ActivationStore, origins: Origins) -> list[str]:
    """Where the recordings of a store are now: as it notes, or as the user says, a folder being all that are in it."""
    said = hints.files_of(store, origins.source, "recordings are")
    folder = Path(said).expanduser()
    if folder.is_dir() and folder.suffix.lower() not in FORMATS:
        return [str(path) for path in sorted(folder.resolve().iterdir()) if path.suffix.lower() in FORMATS]
    return [str(Path(one).expanduser().resolve()) for one in said.split(os.pathsep)]
