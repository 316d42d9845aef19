"""Who is in a row where features have parents, rarities and correlations: the world of SynthSAEBench.

Its paper is arXiv 2602.14687. Feature i fires with a probability that falls with i as Zipf's law; the first features
are a forest, in which a child fires only with its parent and never beside a sibling; all are correlated through a few
common causes (a Gaussian copula of low rank); and each has a strength of its own, a child's in proportion to its
parent's. Children that are held down by their parents and siblings are made more likely, about by as much.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from sae.configs.base import Settings
from sae.pipeline.worlds.draws import Bits, normal, uniform
from sae.pipeline.worlds.made import Coefficients, in_rows

LEAST_OWN = 0.01  # of a feature's variance is its own, whatever the common causes


class Hierarchy(Settings):
    """Features with parents, rarities, correlations and strengths of their own."""

    mode: Literal["hierarchy"] = "hierarchy"
    most: float = Field(0.4, gt=0, le=1, description="probability that the first feature is in a row")
    least: float = Field(5e-4, gt=0, le=1, description="probability that the last feature is in a row")
    exponent: float = Field(0.5, gt=0, description="how fast probabilities fall with the number of a feature (Zipf)")
    roots: int = Field(
        0, ge=0, description="trees (0: none): the first features are their roots, then come the roots' children"
    )
    branching: int = Field(4, ge=2, description="children of each feature that has any")
    depth: int = Field(2, ge=0, description="levels of children below a root")
    exclusive: bool = Field(True, description="of the children of a feature at most one is in a row")
    rank: int = Field(25, ge=0, description="common causes, by which features are correlated; 0: none")
    correlation: float = Field(0.1, ge=0, description="standard deviation of a common cause's weight in a feature")
    strongest: float = Field(5.0, gt=0, description="mean coefficient of the first feature; falls evenly to the last's")
    weakest: float = Field(4.0, gt=0, description="mean coefficient of the last feature")
    deviation: float = Field(0.5, ge=0, description="mean, and spread, of the standard deviations of coefficients")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least:g} is above most {self.most:g}; the last feature is the rarest")
        return self

    @property
    def in_trees(self) -> int:
        """How many of the first features are in trees."""
        return self.roots * sum(self.branching**level for level in range(self.depth + 1))

    def keys(self, features: int) -> int:
        """Random numbers that one sample takes: one for each feature without a parent, and as many for the rest."""
        return features + self.rank

    def check(self, features: int) -> None:
        """Raise ValueError where the trees need more features than there are."""
        if self.in_trees > features:
            raise ValueError(
                f"{self.roots} trees of {self.depth} levels, {self.branching} children each, are {self.in_trees} "
                f"features, of {features}; take fewer roots, levels or children, or more features"
            )

    def drawer(self, features: int, fixed: Bits) -> Callable[[Bits, int], Coefficients]:
        return partial(self.draw, _forest(self, features, fixed))

    def draw(self, forest: "Forest", bits: Bits, n: int) -> Coefficients:
        """What n samples are made of, level by level: children are drawn where their parent is there."""
        causes = normal(bits("causes"), n * self.rank).reshape(n, self.rank)
        free = np.concatenate([np.arange(self.roots), np.arange(self.in_trees, len(forest.mean))])
        own = normal(bits("presence"), n * len(free)).reshape(n, -1)
        common = np.einsum("nr,fr->nf", causes, forest.factor[free], optimize=False)  # one order, whatever the threads
        row, column = np.nonzero(common + own * forest.own[free] > forest.threshold[free])
        parts = [self._strong(bits, "strength", forest, row, free[column], np.ones(len(row)))]
        for level in range(1, self.depth + 1):
            row, feature, value = parts[-1]
            some = feature < self.in_trees
            parts.append(self._children(bits, f"level {level}", forest, causes, row[some], feature[some], value[some]))
        return in_rows(n, *(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _children(
        self,
        bits: Bits,
        name: str,
        forest: "Forest",
        causes: np.ndarray,
        row: np.ndarray,
        parent: np.ndarray,
        of: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Children that are there [entries] of the parents in some rows: rows, features, coefficients."""
        child = forest.child[parent][:, None] + np.arange(self.branching)  # [parents, branching]
        shared = np.einsum("pr,pbr->pb", causes[row], forest.factor[child], optimize=False)
        own = normal(bits(f"{name} presence"), child.size).reshape(child.shape)
        there = shared + own * forest.own[child] > forest.threshold[child]
        if self.exclusive:
            turn = np.where(there, uniform(bits(f"{name} turn"), child.size).reshape(child.shape), -1.0)
            there &= turn == turn.max(1, keepdims=True)
        at, which = np.nonzero(there)
        scale = of[at] / forest.mean[parent[at]]
        return self._strong(bits, f"{name} strength", forest, row[at], child[at, which], scale)

    def _strong(
        self, bits: Bits, name: str, forest: "Forest", row: np.ndarray, feature: np.ndarray, scale: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The coefficients of features in rows; those that come out below 0 are not there."""
        value = scale * (forest.mean[feature] + forest.spread[feature] * normal(bits(name), len(feature)))
        there = value.astype(np.float32) > 0
        return row[there], feature[there], value[there]


class Forest(NamedTuple):
    """What a world's features are, each [G] (factor: [G, rank])."""

    threshold: np.ndarray  # what a feature's Gaussian must exceed for it to be in a row
    factor: np.ndarray  # how much of each common cause is in the Gaussian
    own: np.ndarray  # how much of the Gaussian is the feature's own
    mean: np.ndarray
    spread: np.ndarray
    child: np.ndarray  # the first child of each that has children


def _forest(world: Hierarchy, features: int, fixed: Bits) -> Forest:
    from scipy.special import ndtri

    factor = world.correlation * normal(fixed("factor"), features * world.rank).reshape(features, world.rank)
    shared = (factor**2).sum(1)
    large = shared > 1 - LEAST_OWN
    factor[large] *= np.sqrt((1 - LEAST_OWN) / shared[large])[:, None]
    spread = np.abs(world.deviation * (1 + normal(fixed("spread"), features)))
    return Forest(
        ndtri(1 - probabilities(world, features)[1]), factor, np.sqrt(1 - (factor**2).sum(1)),
        np.linspace(world.strongest, world.weakest, features), spread,
        world.roots + world.branching * np.arange(features),
    )  # fmt: skip


def probabilities(world: Hierarchy, features: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each feature [G] is meant to be in a row, and how often it is drawn, its parent there.

    A child is drawn 1 / p(parent) times as often as it is meant to be there, and where only one of several may be,
    again 1 + (its siblings' probabilities) / p(parent) times; at most always.
    """
    falls = np.arange(1, features + 1) ** -world.exponent
    fallen = (falls - falls[-1]) / max(falls[0] - falls[-1], np.finfo(float).tiny)
    meant = world.least + (world.most - world.least) * fallen
    drawn = meant.copy()
    for child in range(world.roots, world.in_trees, world.branching):
        parent, siblings = meant[(child - world.roots) // world.branching], slice(child, child + world.branching)
        others = meant[siblings].sum() - meant[siblings] if world.exclusive else 0.0
        drawn[siblings] = np.minimum(1.0, meant[siblings] / parent * (1 + others / parent))
    return meant, drawn
