"""Does a dictionary denoise a series? A forecaster reads the raw series, what a dictionary makes of it, and controls.

All forecasters have the same size, the same weights to begin with and the same places to learn from, and all are to
say the next *raw* row: a smoothed series is easily forecast, and that says nothing. Every error is over the variance of
what was to be said. Of a series made with known noise (`sae synthesize series`) there is a store of what is without
noise: the error against that is told, too, and how much nearer to it the input came, in dB.

Nothing looks ahead: a dictionary and PCA treat each row by itself, the low-pass looks back only, and what they are
fitted to are training rows.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.parsing import whole
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.formats import trained as finished
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime import devices
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.studies.forecaster import Order, Size, forecasts, trained
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.plots import dots
from sae.pipeline.studies.study import Setup, Study, expect_dictionary, of_equal_rows, register
from sae.pipeline.studies.tables import Result

Input = Literal["raw", "sae", "pca", "lowpass", "shuffled"]
PERSISTENCE = "persistence"  # the forecast that the next row is this one
COLUMNS = ("nmse", "nmse_clean", "snr", "snr_gain", "removed", "l0")
TITLES = {
    "nmse": "error of the next row, over its variance", "nmse_clean": "error of the next row without noise",
    "snr_gain": "gain of signal over noise, dB",
}  # fmt: skip
READ = 65_536  # rows at a time


@register
class Denoise(Study):
    """Forecasts of a time series from the raw rows, a dictionary's reconstructions, PCA, a low-pass and shuffled rows.

    Every forecaster is equally large and is to say the next raw row; the forecast that nothing changes stands beside.
    Three seeds of dictionaries and forecasters, unless `--seeds` says otherwise. On a series of known noise, the error
    without noise and the gain in signal over noise are told, too.

    Examples:

        sae study denoise --d-sae 64 --k 6
        sae study denoise --arch batchtopk --d-sae 128 --k 8 --past 32 --components 6
    """

    name = "denoise"
    labels = ("input",)
    shown = ("nmse", "nmse_clean", "snr_gain")
    usual_seeds = 3

    inputs: tuple[Input, ...] = Field(
        ("raw", "sae", "pca", "lowpass", "shuffled"), min_length=1, description="what forecasters read"
    )
    components: int = Field(
        0, ge=0, description="directions that PCA keeps; 0 is as many as the dictionary has active latents"
    )
    cutoff: float = Field(0.5, gt=0, lt=1, description="where the low-pass begins, as a share of half the rate")
    past: int = Field(64, ge=1, le=4096, description="rows that a forecaster reads, at most")
    width: int = Field(64, ge=1, le=4096, description="width of a forecaster")
    depth: int = Field(2, ge=1, le=64, description="blocks of a forecaster")
    heads: int = Field(4, ge=1, le=256, description="attention heads of a forecaster; they divide its width")
    updates: PositiveInt = Field(1000, description="steps of a forecaster's training, of 32 contexts each")
    forecast_lr: float = Field(1e-3, gt=0, le=1, description="largest learning rate of a forecaster")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads}: do not divide a width of {self.width}; take others")
        return self

    def trials(self, setup: Setup) -> list[Trial]:
        return [setup.trial({"input": "sae"}, setup.base)]

    def run(self, setup: Setup) -> Result:
        expect_dictionary(setup.base)
        train, held_out = series_of(setup.dataset, setup.lab.place.cache)
        if "lowpass" in self.inputs:
            expect_no_overlap(train)
        setup = replace(setup, base=of_equal_rows(setup.base, [setup.dataset]))
        device = devices.resolve_device(setup.lab.place.device)
        rows: list[Row] = []
        runs = self.rows(setup, self.trials(setup))
        progress, size = setup.lab.place.progress, self.size
        progress.start("forecast", len(runs) * len(self.inputs) * size.updates, "steps")
        try:
            for run in runs:
                dictionary = finished.load_run(Run(setup.lab.place.runs / run["run"])).to(device)
                inputs = Inputs(self, train, dictionary, run)
                for name in self.inputs:
                    seen = [(inputs.of(name, one).to(device), one.rows.to(device)) for one in (train, held_out)]
                    model = trained(*seen[0], train.order, size, run["seed"], lambda n: progress.advance(n))
                    said = torch.empty_like(held_out.rows)
                    for places, forecast in forecasts(model, seen[1][0], held_out.order, size):
                        said[places] = forecast.cpu()
                    rows.append(row_of(run, name, told(held_out, said, seen[1][0].cpu())))
                still = torch.cat([held_out.rows[:1], held_out.rows[:-1]])
                rows.append(row_of(run, PERSISTENCE, told(held_out, still, None)))
        finally:
            progress.finish()
        verdicts = compared(rows)
        extra = {"verdicts": verdicts, "rows": {"train": len(train.rows), "validation": len(held_out.rows)}}
        return Result(self.name, self.labels, COLUMNS, rows, self.draw, extra=extra)

    @property
    def size(self) -> Size:
        """What all forecasters are like."""
        return Size(self.width, self.depth, self.heads, self.past, self.updates, self.forecast_lr)

    def lines(self, result: Result, *, plain: bool = False) -> list[str]:
        sign = "+-" if plain else "±"
        return [
            f"{name} beside raw: error {one['difference']:+.4g} {sign} {one['spread']:.2g}: {one['verdict']}"
            if one["spread"] is not None
            else f"{name} beside raw: error {one['difference']:+.4g}: one seed says nothing of the spread"
            for name, one in result.extra["verdicts"].items()
        ]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        dots(rows, "input", {name: TITLES[name] for name in self.shown}, path)


@dataclass(frozen=True, eq=False)
class Series:
    """The rows of a split in time, float32 [n, d]; the same without noise, where that is known."""

    rows: Tensor
    order: Order
    clean: Tensor | None
    channels: int
    window: int
    stride: int


def series_of(dataset: Dataset, root: Path) -> tuple[Series, Series]:
    """The training and the held-out series of a dataset, whole in memory. Raises SaeError where it is no series."""
    found = []
    for part in (dataset, dataset.held_out(root)):
        (store,) = part.inputs
        source = store.recipe.get("source", {})
        if part.targets or source.get("source") != "series":
            raise SaeError(f"{store.key}: is no time series; `sae synthesize series` makes a store of one")
        try:
            channels, window, stride = (whole(source, name, 1) for name in ("channels", "window", "stride"))
        except ValueError as error:
            raise DamagedStore(f"{store.path}: is no store of a series ({error}); remove it") from error
        rows, positions = in_time(store)
        follows = torch.from_numpy(np.diff(positions) == stride)
        if int(follows.sum()) < 2:
            raise SaeError(f"{store.key}: has no rows that follow each other; take a longer part of the series")
        recipe = {**store.recipe, "stream": "clean"}
        twin = catalogue.of_recipe(root, ActivationStore, recipe) if store.recipe.get("stream") == "noisy" else None
        clean = None if twin is None or twin.n_rows < len(rows) else in_time(twin)[0]
        found.append(Series(rows, Order(follows), clean, channels, window, stride))
    return found[0], found[1]


def expect_no_overlap(series: Series) -> None:
    """Raise SaeError where rows are windows that a low-pass cannot be drawn over."""
    if series.window > 1 and series.stride != series.window:
        raise SaeError(
            "study.denoise.inputs: a low-pass takes windows that follow without a gap or overlap; leave out lowpass"
        )


def in_time(store: ActivationStore) -> tuple[Tensor, np.ndarray]:
    """The rows of a store by their positions, float32 [n, d], and the positions int64 [n]."""
    positions = store.positions(0, store.n_rows)
    order = np.argsort(positions, kind="stable")
    rows = torch.cat([store.rows(low, min(low + READ, store.n_rows)) for low in range(0, store.n_rows, READ)])
    return rows[torch.from_numpy(order)], positions[order]


class Inputs:
    """What forecasters read of a series. Everything is fitted to the training rows."""

    def __init__(self, study: Denoise, train: Series, dictionary: Dictionary, run: Row) -> None:
        self._study, self._train, self._dictionary, self._seed = study, train, dictionary, int(run["seed"])
        d = train.rows.shape[1]
        self.components = min(d, study.components or max(1, round(run["l0"])))

    def of(self, name: Input, series: Series) -> Tensor:
        """float32 [n, d]: a split as one of them."""
        return {
            "raw": lambda: series.rows, "sae": lambda: self._reconstructed(series.rows),
            "pca": lambda: self._projected(series.rows), "lowpass": lambda: self._smooth(series),
            "shuffled": lambda: self._shuffled(series.rows),
        }[name]()  # fmt: skip

    @torch.no_grad()
    def _reconstructed(self, rows: Tensor) -> Tensor:
        device = self._dictionary.W_dec.device
        return torch.cat([self._dictionary(part.to(device)).float().cpu() for part in rows.split(READ)])

    def _projected(self, rows: Tensor) -> Tensor:
        mean = self._train.rows.double().mean(0)
        centred = self._train.rows.double() - mean
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -self.components :]
        return (mean + (rows.double() - mean) @ directions @ directions.T).float()

    def _smooth(self, series: Series) -> Tensor:
        """A Butterworth filter of second order over each stretch of steps, as if the first had always been."""
        from scipy.signal import butter, sosfilt, sosfilt_zi

        sections = butter(2, self._study.cutoff, output="sos")
        expect_no_overlap(series)
        out = torch.empty_like(series.rows)
        ends = series.order.ends.unique().tolist()
        for low, high in zip([0, *(end + 1 for end in ends)], ends, strict=False):
            steps = series.rows[low : high + 1].reshape(-1, series.channels).double().numpy()
            begun = sosfilt_zi(sections)[:, :, None] * steps[0]
            smooth = sosfilt(sections, steps, axis=0, zi=begun)[0]
            out[low : high + 1] = torch.from_numpy(smooth).float().reshape(high + 1 - low, -1)
        return out

    def _shuffled(self, rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._seed))]


def row_of(run: Row, name: str, figures: dict[str, float | None]) -> Row:
    """A row of the results: an input with its figures, and what is of the dictionary where it is the input."""
    of_run = {"run": run["run"], "l0": run["l0"]} if name == "sae" else {"run": None, "l0": None}
    return {**figures, **of_run, "input": name, "seed": run["seed"]}


def told(series: Series, said: Tensor, read: Tensor | None) -> dict[str, float | None]:
    """The figures of forecasts [n, d] of every row that follows another, made from rows `read` [n, d].

    snr: of what was read, in dB; its gain is over that of the raw rows. removed: share of the raw variance that is not
    in what was read.
    """
    places, clean, raw = series.order.begins + 1, series.clean, series.rows
    figures: dict[str, float | None] = dict.fromkeys(COLUMNS[:-1])
    figures["nmse"] = over_variance(said[places], raw[places])
    if clean is not None:
        figures["nmse_clean"] = over_variance(said[places], clean[places])
    if read is not None:
        figures["removed"] = over_variance(read, raw)
    if read is not None and clean is not None:
        snr, before = (-10 * math.log10(max(over_variance(one, clean), 1e-30)) for one in (read, raw))
        figures |= {"snr": snr, "snr_gain": snr - before}
    return figures


def over_variance(said: Tensor, truth: Tensor) -> float:
    """Squared error of all values over the variance of the truth about its mean."""
    truth = truth.double()
    return ((said.double() - truth).square().sum() / (truth - truth.mean(0)).square().sum()).item()


def compared(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Every input beside the raw one: mean and deviation over seeds of the difference in error, and what it says.

    Where the difference is no larger than its deviation over seeds there is none.
    """
    raw = {row["seed"]: row["nmse"] for row in rows if row["input"] == "raw"}
    found = {}
    for name in dict.fromkeys(row["input"] for row in rows if row["input"] != "raw"):
        apart = [row["nmse"] - raw[row["seed"]] for row in rows if row["input"] == name and row["seed"] in raw]
        if apart:
            mean, spread = statistics.fmean(apart), statistics.stdev(apart) if len(apart) > 1 else None
            same = spread is None or abs(mean) <= spread
            verdict = None if spread is None else "no difference" if same else "better" if mean < 0 else "worse"
            found[name] = {"difference": mean, "spread": spread, "verdict": verdict}
    return found
