"""Rows of which the true features are known: sparse sums of random directions (`worlds.features` says how).

Sample i is a function of the settings and of i alone, so that stores of samples grow, resume and are repaired with the
same bytes. Held-out samples are those from `HELD_OUT` on.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.configs.base import MOST, Amount
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.worlds.features import FIRST, GENERATOR, HELD_OUT, GroundTruth, Groups, Independent
from sae.pipeline.worlds.hierarchy import Hierarchy

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

PART = 16_384  # rows drawn at a time


class SyntheticConfig(SourceConfig):
    """Settings of rows with known features: which to make, and how to store them."""

    source: Literal["synthetic"] = Field("synthetic", description="where rows come from")
    d: int = Field(256, ge=1, le=MOST, description="width of a row")
    features: int = Field(512, ge=1, le=MOST, description="true features: random directions of length 1")
    presence: Annotated[Groups | Independent | Hierarchy, Field(discriminator="mode")] = Groups()
    noise: float = Field(0.0, ge=0, le=1e6, description="standard deviation of Gaussian noise on each value")
    bias: float = Field(0.0, ge=0, le=1e6, description="length of a random vector that is added to every row")
    apart: int = Field(0, ge=0, description="steps in which the features are turned away from each other first")
    seed: int = Field(0, ge=0, description="seed of the features and the samples")
    rows: int = Field(1_000_000, ge=1, lt=HELD_OUT, description="training rows, rounded up to a whole window")
    validation_rows: int = Field(65_536, ge=1, lt=HELD_OUT, description="held-out rows, rounded up likewise")

    @model_validator(mode="after")
    def _features_suffice(self) -> Self:
        self.presence.check(self.features)
        return self

    def recipe(self) -> Recipe:
        """Everything that decides the samples."""
        newer = {
            name for name in ("bias", "apart") if getattr(self, name)
        }  # said where they are not as they always were
        decide = {"d", "features", "presence", "noise", "seed"} | newer
        return {"generator": GENERATOR, **self.model_dump(mode="json", include=decide)}


@lru_cache(maxsize=1)
def _truth(config: SyntheticConfig) -> GroundTruth:
    return GroundTruth(config)


@register
class SyntheticSource(RowSource):
    """Sparse sums of random directions, which are known: what `sae synthesize` makes."""

    name: ClassVar[str] = "synthetic"
    settings: ClassVar[type[SourceConfig]] = SyntheticConfig
    config: SyntheticConfig

    def __init__(self, config: SyntheticConfig, splits: Sequence[str] = tuple(FIRST)) -> None:
        self.config, self.splits, self.truth = config, tuple(splits), _truth(config)
        self.streams = (Stream("synthetic", config.d, self.truth.features),)

    @classmethod
    def of_settings(cls, config: SyntheticConfig, origins: Origins, progress: Progress) -> "SyntheticSource":
        return cls(config)

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> "SyntheticSource":
        source = store.recipe["source"]
        if source.get("generator") != GENERATOR:
            raise SaeError(
                f"source synthetic {source.get('generator')}: unknown to this version; use the one that wrote the store"
            )
        settings = {name: value for name, value in source.items() if name != "generator"}
        return cls(SyntheticConfig.model_validate(settings), (store.split,))

    def slug(self, stream: Stream, split: str) -> str:
        held_out = "" if split == "train" else f"-{split}"
        return f"synthetic-{self.config.presence.mode}-{self.config.features}in{self.config.d}{held_out}"

    def identity(self) -> Recipe:
        return self.config.recipe()

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        if wanted is None:
            wanted = self.config.rows if split == "train" else self.config.validation_rows
        windows = ActivationStore.layout({})
        return Supply(HELD_OUT, HELD_OUT if wanted == "all" else wanted, lambda i: (windows.start(i),), ended=False)

    def window(self, task: WindowTask) -> Iterator[Rows]:
        first = FIRST[task.split] + task.start[0]
        for low in range(first, first + task.rows, PART):
            position = np.arange(low, min(low + PART, first + task.rows))
            yield Rows(position, partial(self._values, low, len(position)))

    def _values(self, first: int, count: int, names: Sequence[str]) -> list[tuple[str, Tensor]]:
        return [(name, self.truth.draw(first, count)[0]) for name in names]

    def elsewhere(self) -> Callable[[], RowSource]:
        return partial(SyntheticSource, self.config, self.splits)
