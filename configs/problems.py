"""Problems of a validation, each in one line: where the user said it, what, what is wrong with it and what to try."""

from collections.abc import Sequence

from pydantic import BaseModel, ValidationError

from sae.configs.layers import NOUNS, TAGS, Layer, Path, inner_models, leaves, tag_of
from sae.configs.reading import nearest

LISTS = dict.fromkeys(("tuple_type", "list_type"), "input should be a list, as [1, 2]")
"""What is asked for, by the type of the error, where that says it in Python's words."""


class Origins:
    """The places where every setting was said: one of the `options` as they were typed, or one of the layers."""

    def __init__(self, section: str, layers: Sequence[Layer], options: dict[Path, str]) -> None:
        self.section, self.layers, self.options = section, layers, options

    def option(self, keys: Sequence[str]) -> str | None:
        """The option that said it, with its value: d_sae = 64."""
        return self.options.get(tuple(keys))

    def name(self, keys: Sequence[str]) -> str:
        """The setting, after the preset or file that said it."""
        said = [
            layer for layer in self.layers if any(path[: len(keys)] == (*keys,) for path, _ in leaves(layer.values))
        ]
        where = f"{said[-1].where}: " if said and said[-1].where else ""
        return where + ".".join([self.section, *keys])


def explained(settings: type[BaseModel], error: ValidationError, origins: Origins) -> str:
    """The first problem in one line (for a value that may be of several types, with what each of them asks)."""
    first, *others = error.errors()
    keys, known = _followed(settings, first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        option = origins.option([*keys, key])
        elsewhere = _elsewhere(settings, first["loc"])
        if option:
            return f"{option}: {elsewhere or f'these settings have no {key}{nearest(key, known)}'}"
        return f"{origins.name([*keys, key])}: {elsewhere or f'unknown key{nearest(key, known)}'}"
    if first["type"] == "union_tag_invalid":
        tag, there = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "").split(", ")
        keys.append(first["ctx"]["discriminator"].strip("'"))
        option = origins.option(keys) or f"{origins.name(keys)} = {tag}"
        return f"{option}: unknown {NOUNS.get(keys[-1], keys[-1])}{nearest(tag, there)}"
    same = [first, *(other for other in others if _followed(settings, other["loc"])[0] == keys)]
    messages = [LISTS.get(problem["type"], problem["msg"]).removeprefix("Value error, ") for problem in same]
    message = "; or ".join(message[:1].lower() + message[1:] for message in messages)
    if isinstance(first["input"], dict):
        return f"{origins.name(keys)}: {message}"
    # the second is for an item of a list
    said = origins.option(keys) or origins.option(keys[:-1]) or f"{origins.name(keys)} = {first['input']!r}"
    return f"{said}: {message}"


def _elsewhere(settings: type[BaseModel], place: Sequence[str | int]) -> str | None:
    """Return which other classes have a key that the one a tag chose has not."""
    *way, key = place
    models: list[type[BaseModel]] = [settings]
    for part in way[:-1]:
        models = [inner for one in models if part in one.model_fields for inner in inner_models(one, str(part))]
    tag = tag_of(models)
    if tag is None:
        return None
    having = [str(one.model_fields[tag].default) for one in models if key in one.model_fields]
    return f"{tag} {way[-1]} has no {key}; it is of {', '.join(having)}" if having else None


def _followed(settings: type[BaseModel], place: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """The part of pydantic's `place` a user wrote (no tags, no names of types), and the keys allowed where it ends."""
    models: list[type[BaseModel]] = [settings]
    keys: list[str] = []
    for part in place:
        tagged = [m for m in models for tag in TAGS if tag in m.model_fields and part == m.model_fields[tag].default]
        named = any(part in model.model_fields for model in models)
        if tagged and (len(models) > 1 or not named):  # a tag may be called as one of the fields it leads to
            models = tagged
        elif named:
            keys.append(str(part))
            models = [
                inner for model in models if part in model.model_fields for inner in inner_models(model, str(part))
            ]
        elif isinstance(part, int):
            keys.append(str(part))
    return keys, sorted({key for model in models for key in model.model_fields})
