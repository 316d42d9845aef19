"""What an analysis is: a class under `@register` in a file of this folder, its name a literal.

    @register
    class Lengths(Analysis):
        \"\"\"How long decoder rows are.\"\"\"

        name = "lengths"

        def find(self, subject: Analysed) -> Finding:
            lengths = subject.sae.W_dec.norm(dim=1)
            longest = {"longest": lengths.max().item()}
            return Finding(longest, {"lengths": numbers(lengths)}, [distribution("length", lengths)])

`sae analyze RUN lengths` writes `analysis/lengths.json` and `analysis/lengths.png` into the run folder.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.configs.base import Amount, Settings
from sae.pipeline.declared.importing import enter, in_files
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import SAE, Latents
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.studies.plots import Heat, Panel

BATCH, ELEMENTS = 4096, 1 << 24  # rows, and latents of them, that are held at a time
BINS = 40  # of a distribution that is drawn

Value = float | int | None


class AnalyzeConfig(Settings):
    """On how much a dictionary is analysed."""

    rows: Amount = Field(65_536, description="held-out rows to look at")
    top: int = Field(16, ge=1, description="latents, or pairs of them, that are named one by one")
    windows: int = Field(8, ge=2, description="frequency: windows of rows whose firing rates are compared")
    clusters: int = Field(10, ge=2, description="clusters, emergence: groups that k-means looks for")
    clustering: Literal["kmeans", "hdbscan"] = Field("kmeans", description="clusters: how they are found")
    tokens: int = Field(2048, ge=1, description="attribution: held-out tokens that are looked at")
    ablated: int = Field(32, ge=2, description="attribution: latents that are ablated, one by one")
    measure: Literal["ce", "logit"] = Field(
        "ce",
        description="attribution: what is explained; ce, the cross-entropy of the next token; logit, its logit less "
        "the largest other's",
    )


class Seen(NamedTuple):
    """A batch of held-out rows x [B, d_in], their targets y [B, d_out], latents, and the reconstruction of y."""

    x: Tensor
    y: Tensor
    latents: Latents
    y_hat: Tensor


@dataclass(frozen=True)
class Analysed:
    """A dictionary, in the data's units, and what it is looked at on.

    training: the dictionary as its training left it, in the units of training, with what inference has no use for; None
    where there is no checkpoint. held_out: rows that it was not trained on, but for those its training left out.
    truth: the features [G, d_out] that rows were made of, where they are known. root: the cache. model: where the
    language model of the rows is, if not where the harvest found it.
    """

    run: Run
    sae: Dictionary
    training: SAE | None
    held_out: Dataset
    truth: Tensor | None
    config: AnalyzeConfig
    progress: Progress
    root: Path
    model: str | None = None
    offline: bool = False

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def rows(self) -> int:
        """Held-out rows that are looked at."""
        return self.held_out.n_rows if self.config.rows == "all" else min(self.config.rows, self.held_out.n_rows)

    def sample(self, count: int) -> Tensor:
        """The first rows [n, d_in], at most so many."""
        return self.held_out.sample(min(count, self.rows), batch=BATCH).x.to(self.device)

    @torch.no_grad()
    def batches(self, most: int = BATCH) -> Iterator[Seen]:
        """All rows that are looked at, encoded and decoded, at most so many at a time."""
        self.progress.start(f"analyze {self.run.name}", self.rows, "rows")
        try:
            for batch in self.held_out.following(0, self.rows, max(1, min(BATCH, most, ELEMENTS // self.sae.d_sae))):
                x, y = batch.x.to(self.device), batch.y.to(self.device)
                latents = self.sae.encode(x)
                yield Seen(x, y, latents, self.sae.decode(latents))
                self.progress.advance(len(x))
        finally:
            self.progress.finish()


@dataclass(frozen=True)
class Finding:
    """What was found.

    figures: numbers by name, None where one is not defined. details: whatever else JSON can say. panels: of the plot.
    """

    figures: dict[str, Value]
    details: dict[str, Any] = field(default_factory=dict)
    panels: Sequence[Panel | Heat] = ()

    def as_json(self) -> dict[str, Any]:
        return {**self.figures, "details": self.details}


class Analysis(ABC):
    """One side of a dictionary. name: what it is called on the command line and its files are.

    asked_for: whether it is done only where it is named, for it takes more than rows and weights, or long.
    meanings: what its figures are, a line each, but for those that a metric has as well.
    """

    name: ClassVar[str]
    asked_for: ClassVar[bool] = False
    meanings: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def find(self, subject: Analysed) -> Finding:
        """Look at it. SaeError, in one line, where there is nothing of the kind to look at."""


ANALYSES: dict[str, type[Analysis]] = {}
"""Every registered analysis by its name; `analyses` has those of this folder in it, too."""

Kind = TypeVar("Kind", bound=Analysis)


def register(kind: type[Kind]) -> type[Kind]:
    """Make an analysis known under its name, which must be nobody else's."""
    enter(ANALYSES, "analysis", kind.name, kind)
    return kind


def analyses() -> dict[str, type[Analysis]]:
    """Import the files of this folder, and return every registered analysis by its name."""
    return in_files(__package__, ANALYSES)


def numbers(values: Tensor) -> list[float | None]:
    """Numbers as JSON has them, to six digits; None for what is none."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.flatten().tolist()]


def quantiles(values: Tensor, at: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> dict[str, float] | None:
    """Quantiles of numbers by name; None of no numbers."""
    if not values.numel():
        return None
    ordered = values.flatten().double().sort().values
    places = [min(len(ordered) - 1, round(share * (len(ordered) - 1))) for share in at]
    return {f"{share:g}": ordered[place].item() for share, place in zip(at, places, strict=True)}


def distribution(title: str, values: Tensor, name: str = "latents") -> Panel:
    """A panel of how many values lie where: those that are finite."""
    known = values.flatten().double().cpu()
    known = known[known.isfinite()]
    if not len(known):
        return Panel(name, title, {})
    low, high = known.min().item(), known.max().item()
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return Panel(name, title, {"": [(low, len(known))]})
    counts = torch.histc(known, BINS, low, high).tolist()
    width = (high - low) / BINS
    points = [(low + (i + 0.5) * width, count) for i, count in enumerate(counts)]
    return Panel(name, title, {"": points}, marks=False)
