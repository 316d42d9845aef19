"""Rows of trained toy models of superposition: their hidden states, with the coefficients that they were made of.

The toy is trained first (`superposition` says what it is), as many instances at once as are asked for, each of which is
a stream. Its weights, the directions of its features and the coefficients of every row lie in the store, beside the
rows. A recipe has the settings and a digest of the weights, since processors round differently, and a training that
parts by a bit may end elsewhere; a toy that is in the cache already is taken from there and not trained again.

Sample i of an instance is a function of the settings and of i alone, as in `synthetic`: stores grow and are repaired.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.codecs import codec
from sae.cache.store.head import RECIPE
from sae.configs.base import REAL, Amount
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress, Silent
from sae.pipeline.worlds.draws import normal, seeded, uniform
from sae.pipeline.worlds.features import FIRST, HELD_OUT
from sae.pipeline.worlds.superposition import (
    Presence,
    Schedule,
    Toy,
    Training,
    achieved,
    losses,
    trained,
)

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

GENERATOR = 1  # part of the recipe: raised when the same settings give other samples
BLOCK = 4096  # samples drawn from one seed
OWN = {"source", "codec", "rows", "validation_rows"}  # settings that decide nothing of the samples

Table = float | tuple[float, ...] | tuple[tuple[float, ...], ...]


class ToyConfig(SourceConfig):
    """Which toy models of superposition to train, and how many of their rows to store."""

    source: Literal["toy"] = Field("toy", description="where rows come from")
    codec: str = Field("float32", description="int8, bfloat16, float16 or float32; with settings as int8:step=0.11")
    features: int = Field(5, ge=1, le=1024, description="features of a sample")
    hidden: int = Field(2, ge=1, le=4096, description="dimensions that they are squeezed into: the width of a row")
    instances: int = Field(1, ge=1, le=256, description="toys trained side by side, each with rows of its own")
    probability: Table = Field(
        0.025,
        description="probability that a feature is in a sample; a list has one for each feature, a list of lists one "
        "row for each instance",
    )
    last_probability: float | None = Field(
        None, gt=0, le=1, description="that of the last instance, the others' lying evenly between, as powers; unset: "
        "the same for all"
    )  # fmt: skip
    importance: Table = Field(
        1.0, description="weight of a feature's squared error in the toy's loss, with lists as for the probability"
    )
    last_importance: float | None = Field(
        None, gt=0, description="that of the last feature, the others' lying evenly between, as powers; unset: the "
        "same for all"
    )  # fmt: skip
    correlated_pairs: int = Field(0, ge=0, description="pairs of features that are there together")
    anticorrelated_pairs: int = Field(0, ge=0, description="pairs of features that are never there together")
    correlation: float = Field(
        0.0, gt=-1, lt=1, description="correlation of the Gaussian copula of any two features of no pair"
    )
    steps: int = Field(10_000, ge=1, description="steps of the toy's training")
    batch: int = Field(1024, ge=1, description="samples in a step")
    lr: float = Field(1e-3, gt=0, description="the toy's learning rate, of Adam")
    schedule: Schedule = Field("constant", description="of the learning rate: constant, linear or cosine (a quarter)")
    seed: int = Field(0, ge=0, description="seed of the toys and the samples")
    rows: int = Field(1_000_000, ge=1, lt=HELD_OUT, description="training rows, rounded up to a whole window")
    validation_rows: int = Field(65_536, ge=1, lt=HELD_OUT, description="held-out rows, rounded up likewise")

    @model_validator(mode="after")
    def _it_can_be(self) -> Self:
        pairs = self.correlated_pairs + self.anticorrelated_pairs
        if 2 * pairs > self.features:
            raise ValueError(f"{pairs} pairs are of {2 * pairs} features, and there are {self.features}; take fewer")
        rest = self.features - 2 * pairs
        if self.correlation < 0 and rest > 1 and self.correlation < -1 / (rest - 1):
            raise ValueError(
                f"correlation {self.correlation:g}: {rest} features cannot all be so opposed; the least is "
                f"{-1 / (rest - 1):.3g}"
            )
        if self.correlation and rest < 2:
            raise ValueError(f"correlation {self.correlation:g}: {rest} features are in no pair; leave it out")
        self._table("probability", self.last_probability, 0)
        self._table("importance", self.last_importance, 1)
        return self

    @field_validator("probability")
    @classmethod
    def _is_one(cls, value: Table) -> Table:
        if wrong := [p for p in _numbers(value) if not 0 < p <= 1]:
            raise ValueError(f"{wrong[0]:g} is not a probability; give numbers above 0 and up to 1")
        return value

    @field_validator("importance")
    @classmethod
    def _is_no_less_than_nothing(cls, value: Table) -> Table:
        if wrong := [weight for weight in _numbers(value) if not 0 <= weight <= REAL]:
            raise ValueError(f"{wrong[0]:g} is not a weight; give numbers from 0 on")
        return value

    @property
    def presence(self) -> Presence:
        """Who is in a sample. An anti-correlated pair whose probabilities exceed 1 together has them scaled to 1."""
        p = torch.from_numpy(self._table("probability", self.last_probability, 0).copy())
        first = 2 * self.correlated_pairs
        pairs = p[:, first : first + 2 * self.anticorrelated_pairs].unflatten(1, (-1, 2))
        pairs /= pairs.sum(2, keepdim=True).clamp(min=1.0)
        return Presence(p, self.correlated_pairs, self.anticorrelated_pairs, self.correlation)

    @property
    def clipped(self) -> bool:
        """Whether some probabilities are not what was asked for."""
        asked = torch.from_numpy(self._table("probability", self.last_probability, 0).copy())
        return not torch.equal(self.presence.probability, asked)

    @property
    def training(self) -> Training:
        importance = torch.from_numpy(self._table("importance", self.last_importance, 1).copy())
        return Training(importance, self.hidden, self.steps, self.batch, self.lr, self.schedule)

    @property
    def seeds(self) -> list[str]:
        """What the random numbers of each instance's training are named by."""
        return [f"toy {GENERATOR} {self.seed} {instance}" for instance in range(self.instances)]

    def recipe(self) -> Recipe:
        """Everything that decides toys and samples."""
        return {"generator": GENERATOR, **self.model_dump(mode="json", exclude=OWN, exclude_none=True)}

    def _table(self, name: str, last: float | None, axis: int) -> np.ndarray:
        """float64 [I, G] of a setting; with `last`, from the number it is to that one along an axis, as powers."""
        said, shape = getattr(self, name), (self.instances, self.features)
        if last is not None:
            if not isinstance(said, float):
                raise ValueError(f"last_{name} = {last:g}: {name} has a number for each already; give one of the two")
            power = np.linspace(0, 1, shape[axis])
            if not said:
                raise ValueError(f"last_{name} = {last:g}: from 0 there are no powers to it; give another {name}")
            along = said * (last / said) ** power
            return np.broadcast_to(along[:, None] if axis == 0 else along, shape)
        try:
            return np.broadcast_to(np.array(said, np.float64), shape)
        except ValueError as error:
            raise ValueError(
                f"{name}: fits no table of {self.instances} instances and {self.features} features; give a number, one "
                "for each feature, or a list of such for each instance"
            ) from error


@register
class ToySource(RowSource):
    """Hidden states of trained toy models of superposition, which are known: what `sae synthesize toy` makes."""

    name: ClassVar[str] = "toy"
    settings: ClassVar[type[SourceConfig]] = ToyConfig
    config: ToyConfig

    def __init__(
        self, config: ToyConfig, toys: dict[int, Toy], digests: Sequence[str], splits: Sequence[str] = tuple(FIRST)
    ) -> None:
        """Of some of the instances, each a toy of one; `digests` name all of them."""
        self.config, self.toys, self.digests, self.splits = config, toys, list(digests), tuple(splits)
        self.several = config.instances > 1
        self._presence = config.presence
        self._instances = {self._stream(instance): instance for instance in toys}
        self.streams = tuple(
            Stream(name, config.hidden, toys[i].truth(0), (toys[i].weight[0], toys[i].bias[0]))
            for name, i in self._instances.items()
        )
        self._last: tuple[tuple[int, int], Tensor] | None = None

    @classmethod
    def of_settings(cls, config: ToyConfig, origins: Origins, progress: Progress) -> "ToySource":
        codec(config.codec)  # before the toy is trained
        if config.clipped:
            progress.note("probability: two of an anti-correlated pair exceed 1 together; they are scaled to it")
        toys = _in_cache(config, origins)
        if toys is None:
            toys = _trained(config, progress)
        return cls(config, dict(enumerate(toys)), [digest for toy in toys for digest in toy.digests()])

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> "ToySource":
        said = dict(store.recipe["source"])
        if said.pop("generator", None) != GENERATOR:
            raise SaeError("source toy: made by another version; use the one that wrote the store")
        try:
            digests = [str(one) for one in said.pop("weights")]
            config = ToyConfig.model_validate(said)
            instance = int(store.recipe.get("stream", "instance-0").removeprefix("instance-"))
            digest = digests[instance]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DamagedStore(f"{store.path / RECIPE}: is no recipe of a toy; remove the store") from error
        try:
            toy = None if (kept := store.toy) is None else Toy(kept[0][None], kept[1][None])
        except DamagedStore:
            toy = None
        if toy is None or toy.digests() != [digest]:
            toy = _trained(config, Silent())[instance]
        if toy.digests() != [digest]:
            raise SaeError(
                f"{store.path}: its toy is damaged, and the same training ended otherwise here; remove the store "
                "(`remove()`) and make it again"
            )
        return cls(config, {instance: toy}, digests, (store.split,))

    def slug(self, stream: Stream, split: str) -> str:
        instance = f"-{stream.name}" if self.several else ""
        return f"toy-{self.config.features}in{self.config.hidden}{instance}" + ("" if split == "train" else f"-{split}")

    def identity(self) -> Recipe:
        return {**self.config.recipe(), "weights": self.digests}

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        if wanted is None:
            wanted = self.config.rows if split == "train" else self.config.validation_rows
        windows = ActivationStore.layout({"toy": True, "truth": self.config.features})
        return Supply(HELD_OUT, HELD_OUT if wanted == "all" else wanted, lambda i: (windows.start(i),), ended=False)

    def window(self, task: WindowTask) -> Iterator[Rows]:
        first, stop = FIRST[task.split] + task.start[0], FIRST[task.split] + task.start[0] + task.rows
        while first < stop:
            last = min((first // BLOCK + 1) * BLOCK, stop)
            values, coefficients = partial(self._values, first, last), partial(self.coefficients, first, last)
            yield Rows(np.arange(first, last), values, coefficients)
            first = last

    def _values(self, first: int, last: int, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """A row is the sum of its own features in one order, whatever rows are computed beside it, by any threads."""
        for name in names:
            x = self.coefficients(first, last, name)
            row, feature = x.nonzero(as_tuple=True)
            begin = torch.searchsorted(row, torch.arange(len(x)))
            weight = self.toys[self._instances[name]].weight[0]
            yield name, embedding_bag(feature, weight, begin, mode="sum", per_sample_weights=x[row, feature])

    def coefficients(self, first: int, last: int, name: str) -> Tensor:
        """float32 [last - first, G]: samples of a stream, all of one block."""
        instance, block = self._instances[name], first // BLOCK
        if self._last is None or self._last[0] != (instance, block):
            self._last = (instance, block), self._drawn(instance, block)
        return self._last[1][first - block * BLOCK : last - block * BLOCK]

    def _drawn(self, instance: int, block: int) -> Tensor:
        presence, shape = self._presence.of(instance), (1, BLOCK, self.config.features)

        def numbers(purpose: str, draw: Callable[[np.random.PCG64, int], np.ndarray]) -> Tensor:
            bits = seeded(f"{self.config.seeds[instance]} samples {purpose} {block}")
            return torch.from_numpy(draw(bits, BLOCK * self.config.features).reshape(shape))

        there = presence.there(numbers("chance", uniform), numbers("copula", normal) if presence.needs_normal else None)
        return torch.where(there, numbers("strength", uniform), 0.0)[0].float()

    def elsewhere(self) -> Callable[[], RowSource]:
        return partial(ToySource, self.config, self.toys, self.digests, self.splits)

    def about(self) -> dict[str, Any]:
        """The loss of the toys (the mean of several), the norms of their features, and what correlation they have.

        Of several instances `losses` has each, and norms are a list for each.
        """
        config = self.config
        toy = Toy(*(torch.cat(values) for values in zip(*self.toys.values(), strict=True)))
        every = losses(toy, self._presence, config.training.importance, config.seeds)
        norms = torch.linalg.vector_norm(toy.weight, dim=2).tolist()
        several = {"losses": every} if self.several else {}
        found = {"loss": sum(every) / len(every), **several, "feature_norms": norms if self.several else norms[0]}
        if self._presence.needs_normal:
            found["correlation"] = achieved(self._presence, config.seeds[0])
        return found

    def _stream(self, instance: int) -> str:
        return f"instance-{instance}" if self.several else "toy"


def _numbers(value: Table) -> list[float]:
    """Every number of a table."""
    return [value] if isinstance(value, float) else [one for part in value for one in _numbers(part)]


def _trained(config: ToyConfig, progress: Progress) -> list[Toy]:
    """Every instance, a toy of one each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products so small lose by being shared, and a toy is the same on any number of cores
    progress.start("train the toy", config.steps, "steps")
    try:
        found = trained(config.presence, config.training, config.seeds, progress.advance)
    finally:
        progress.finish()
        torch.set_num_threads(threads)
    if not all(values.isfinite().all() for values in found):
        raise SaeError(f"synthesize.lr = {config.lr:g}: the toy diverged; lower it")
    return [Toy(found.weight[i : i + 1], found.bias[i : i + 1]) for i in range(config.instances)]


def _in_cache(config: ToyConfig, origins: Origins) -> list[Toy] | None:
    """The toys of the same settings, where whole stores of theirs are there; None where not every instance has one."""
    found: dict[str, Toy] = {}
    wanted = canonical(config.recipe())
    digests: list[str] = []
    for path in catalogue.folders(origins.root, ActivationStore.kind):
        if not path.name.startswith("toy-"):
            continue
        try:
            store = ActivationStore(path)
            said = dict(store.recipe["source"])
            digests = said.pop("weights", [])
            said.pop("source", None)
            kept = store.toy if canonical(said) == wanted else None
        except DamagedStore:  # `verify` tells of it
            continue
        if kept is None:
            continue
        toy = Toy(kept[0][None], kept[1][None])
        found[toy.digests()[0]] = toy
        if len(digests) == config.instances and all(digest in found for digest in digests):
            return [found[digest] for digest in digests]
    return None
