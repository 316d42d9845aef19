"""Rows of which the true features are known: sparse sums of random directions, x = sum_i c_i f_i (+ noise).

Sample i is a function of the settings and of i alone, so that stores of samples grow, resume and are repaired with the
same bytes. Random bits are raw outputs of PCG64, which NumPy promises for ever, seeded for each purpose and each block
of samples; everything made of them is defined here. A row is the sum of its own few features in one order, whatever
rows are asked for beside it, on however many threads.

Held-out samples are those from `HELD_OUT` on, of the same features.

Given up: coefficients that depend on each other, and a probability of its own for each feature.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.configs.base import MOST, Amount, Settings
from sae.pipeline.harvest.draws import normal, seeded, uniform
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

GENERATOR = 1  # part of the recipe: raised when the same settings give other rows
HELD_OUT = 1 << 52  # the first sample that is never trained on; counts on the command line end far below
FIRST = {"train": 0, "validation": HELD_OUT}  # the first sample of each split
BLOCK = 4096  # samples drawn from one seed, at most
BLOCK_KEYS = 1 << 22  # random numbers of a block, at most (but for a block of one sample)
PART = 16_384  # rows drawn at a time
EXPONENT = 600.0  # members less likely than the first by more than e^600 are all as unlikely

Bits = Callable[[str], np.random.PCG64]  # random bits for a purpose


class Groups(Settings):
    """A row picks one group of features, evenly, and of it a number of members."""

    mode: Literal["groups"] = "groups"
    groups: int = Field(12, ge=1, description="groups the features are divided into, as evenly as they can be")
    active: int = Field(32, ge=1, description="members of its group in a row")
    decay: float = Field(0.99, gt=0, le=1, description="a member is picked with probability ~ decay^rank in its group")

    def keys(self, features: int) -> int:
        """Random numbers that one sample takes: members of the largest group."""
        return -(-features // self.groups)

    def draw(self, bits: Bits, n: int, features: int) -> tuple[np.ndarray, np.ndarray]:
        """The features of n samples, as `Coefficients` has them: start [n + 1], feature [n * active].

        The smallest of exponential waiting times are a weighted draw of distinct ones (Efraimidis and Spirakis, 2006).
        """
        table, wait = _members(self, features)
        group = (uniform(bits("group"), n) * self.groups).astype(np.int64)
        keys = -np.log(uniform(bits("members"), n * table.shape[1])).reshape(n, -1) * wait[group]
        first = np.argsort(keys, axis=1, kind="stable")[:, : self.active]
        return np.arange(n + 1) * self.active, table[group[:, None], first].reshape(-1)


class Independent(Settings):
    """Each feature is in a row or not, independently of all others."""

    mode: Literal["iid"] = "iid"
    probability: float = Field(0.015625, gt=0, lt=1, description="probability that a feature is in a row")

    def keys(self, features: int) -> int:
        """Random numbers that one sample takes."""
        return max(1, round(features * self.probability))

    def draw(self, bits: Bits, n: int, features: int) -> tuple[np.ndarray, np.ndarray]:
        """The features of n samples: the places of heads in a row of n * features coins, by the gaps between them."""
        coins = n * features
        expected = coins * self.probability
        source, places, last = bits("presence"), [], -1
        while last < coins:
            gaps = np.log(uniform(source, int(expected + 6 * expected**0.5) + 1)) / np.log1p(-self.probability)
            places.append(last + np.cumsum(np.minimum(gaps, coins).astype(np.int64) + 1))
            last = int(places[-1][-1])
        heads = np.concatenate(places)
        row, feature = np.divmod(heads[heads < coins], features)
        return np.searchsorted(row, np.arange(n + 1)), feature


class SyntheticConfig(SourceConfig):
    """Settings of rows with known features: which to make, and how to store them."""

    source: Literal["synthetic"] = Field("synthetic", description="where rows come from")
    d: int = Field(256, ge=1, le=MOST, description="width of a row")
    features: int = Field(512, ge=1, le=MOST, description="true features: random directions of length 1")
    presence: Annotated[Groups | Independent, Field(discriminator="mode")] = Groups()
    noise: float = Field(0.0, ge=0, le=1e6, description="standard deviation of Gaussian noise on each value")
    seed: int = Field(0, ge=0, description="seed of the features and the samples")
    rows: int = Field(1_000_000, ge=1, lt=HELD_OUT, description="training rows, rounded up to a whole window")
    validation_rows: int = Field(65_536, ge=1, lt=HELD_OUT, description="held-out rows, rounded up likewise")

    @model_validator(mode="after")
    def _groups_are_large_enough(self) -> Self:
        if isinstance(self.presence, Groups):
            groups, active, smallest = self.presence.groups, self.presence.active, self.features // self.presence.groups
            if active > smallest:
                raise ValueError(
                    f"active {active}: the smallest of {groups} groups of {self.features} features has {smallest}; "
                    "take fewer active, fewer groups or more features"
                )
        return self

    def recipe(self) -> Recipe:
        """Everything that decides the samples."""
        return {
            "generator": GENERATOR,
            **self.model_dump(mode="json", include={"d", "features", "presence", "noise", "seed"}),
        }


class Coefficients(NamedTuple):
    """The features in some rows and their strengths: those of row i are the entries `start[i]` to `start[i + 1]`."""

    start: np.ndarray  # int64 [rows + 1]
    feature: np.ndarray  # int64 [entries]
    value: np.ndarray  # float32 [entries], above 0

    def part(self, first: int, stop: int) -> "Coefficients":
        """Those of rows [first, stop)."""
        low, high = self.start[first], self.start[stop]
        return Coefficients(self.start[first : stop + 1] - low, self.feature[low:high], self.value[low:high])

    def dense(self, features: int) -> Tensor:
        """float32 [rows, features]."""
        out = torch.zeros(len(self.start) - 1, features)
        row = np.repeat(np.arange(len(out)), np.diff(self.start))
        out[torch.from_numpy(row), torch.from_numpy(self.feature)] = torch.from_numpy(self.value)
        return out


class GroundTruth:
    """The features of some settings, `features` [G, d] float32 of length 1, and the samples made of them."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.config = config
        directions = normal(self._bits("features", 0), config.features * config.d).reshape(config.features, config.d)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self.features = torch.from_numpy(directions.astype(np.float32))
        self._block = BLOCK
        while self._block > 1 and self._block * config.presence.keys(config.features) > BLOCK_KEYS:
            self._block //= 2

    def draw(self, first: int, count: int) -> tuple[Tensor, Coefficients]:
        """Samples [first, first + count): rows float32 [count, d], and what each was made of."""
        assert first >= 0 and count > 0, (first, count)
        blocks = range(first // self._block, (first + count - 1) // self._block + 1)
        rows, made = zip(*(self._samples(block, first, first + count) for block in blocks), strict=True)
        offsets = np.cumsum([0, *(part.start[-1] for part in made)])
        start = [part.start[:-1] + offset for part, offset in zip(made, offsets[:-1], strict=True)]
        feature, value = (np.concatenate([part[column] for part in made]) for column in (1, 2))
        return torch.cat(rows), Coefficients(np.concatenate([*start, offsets[-1:]]), feature, value)

    def _samples(self, block: int, first: int, stop: int) -> tuple[Tensor, Coefficients]:
        """Those of a block that are in [first, stop)."""
        begin, n = block * self._block, self._block
        low, high = max(first - begin, 0), min(stop - begin, n)
        start, feature = self.config.presence.draw(lambda what: self._bits(what, block), n, self.config.features)
        value = uniform(self._bits("coefficients", block), len(feature)).astype(np.float32)
        made = Coefficients(start, feature, value).part(low, high)
        rows = embedding_bag(
            torch.from_numpy(made.feature), self.features, torch.from_numpy(made.start[:-1]), mode="sum",
            per_sample_weights=torch.from_numpy(made.value),
        )  # fmt: skip
        if self.config.noise:
            noise = normal(self._bits("noise", block), n * self.config.d).reshape(n, -1)[low:high]
            rows += torch.from_numpy((self.config.noise * noise).astype(np.float32))
        return rows, made

    def _bits(self, purpose: str, block: int) -> np.random.PCG64:
        return seeded(f"synthetic {GENERATOR} {self.config.seed} {purpose} {block}")


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


@lru_cache(maxsize=8)
def _members(presence: Groups, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The features of each group [groups, largest], -1 where one has fewer, and the mean wait for each."""
    groups = np.array_split(np.arange(features), presence.groups)
    largest = presence.keys(features)
    table = np.full((presence.groups, largest), -1)
    for row, group in zip(table, groups, strict=True):
        row[: len(group)] = group
    rarity = np.exp(np.minimum(-np.arange(largest) * np.log(presence.decay), EXPONENT))
    return table, np.where(table < 0, np.inf, rarity)
