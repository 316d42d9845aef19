"""Presets and the one loader: preset + file + `--set` + flags -> a validated settings object. Knows no stage.

A preset or a file is YAML with one section a stage: `tokenize`, `harvest`, `train`, `eval`. Later layers win: the
defaults of the settings class, the preset, the file, `--set section.key=value`, the command's own flags.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cache.errors import SaeError

SECTIONS = ("tokenize", "harvest", "train", "eval")
TAGS = ("arch", "kind")  # keys that choose one of several settings classes
FOLDER = Path(__file__).parent

Settings = TypeVar("Settings", bound=BaseModel)


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def resolve(
    section: str,
    settings: type[Settings],
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: dict[str, Any] | None = None,
) -> Settings:
    """The settings of one stage. Raises SaeError naming the key, the value and what to try.

    `flags` holds the command's own options; None in it means not given.
    """
    values: dict[str, Any] = {}
    for layer in (
        _preset(preset) if preset else {},
        _file(file) if file else {},
        _overrides(overrides),
        {section: _given(flags or {})},
    ):
        values = merge(values, layer.get(section) or {})
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise SaeError(_explained(section, settings, error)) from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, key by key. A changed tag (`arch`) discards the fields that belonged to the old one."""
    if any(tag in over and tag in base and over[tag] != base[tag] for tag in TAGS):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    given = {key: _given(value) if isinstance(value, dict) else value for key, value in flags.items()}
    return {key: value for key, value in given.items() if value is not None and value != {}}


def _preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise SaeError(f"--preset {name}: no such preset; there are {', '.join(presets())}")
    return _checked(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()), f"preset {name}")


def _file(path: Path) -> dict[str, Any]:
    try:
        return _checked(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise SaeError(f"--config {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SaeError(f"--config {path}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise SaeError(f"--config {path}: is not YAML ({' '.join(str(error).split())})") from error


def _overrides(items: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in items:
        path, equals, text = item.partition("=")
        keys = path.strip().split(".")
        if not equals or len(keys) < 2 or not all(keys):
            raise SaeError(f"--set {item}: write it as section.key=value, for example train.lr=3e-4")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SaeError(f"--set {item}: the value is not YAML") from error
        for key in reversed(keys):
            value = {key: value}
        values = merge(values, _checked(value, f"--set {item}"))
    return values


def _checked(content: Any, where: str) -> dict[str, Any]:
    """A mapping of known sections to mappings."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SaeError(f"{where}: expected sections ({', '.join(SECTIONS)}) with settings inside")
    for name, body in content.items():
        if name not in SECTIONS:
            raise SaeError(f"{where}: unknown section {name!r}{_nearest(str(name), SECTIONS)}")
        if body is not None and not isinstance(body, dict):
            raise SaeError(f"{where}: section {name} should hold settings, not {body!r}")
    return content


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _explained(section: str, settings: type[BaseModel], error: ValidationError) -> str:
    """The first problem in one line."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    name = ".".join([section, *place])
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key{_nearest(place[-1], _keys(settings, place))}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys(settings: type[BaseModel], place: list[str]) -> list[str]:
    """The keys allowed where an unknown one was found (searching every settings class the path may lead through)."""
    models: list[Any] = [settings]
    for part in place[:-1]:
        models = [inner for model in models for inner in _inner(model, part)] or models
    return sorted({key for model in models for key in model.model_fields})


def _inner(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """Settings classes a field may hold; a union's tag value selects among the classes reached so far."""
    field = model.model_fields.get(key)
    if field is None:
        return (
            [model] if any(key == model.model_fields[tag].default for tag in TAGS if tag in model.model_fields) else []
        )
    found: list[type[BaseModel]] = []
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        else:
            waiting.extend(getattr(kind, "__args__", ()))
    return found
