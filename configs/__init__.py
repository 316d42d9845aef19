"""Presets and the one loader: preset + file + command line -> a validated settings object. Knows no stage.

A preset or a file is YAML with one section a stage (`SECTIONS`), and one for the studies, `study`, with a section each
inside.
Later layers win: the defaults of the settings class, the preset, the file, the command line. The command line is one
layer: its own options, `--set section.key=value` and the axes of a sweep may not contradict each other.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sae.cache.errors import SaeError
from sae.configs import reading
from sae.configs.layers import NOUNS, Layer, Said, command_line, inner_models, joined, leaves, tag_of
from sae.configs.problems import Origins, explained
from sae.configs.reading import SECTIONS, nested, parsed

__all__ = ["SECTIONS", "inner_models", "parsed", "presets", "resolve", "settings_of", "tag_of"]

FOLDER = Path(__file__).parent
NAMES: dict[tuple[str, ...], str] = {("align", "by"): "align"}  # arguments that are not called as their setting

Kind = TypeVar("Kind", bound=BaseModel)


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(
    section: str,
    settings: type[Kind] | Sequence[type[Kind]],
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    axes: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
) -> Kind:
    """The settings of one stage. Raises SaeError naming the key, the value and what to try.

    settings: their class, or several told apart by a tag, of which the first is meant where nothing is said.
    overrides: what `--set` says. axes: a combination of `--sweep`, as {"sae.k": 3}. flags: the command's own options;
    None in it means not given. given: settings that a program gives, on top of all else.
    """
    kinds = [settings] if isinstance(settings, type) else list(settings)
    tag = tag_of(kinds)
    usual = {} if tag is None else {tag: kinds[0].model_fields[tag].default}
    below = [
        Layer(f"preset {preset}", usual | (_preset(preset).get(section) or {}), lenient=True) if preset else None,
        Layer(str(file), reading.file(file).get(section) or {}) if file else None,
    ]
    overridden = list(_set(section, overrides))
    options = [*_swept(axes or {}), *_options(flags or {})]
    layers = [
        *(Layer("", _defaults(kind, tag), lenient=True) for kind in reversed(kinds)),
        *(layer for layer in below if layer),
        Layer("", command_line([*overridden, *options])),
        Layer("", given or {}),
    ]
    origins = Origins(section, layers, {path: one.option for one in options for path, _ in leaves(one.values)})
    kind = _chosen(kinds, tag, layers, origins)
    for names in getattr(kind, "alternatives", ()):
        layers = list(_of_one(layers, names, origins))
    try:
        return kind.model_validate(joined(layers, kinds))
    except ValidationError as error:
        raise SaeError(explained(kind, error, origins)) from error


def _chosen(kinds: Sequence[type[Kind]], tag: str | None, layers: Sequence[Layer], origins: Origins) -> type[Kind]:
    """The class of settings that the highest layer with a tag says."""
    if tag is None:
        return kinds[0]
    said = str([layer.values[tag] for layer in layers if tag in layer.values][-1])
    known = {str(kind.model_fields[tag].default): kind for kind in kinds}
    if said not in known:
        where = origins.option([tag]) or f"{origins.name([tag])} = {said}"
        raise SaeError(f"{where}: unknown {NOUNS.get(tag, tag)}{reading.nearest(said, list(known))}")
    return known[said]


def _of_one(layers: Sequence[Layer], names: Collection[str], origins: Origins) -> Iterator[Layer]:
    """The layers, without what stands of alternative settings below the highest layer that says one of them.

    Raises SaeError where two of them are options of one command.
    """
    saying = [i for i, layer in enumerate(layers) if any(layer.values.get(name) is not None for name in names)]
    options = [option for name in names if (option := origins.option([name]))]
    if len(options) > 1:
        raise SaeError(f"{options[0]}: `{options[1]}` says otherwise; give one of the two")
    for i, layer in enumerate(layers):
        counts = not saying or i >= saying[-1]
        yield layer if counts else layer._replace(values={k: v for k, v in layer.values.items() if k not in names})


def settings_of(item: str, section: str) -> list[str]:
    """The settings of a section that one `section.key=value` says something of: ["sae.k"]."""
    return [".".join(path) for path, _ in leaves(reading.override(item).get(section) or {})]


def _preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise SaeError(f"preset = {name}: no such preset; there are {', '.join(presets())}")
    return reading.preset(FOLDER / f"{name}.yaml")


def _defaults(settings: type[BaseModel], tag: str | None) -> dict[str, Any]:
    """The settings inside settings that hold where nothing is said, so that one key of them can be changed; the tag."""
    fields = {name: field.get_default(call_default_factory=True) for name, field in settings.model_fields.items()}
    inside = {name: value.model_dump() for name, value in fields.items() if isinstance(value, BaseModel)}
    return inside if tag is None else {tag: fields[tag], **inside}


def _set(section: str, overrides: Sequence[str]) -> Iterator[Said]:
    for item in overrides:
        values = reading.override(item).get(section)
        if values:
            yield Said(f"overrides = {item}", values)


def _swept(axes: dict[str, Any]) -> Iterator[Said]:
    for key, value in axes.items():
        yield Said(f"sweep = {key}={_shown(value)}", nested(key.split("."), value))


def _options(flags: dict[str, Any]) -> Iterator[Said]:
    """The command's own options, each with what it is called."""
    for path, value in leaves(flags):
        if value is not None:
            yield Said(f"{NAMES.get(path, path[-1])} = {_shown(value)}", nested(path, value))


def _shown(value: Any) -> str:
    """A value as the command line has it."""
    return ",".join(map(_shown, value)) if isinstance(value, list | tuple) else str(value).removesuffix(".0")
