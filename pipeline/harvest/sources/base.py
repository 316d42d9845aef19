"""Sources of rows: whatever enters the cache.

A source has one or several streams, whose rows align, and each stream of each split becomes a store. `harvest` asks how
many rows there are, cuts them into windows and has each window computed: here, in worker processes or, where a store is
damaged, once more. A new source is one new file in this package with a class decorated by `register`; nothing else has
to know of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import Field
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.store.manifest import Window
from sae.configs.base import Amount, Settings
from sae.pipeline.declared.importing import enter
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress

TokenPosition = tuple[int, ...]  # where a window begins; what the numbers mean is the source's own


class Stream(NamedTuple):
    """Rows of one kind: `name` is unique within the source, `d` their width, `truth` [G, d] the features they were made
    of, where those are known, and `toy` the weight [G, d] and the bias [G] of the toy model that made them."""

    name: str
    d: int
    truth: Tensor | None = None
    toy: tuple[Tensor, Tensor] | None = None


class Rows(NamedTuple):
    """The next rows of a window: `position` int64 [n] says which they are in the source, `values(names)` computes them.

    It gives (stream, [n, d]) for each of the streams asked for, and is not called where nobody lacks these rows.
    `coefficients(name)` float32 [n, G] are those that a toy model made a stream's rows of.
    """

    position: np.ndarray
    values: Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]
    coefficients: Callable[[str], Tensor] | None = None


class Supply(NamedTuple):
    """The supply of a source for one split: so many rows, of which so many were asked for.

    `place(i)` is where window i begins, which is also where window i - 1 ends. `ended`: there will never be more rows.
    `tokens`: those behind all of the rows, where computing rows is a forward pass over tokens.
    """

    rows: int
    asked: int
    place: Callable[[int], TokenPosition]
    ended: bool
    tokens: int = 0


class WindowTask(NamedTuple):
    """One window of a split, from one place to another, and the streams whose stores lack it."""

    split: str
    window: int
    rows: int
    start: TokenPosition
    end: TokenPosition
    streams: tuple[str, ...]


class SourceConfig(Settings):
    """Settings that every source has; a class of them has a `source: Literal[...]` with the name of its own."""

    source: str
    codec: str = Field("int8", description="int8, bfloat16, float16 or float32; with settings as int8:step=0.11")


class RowSource(ABC):
    """A source of rows. Its class is what a registry lists; its docstring's first sentence is the help."""

    name: ClassVar[str]  # also what `recipe["source"]["source"]` says, by which a store finds its source again
    settings: ClassVar[type[SourceConfig]]

    config: SourceConfig
    streams: tuple[Stream, ...]
    splits: tuple[str, ...]  # train, and validation where there are rows for it
    remembered: int | None = None  # how many streams, of the first, are what the last harvest made; None: all of them
    several: bool = False  # whether there may be other streams, so that a store says which it is: `recipe["stream"]`
    points: tuple[tuple[int, str], ...] = ()  # layer and site of each stream, where they are of a language model

    @classmethod
    @abstractmethod
    def of_settings(cls, config: Any, origins: Origins, progress: Progress) -> Self:
        """The source that settings (of the class `settings`) describe."""

    @classmethod
    @abstractmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> Self:
        """The source that a store was made from, with its stream and split alone.

        Raises SaeError where it is not there any more, or is another one now.
        """

    @abstractmethod
    def slug(self, stream: Stream, split: str) -> str:
        """A short readable name for the folder of a store."""

    @abstractmethod
    def identity(self) -> Recipe:
        """Return what decides the rows of all streams and splits, and their order; not where they lie."""

    @abstractmethod
    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        """Return what there is of a split, and how much of it `wanted` is (by default: what the settings ask for)."""

    @abstractmethod
    def window(self, task: WindowTask) -> Iterator[Rows]:
        """The rows of a window in the source's order, a function of the recipe and the task alone."""

    @abstractmethod
    def elsewhere(self) -> Callable[[], "RowSource"]:
        """Return a maker of the same source in another process; it is pickled."""

    def notes(self, task: WindowTask) -> dict[str, Any]:
        """Return the manifest's notes on a window besides its files: `next`, and what its bits depend on, `made`."""
        return {}

    def noted(self, line: Window | None, folder: Path) -> TokenPosition | None:
        """Return where the window after a committed one of the store in a folder begins, by its notes.

        `line` None: the first window. None where this source notes nothing.
        """
        return None

    def as_made(self, windows: Sequence[Window], window: Window) -> "RowSource":
        """The source as it was when a window was made, where `windows` are those the store has."""
        return self

    def hints(self) -> dict[str, str]:
        """Return where this machine has what the recipe names."""
        return {}

    def about(self) -> dict[str, Any]:
        """Return what there is to know of the source that no row says, as JSON."""
        return {}

    def ready(self, split: str, progress: Progress) -> AbstractContextManager[None]:
        """Holds what the source reads for a split; raises SaeError where that cannot be harvested."""
        return nullcontext()

    def tokens_per_second(self, split: str) -> float | None:
        """Speed of the forward pass, measured; None where there is none."""
        return None

    def remedy(self, split: str, supply: Supply, rows: int) -> str:
        """Return what to do to have so many rows, of a source that may have more of them later."""
        return "ask again when there are more"

    def recipe(self, stream: Stream, split: str) -> Recipe:
        """Everything that decides the bytes of a store. Rows align where `source` and `split` are the same."""
        return {
            "source": {"source": self.name, **self.identity()},
            "split": split,
            **({"stream": stream.name} if self.several else {}),
            "d": stream.d,
            **({} if stream.truth is None else {"truth": len(stream.truth)}),
            **({} if stream.toy is None else {"toy": True}),
            "codec": codec_recipe(codec(self.config.codec)),
        }

    def full_slug(self, stream: Stream, split: str) -> str:
        """The readable name of a store, with its codec."""
        return f"{self.slug(stream, split)}-{codec(self.config.codec).name}"


SOURCES: dict[str, type[RowSource]] = {}
Source = TypeVar("Source", bound=type[RowSource])


def register(kind: Source) -> Source:
    """Add a source to those that can be harvested. Its name must be nobody else's."""
    enter(SOURCES, "source", kind.name, kind)
    return kind


def settings_of_sources() -> list[type[SourceConfig]]:
    """Settings of every source, told apart by `source`; a language model's first: usually that is meant."""
    return [SOURCES[name].settings for name in sorted(SOURCES, key=lambda name: (name != "language_model", name))]


def source_of(store: ActivationStore, origins: Origins) -> RowSource:
    """The source that a store was made from. Raises SaeError where this version has none of that name."""
    name = "language_model" if "tokens" in store.recipe else store.recipe["source"].get("source")
    if not isinstance(name, str) or name not in SOURCES:
        raise SaeError(f"{store.path}: source {name}: unknown to this version; use the one that wrote the store")
    return SOURCES[name].of_store(store, origins)
