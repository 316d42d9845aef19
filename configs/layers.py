"""Layers of settings -> one: the kind of thing is chosen first, then everything said of it lies on top, in order.

Some settings are of several classes, told apart by a tag: a dictionary by `arch`. The highest layer that names a tag
chooses the class. What lower layers say is laid on it whatever the order in which it was said, and what the class has
not is refused when it is validated. One exception: a preset that names another tag says nothing of the one chosen but
what both have, of the same type, as far as that is not the other's default.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from sae.cache.errors import SaeError
from sae.configs.reading import nested

TAGS = ("arch", "kind", "mode", "source")  # keys that choose one of several settings classes

NOUNS = {"arch": "architecture"}  # what a tag names, where its key is short for it

Path = tuple[str, ...]


class Layer(NamedTuple):
    """One place's settings of a stage. `lenient`: those of a class that is not the one chosen may be left out."""

    where: str
    values: dict[str, Any]
    lenient: bool = False


class Said(NamedTuple):
    """One option of the command line: `option` as it was typed, with its value."""

    option: str
    values: dict[str, Any]


def joined(layers: Sequence[Layer], models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The layers as one, the highest last, for settings of one of the classes `models`."""
    tag = tag_of(models)
    if tag is not None:
        chosen = [layer.values[tag] for layer in layers if tag in layer.values][-1]
        layers = [_of_chosen(layer, tag, chosen, models) for layer in layers]
        models = [one for one in models if one.model_fields[tag].default == chosen] or models
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for layer in layers for key in layer.values):
        said = [layer._replace(values=layer.values[key]) for layer in layers if key in layer.values]
        plain = [i for i, layer in enumerate(said) if not isinstance(layer.values, dict)]
        mappings = said[plain[-1] + 1 :] if plain else said
        inner = [kind for one in models if key in one.model_fields for kind in inner_models(one, key)]
        tag = tag_of(inner)
        if plain and tag is not None and not any(tag in layer.values for layer in mappings):
            found[key] = said[plain[-1]].values  # no class can be chosen: refused when it is validated
        else:
            found[key] = joined(mappings, inner) if mappings else said[-1].values
    return found


def _of_chosen(layer: Layer, tag: str, chosen: Any, models: Sequence[type[BaseModel]]) -> Layer:
    """Return the part of a layer that is of the class chosen."""
    said = layer.values.get(tag, chosen)
    if said == chosen:
        return layer
    values = {key: value for key, value in layer.values.items() if key != tag}
    if layer.lenient:
        known = {one.model_fields[tag].default: one.model_fields for one in models}
        old, new = known.get(said, {}), known.get(chosen, {})
        values = {
            key: value
            for key, value in values.items()
            if key in old and key in new and old[key].annotation == new[key].annotation
            if value != old[key].get_default(call_default_factory=True)
        }
    return layer._replace(values=values)


def command_line(said: Sequence[Said]) -> dict[str, Any]:
    """Put together what the options say. Raises SaeError where two of them say different things of one setting."""
    found: dict[Path, tuple[str, Any]] = {}
    for option, values in said:
        for path, value in leaves(values):
            for other, (other_option, other_value) in found.items():
                if _contradict(path, value, other, other_value):
                    raise SaeError(f"{option}: `{other_option}` says otherwise; give one of the two")
            found.setdefault(path, (option, value))
    whole: dict[str, Any] = {}
    for path, (_, value) in found.items():
        whole = _beside(whole, nested(path, value))
    return whole


def leaves(values: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value that is not a mapping with something in it, and where it is."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def inner_models(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """Settings classes a field may hold."""
    found: list[type[BaseModel]] = []
    waiting: list[Any] = [model.model_fields[key].annotation]
    while waiting:
        kind = waiting.pop(0)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        else:
            waiting.extend(getattr(kind, "__args__", ()))
    return found


def tag_of(models: Sequence[type[BaseModel]]) -> str | None:
    """The key that tells several settings classes apart."""
    tags = (tag for tag in TAGS if all(tag in one.model_fields for one in models))
    return next(tags, None) if len(models) > 1 else None


def _beside(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two mappings that contradict each other nowhere."""
    both = {key: _beside(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return {**one, **other, **both}


def _contradict(path: Path, value: Any, other: Path, other_value: Any) -> bool:
    """Return True if both cannot be so. Options leave values as text; {} says only that there is a mapping."""
    if path == other:
        return _as_text(value) != _as_text(other_value)
    shorter, outer = (path, value) if len(path) < len(other) else (other, other_value)
    return path[: len(shorter)] == other[: len(shorter)] and outer != {}


def _as_text(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)
