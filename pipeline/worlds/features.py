"""Sparse sums of random directions, x = sum_i c_i f_i (+ noise): who is in a row, and how strongly.

Sample i is a function of the settings and of i alone. Random bits are raw outputs of PCG64, seeded for each purpose and
each block of samples; everything made of them is defined here. A row is the sum of its own few features in one order,
whatever rows are asked for beside it, on however many threads.

Held-out samples are those from `HELD_OUT` on, of the same features.

`hierarchy` has features that depend on each other and have a probability of their own each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import figure, inner, whole
from sae.configs.base import MOST, Settings
from sae.pipeline.worlds.draws import Bits, normal, seeded, uniform
from sae.pipeline.worlds.hierarchy import Hierarchy
from sae.pipeline.worlds.made import Coefficients, together

GENERATOR = 1  # part of the recipe: raised when the same settings give other rows
HELD_OUT = 1 << 52  # the first sample that is never trained on; counts on the command line end far below
FIRST = {"train": 0, "validation": HELD_OUT}  # the first sample of each split
BLOCK = 4096  # samples drawn from one seed, at most
BLOCK_KEYS = 1 << 22  # random numbers of a block, at most (but for a block of one sample)
EXPONENT = 600.0  # members less likely than the first by more than e^600 are all as unlikely


Drawer = Callable[[Bits, int], Coefficients]  # what n samples are made of


class Groups(Settings):
    """A row picks one group of features, evenly, and of it a number of members."""

    mode: Literal["groups"] = "groups"
    groups: int = Field(12, ge=1, description="groups the features are divided into, as evenly as they can be")
    active: int = Field(32, ge=1, description="members of its group in a row")
    decay: float = Field(0.99, gt=0, le=1, description="a member is picked with probability ~ decay^rank in its group")

    def keys(self, features: int) -> int:
        """Random numbers that one sample takes: members of the largest group."""
        return -(-features // self.groups)

    def check(self, features: int) -> None:
        """Raise ValueError where a group has too few members."""
        if self.active > features // self.groups:
            raise ValueError(
                f"active {self.active}: the smallest of {self.groups} groups of {features} features has "
                f"{features // self.groups}; take fewer active, fewer groups or more features"
            )

    def drawer(self, features: int, fixed: Bits) -> Drawer:
        return partial(_even, partial(self.draw, features=features))

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

    def check(self, features: int) -> None:
        """Any number of features will do."""

    def drawer(self, features: int, fixed: Bits) -> Drawer:
        return partial(_even, partial(self.draw, features=features))

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


class World(Protocol):
    """What decides the samples."""

    @property
    def d(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def presence(self) -> Groups | Independent | Hierarchy: ...
    @property
    def noise(self) -> float: ...
    @property
    def bias(self) -> float: ...
    @property
    def apart(self) -> int: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Said:
    """A world as the recipe of a store says it."""

    d: int
    features: int
    presence: Groups | Independent | Hierarchy
    noise: float
    bias: float
    apart: int
    seed: int

    @classmethod
    def of(cls, source: Recipe) -> Self:
        """Of what a recipe says of its source. Raises ValueError where that is no such world, or another version's."""
        whole(source, "generator", GENERATOR, GENERATOR)
        adapter: TypeAdapter[Any] = TypeAdapter(Groups | Independent | Hierarchy)
        return cls(
            whole(source, "d", 1, MOST), whole(source, "features", 1, MOST),
            adapter.validate_python(inner(source, "presence")), figure(source, "noise") or 0.0,
            figure(source, "bias") or 0.0, whole({"apart": 0, **source}, "apart"), whole(source, "seed"),
        )  # fmt: skip


class GroundTruth:
    """The features of some settings, `features` [G, d] float32 of length 1, and the samples made of them."""

    def __init__(self, config: World) -> None:
        self.config = config
        directions = normal(self._bits("features", 0), config.features * config.d).reshape(config.features, config.d)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        self.features = torch.from_numpy(set_apart(directions, config.apart).astype(np.float32))
        bias = normal(self._bits("bias", 0), config.d)
        self.bias = torch.from_numpy((config.bias * bias / np.linalg.norm(bias)).astype(np.float32))
        self._drawn = config.presence.drawer(config.features, lambda what: self._bits(what, 0))
        self._block = BLOCK
        while self._block > 1 and self._block * config.presence.keys(config.features) > BLOCK_KEYS:
            self._block //= 2

    def draw(self, first: int, count: int) -> tuple[Tensor, Coefficients]:
        """Samples [first, first + count): rows float32 [count, d], and what each was made of."""
        blocks = self._blocks(first, count)
        made = [self._made(block, low, high) for block, low, high in blocks]
        rows = [self._rows(part, *place) for part, place in zip(made, blocks, strict=True)]
        return torch.cat(rows), together(made)

    def made(self, first: int, count: int) -> Coefficients:
        """What samples [first, first + count) are made of."""
        return together([self._made(*place) for place in self._blocks(first, count)])

    def coefficients_at(self, samples: np.ndarray) -> Tensor:
        """float32 [n, G]: how much of each feature is in some samples [n]; all between them are drawn."""
        first, last = int(samples.min()), int(samples.max())
        return self.made(first, last + 1 - first).chosen(samples - first).dense(self.config.features)

    def _blocks(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """The blocks that samples [first, first + count) are in, and which of each: its samples [low, high)."""
        assert first >= 0 and count > 0, (first, count)
        size, stop = self._block, first + count
        every = range(first // size, (stop - 1) // size + 1)
        return [(block, max(first - block * size, 0), min(stop - block * size, size)) for block in every]

    def _made(self, block: int, low: int, high: int) -> Coefficients:
        n = self._block
        return self._drawn(lambda what: self._bits(what, block), n).part(low, high)

    def _rows(self, made: Coefficients, block: int, low: int, high: int) -> Tensor:
        rows = embedding_bag(
            torch.from_numpy(made.feature), self.features, torch.from_numpy(made.start[:-1]), mode="sum",
            per_sample_weights=torch.from_numpy(made.value),
        )  # fmt: skip
        if self.config.bias:
            rows += self.bias
        if self.config.noise:
            noise = normal(self._bits("noise", block), self._block * self.config.d).reshape(self._block, -1)[low:high]
            rows += torch.from_numpy((self.config.noise * noise).astype(np.float32))
        return rows

    def _bits(self, purpose: str, block: int) -> np.random.PCG64:
        return seeded(f"synthetic {GENERATOR} {self.config.seed} {purpose} {block}")


def _even(draw: Callable[[Bits, int], tuple[np.ndarray, np.ndarray]], bits: Bits, n: int) -> Coefficients:
    """The features of n samples with coefficients between 0 and 1, all as likely."""
    start, feature = draw(bits, n)
    return Coefficients(start, feature, uniform(bits("coefficients"), len(feature)).astype(np.float32))


def set_apart(directions: np.ndarray, steps: int) -> np.ndarray:
    """Unit rows [G, d] after some steps down the sum of their squared cosines, as far apart as so many can be.

    Rounded to 2^-20, so that sums in another order (on other threads) come to the same rows.
    """
    for _ in range(steps):
        pull = directions @ (directions.T @ directions) - directions
        directions = directions - pull * directions.shape[1] / (2 * len(directions))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return np.round(directions * 2.0**20) / 2.0**20 if steps else directions


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
