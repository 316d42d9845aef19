"""Presets and the one loader: preset + file + command line -> a validated settings object. Knows no stage.

A preset or a file is YAML with one section a stage: `tokenize`, `harvest`, `synthesize`, `train`, `eval`, `report`.
Later layers win: the defaults of the settings class, the preset, the file, the command line. The command line is one
layer: its own options, `--set section.key=value` and the axes of a sweep may not contradict each other.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sae.cache.errors import SaeError
from sae.configs import reading
from sae.configs.layers import Layer, Said, command_line, inner_models, joined, leaves, tag_of
from sae.configs.problems import Origins, explained
from sae.configs.reading import SECTIONS, nested, parsed

__all__ = ["SECTIONS", "inner_models", "parsed", "presets", "resolve", "settings_of", "tag_of"]

FOLDER = Path(__file__).parent
NAMES: dict[tuple[str, ...], str] = {("align", "by"): "align"}  # options that are not called as their setting

Kind = TypeVar("Kind", bound=BaseModel)


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(
    section: str,
    settings: type[Kind],
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    axes: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
    freed: Sequence[str] = (),
) -> Kind:
    """The settings of one stage. Raises SaeError naming the key, the value and what to try.

    overrides: what `--set` says. axes: a combination of `--sweep`, as {"sae.k": 3}. flags: the command's own options;
    None in it means not given. given: settings that a program gives, on top of all else. freed: keys of which it does
    not count what a preset or a file says, because an option took the place of them.
    """
    below = [
        Layer(f"preset {preset}", _preset(preset).get(section) or {}, lenient=True) if preset else None,
        Layer(str(file), reading.file(file).get(section) or {}) if file else None,
    ]
    overridden = list(_set(section, overrides))
    options = [*_swept(axes or {}), *_options(flags or {})]
    layers = [
        Layer("", _defaults(settings), lenient=True),
        *(layer._replace(values={k: v for k, v in layer.values.items() if k not in freed}) for layer in below if layer),
        Layer("", command_line([*overridden, *options])),
        Layer("", given or {}),
    ]
    try:
        return settings.model_validate(joined(layers, [settings]))
    except ValidationError as error:
        typed = {path: one.option for one in options for path, _ in leaves(one.values)}
        raise SaeError(explained(settings, error, Origins(section, layers, typed))) from error


def settings_of(item: str, section: str) -> list[str]:
    """The settings of a section that one `section.key=value` says something of: ["sae.k"]."""
    return [".".join(path) for path, _ in leaves(reading.override(item).get(section) or {})]


def _preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise SaeError(f"--preset {name}: no such preset; there are {', '.join(presets())}")
    return reading.preset(FOLDER / f"{name}.yaml")


def _defaults(settings: type[BaseModel]) -> dict[str, Any]:
    """The settings inside settings that hold where nothing is said, so that one key of them can be changed."""
    fields = {name: field.get_default(call_default_factory=True) for name, field in settings.model_fields.items()}
    return {name: value.model_dump() for name, value in fields.items() if isinstance(value, BaseModel)}


def _set(section: str, overrides: Sequence[str]) -> Iterator[Said]:
    for item in overrides:
        values = reading.override(item).get(section)
        if values:
            yield Said(f"--set {item}", values)


def _swept(axes: dict[str, Any]) -> Iterator[Said]:
    for key, value in axes.items():
        yield Said(f"--sweep {key}={_shown(value)}", nested(key.split("."), value))


def _options(flags: dict[str, Any]) -> Iterator[Said]:
    """What the command's own options say, by what they are called."""
    for path, value in leaves(flags):
        if value is not None:
            name = NAMES.get(path, path[-1]).replace("_", "-")
            yield Said(f"--{name} {_shown(value)}", nested(path, value))


def _shown(value: Any) -> str:
    """A value as the command line has it."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
