"""The options that say what rows to train on: a store, points of a model, inputs and targets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.commands.words import several, whole

if TYPE_CHECKING:
    from sae.cache.activations import ActivationStore
    from sae.cache.loader.dataset import Dataset, Stores
    from sae.pipeline.commands.bars import Bars


class Rows(NamedTuple):
    """The rows to train on, as the command line says them; None for what it does not say."""

    activations: str | None = None
    source: str | None = None  # --input
    target: str | None = None
    layers: list[int] | None = None
    sites: list[str] | None = None

    @classmethod
    def of(
        cls, activations: str | None, source: str | None, target: str | None, layer: str | None, site: str | None,
        swept: dict[str, list[str]],
    ) -> "Rows":  # fmt: skip
        """From the options, `swept` being axes of a sweep. Raises SaeError for what does not go together."""
        given = {"--layer": layer, "--site": site}
        for name, values in swept.items():
            if given[f"--{name}"] is not None:
                raise SaeError(f"--sweep {name}={','.join(values)}: --{name} fixes it; give one of them")
        layers = whole("--sweep layer", ",".join(swept["layer"])) if "layer" in swept else whole("--layer", layer)
        sites = several("--sweep site", ",".join(swept["site"])) if "site" in swept else several("--site", site)
        rows = cls(activations, source, target, layers, sites)
        if source is not None and activations is not None:
            raise SaeError(f"--input {source} and --activations {activations}: both say what is read; give one of them")
        if (source or target) is not None and (layers or sites) is not None:
            raise SaeError("--input and --target say the layer and the site themselves; leave out --layer and --site")
        return rows

    @property
    def beyond_activations(self) -> bool:
        """Return True if more was said than one store to read."""
        return any(part is not None for part in self[1:])

    @property
    def several(self) -> bool:
        """Return True if it is more than one dataset."""
        return len(self.layers or [0]) * len(self.sites or [""]) > 1

    def stores(self, root: Path) -> "list[tuple[Stores, Stores]]":
        """Inputs and targets (none: what is read) of every dataset. Raises NotFound for stores that are not there."""
        from sae.cache import points

        if self.layers is None and self.sites is None:
            argument, name = ("activations", self.activations) if self.source is None else ("input", self.source)
            first, *others = [name] if name is None or self.source is None else listed(name, "--input")
            store = named(root, first, argument)
            inputs = (store, *(beside(root, store, other, "input") for other in others if other is not None))
            if self.target is None:
                return [(inputs, ())]
            targets = tuple(beside(root, store, one, "target") for one in listed(self.target, "--target"))
            if [store.path for store in targets] == [store.path for store in inputs]:
                raise SaeError(f"--target {self.target}: is what is read; without --target it is reconstructed")
            return [(inputs, targets)]
        reference = any_of_the_last(root, self.activations)
        if (its := points.point_of(reference)) is None:
            raise SaeError(f"--activations {reference.key}: is of no layer of a model; leave out --layer and --site")
        there = points.beside(root, reference)
        wanted = [(layer, site) for site in self.sites or [its[1]] for layer in self.layers or [its[0]]]
        if missing := [f"{layer}.{site}" for layer, site in wanted if (layer, site) not in there]:
            known = ", ".join(f"{layer}.{site}" for layer, site in there)
            raise NotFound(
                f"--layer and --site: no store of {', '.join(missing)} beside {reference.key}; there is {known}; "
                "`sae harvest --layer N,... --site NAME,...` makes others"
            )
        return [((there[point],), ()) for point in wanted]

    def datasets(self, root: Path, rows: int | None) -> "list[Dataset]":
        """Return the datasets to train on: the first `rows` rows that stores have in common, None for all."""
        from sae.cache.loader.dataset import Dataset

        return [
            Dataset.of(inputs, targets, rows=rows if len(inputs + targets) > 1 else None)
            for inputs, targets in self.stores(root)
        ]


def announce(dataset: "Dataset", bars: "Bars") -> None:
    """Say on stderr what is read and, where that is something else, what is reconstructed."""
    from sae.cache import catalogue

    for name, stores in (("activations", dataset.inputs), ("targets", dataset.targets)):
        for store in stores:
            bars.note(f"{name}: {store.key}{catalogue.unfinished(store)}")


def named(root: Path, name: str | None, argument: str) -> "ActivationStore":
    """The store that an argument names, by its point or its key; without a name, what the last harvest made."""
    from sae.cache import catalogue, points
    from sae.cache.activations import ActivationStore

    if name is not None and argument != "activations" and (point := points.point_in(name)) is not None:
        return points.at_point(root, point, argument)
    return catalogue.find(root, ActivationStore, name, argument)


def listed(text: str, option: str) -> list[str]:
    """The stores that an option lists with commas; a folder that is there may have some in its name."""
    from sae.cache.disk.paths import parse_path
    from sae.cache.store.head import RECIPE

    return [text] if (parse_path(text) / RECIPE).exists() else several(option, text) or []


def beside(root: Path, store: "ActivationStore", name: str, argument: str) -> "ActivationStore":
    """The store that an argument names, by its key or by its point: then one whose rows align with those of a store."""
    from sae.cache import points

    point = points.point_in(name)
    return named(root, name, argument) if point is None else points.aligned(root, store, point, argument)


def any_of_the_last(root: Path, name: str | None) -> "ActivationStore":
    """The store that `--activations` names; without a name any that the last harvest made."""
    from sae.cache import catalogue
    from sae.cache.activations import ActivationStore

    if name is None:
        name = next(iter(catalogue.latest(root).get(ActivationStore.kind, [])), None)
    return catalogue.find(root, ActivationStore, name)


def split_axes(axes: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The axes of a sweep over settings, and those over what is read: values of `layer` and `site`."""
    settings: list[str] = []
    read: dict[str, list[str]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        if key not in ("layer", "site"):
            settings.append(axis)
        elif key in read:
            raise SaeError(f"--sweep {axis}: {key} is swept twice; give all its values at once")
        else:
            read[key] = text.split(",")
    return settings, read
