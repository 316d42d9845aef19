"""The stores that a run was asked to be trained on, as its `config.json` has them."""

from __future__ import annotations

from typing import Any, NamedTuple

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import figure, inner, name_of_file, shown, whole
from sae.cache.outliers import Limits


class SeenStore(NamedTuple):
    """A store that a run reads: its key and its recipe.

    largest_norm: the norm above which rows were left out, None where none were (or that was not yet recorded).
    """

    key: str
    recipe: Recipe
    largest_norm: float | None = None


class Seen(NamedTuple):
    """The data that a run was to be trained on: the first `rows` rows of aligned stores.

    targets: what is reconstructed, none where that is what is read.
    """

    rows: int
    inputs: tuple[SeenStore, ...]
    targets: tuple[SeenStore, ...] = ()

    @property
    def key(self) -> str:
        """The keys of the stores, for people."""
        return " -> ".join(" + ".join(one.key for one in side) for side in (self.inputs, self.targets) if side)

    @property
    def stores(self) -> tuple[SeenStore, ...]:
        return self.inputs + self.targets

    @property
    def recipes(self) -> tuple[list[Recipe], list[Recipe]]:
        """The recipes of the inputs and of the targets."""
        return [one.recipe for one in self.inputs], [one.recipe for one in self.targets]

    @property
    def limits(self) -> Limits | None:
        """The norm above which rows of each store were left out (None: of any norm); None where all were trained on.

        Also None for a run with `train.outliers` of before these were recorded: it left rows out of its batches alone.
        """
        norms = tuple(one.largest_norm for one in self.stores)
        return None if norms == (None,) * len(norms) else norms

    def as_json(self) -> dict[str, Any]:
        """The part of `config.json` that says it; `activations` is all of it for an autoencoder of one store.

        `beside` are the inputs after the first, in their order.
        """
        source, *beside = self.inputs
        said: dict[str, Any] = {"activations": {"key": source.key, "rows": self.rows} | _of_store(source)}
        for name, stores in (("beside", beside), ("targets", self.targets)):
            if stores:
                said[name] = [{"key": one.key} | _of_store(one) for one in stores]
        return said

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> Seen:
        """Return what a `config.json` of any version says. Raises ValueError where that is nothing that can be."""
        said = inner(config, "activations")
        others = {name: config.get(name, []) for name in ("beside", "targets")}
        for name, stores in others.items():
            if not isinstance(stores, list):
                raise ValueError(f"{name} is {shown(stores)}, not a list")
        inputs, targets = (
            [_seen_store(one) for one in side] for side in ([said, *others["beside"]], others["targets"])
        )
        return cls(whole(said, "rows", 1), tuple(inputs), tuple(targets))


def _of_store(one: SeenStore) -> dict[str, Any]:
    return {"recipe": one.recipe} | ({} if one.largest_norm is None else {"largest_norm": one.largest_norm})


def _seen_store(said: Any) -> SeenStore:
    if not isinstance(said, dict):
        raise ValueError(f"{shown(said)} where a store should be")
    recipe = inner(said, "recipe")
    ActivationStore.expect(recipe)
    return SeenStore(name_of_file(said, "key"), recipe, figure(said, "largest_norm"))
