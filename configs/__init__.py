"""Presets and the one loader: preset + file + `--set` + flags -> a validated settings object. Knows no stage.

A preset or a file is YAML with one section a stage: `tokenize`, `harvest`, `synthesize`, `train`, `eval`. Later layers
win: the defaults of the settings class, the preset, the file, `--set section.key=value`, the command's own flags.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cache.errors import SaeError

SECTIONS = ("tokenize", "harvest", "synthesize", "train", "eval")
TAGS = ("arch", "kind", "mode")  # keys that choose one of several settings classes
FOLDER = Path(__file__).parent

Settings = TypeVar("Settings", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 and 1e6 are numbers, as everywhere else; PyYAML would take them for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


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
    values = _defaults(settings)
    for layer in (
        _preset(preset) if preset else {},
        _file(file) if file else {},
        _overrides(overrides),
        {section: _given(flags or {})},
    ):
        values = merge(values, layer.get(section) or {}, [settings])
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise SaeError(_explained(section, settings, error, _options(flags or {}))) from error


def merge(base: dict[str, Any], over: dict[str, Any], settings: Sequence[type[BaseModel]] = ()) -> dict[str, Any]:
    """`over` on top of `base`, key by key.

    A changed tag (`arch`) discards the fields that belonged to the old one. Of the settings classes that may hold the
    two, where they are given, what both have is kept, if it says otherwise than the old one's default.
    """
    changed = next((tag for tag in TAGS if tag in over and tag in base and over[tag] != base[tag]), None)
    if changed is not None:
        return {**_in_common(base, over, changed, settings), **over}
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        inner = [kind for one in settings if key in one.model_fields for kind in _inner(one, key)]
        merged[key] = merge(merged[key], value, inner) if both else value
    return merged


def _in_common(
    base: dict[str, Any], over: dict[str, Any], tag: str, settings: Sequence[type[BaseModel]]
) -> dict[str, Any]:
    """What `base` says otherwise than the defaults of its tag's settings, of the fields that those of `over` have."""
    known = {one.model_fields[tag].default: one.model_fields for one in settings if tag in one.model_fields}
    old, new = known.get(base[tag], {}), known.get(over[tag], {})
    return {
        key: value
        for key, value in base.items()
        if key != tag and key in old and key in new and value != old[key].get_default(call_default_factory=True)
    }


def _defaults(settings: type[BaseModel]) -> dict[str, Any]:
    """The settings inside settings that hold where nothing is said, so that one key of them can be changed."""
    fields = {name: field.get_default(call_default_factory=True) for name, field in settings.model_fields.items()}
    return {name: value.model_dump() for name, value in fields.items() if isinstance(value, BaseModel)}


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    given = {key: _given(value) if isinstance(value, dict) else value for key, value in flags.items()}
    return {key: value for key, value in given.items() if value is not None and value != {}}


def _options(flags: dict[str, Any]) -> dict[str, str]:
    """What the command line calls the settings that its own options gave: {"sae.d_sae": "--d-sae", ...}."""
    found: dict[str, str] = {}
    for key, value in _given(flags).items():
        inner = {f"{key}.{name}": option for name, option in _options(value).items()} if isinstance(value, dict) else {}
        found |= inner or {key: "--" + key.replace("_", "-")}
    return found


def _preset(name: str) -> dict[str, Any]:
    if name not in presets():
        raise SaeError(f"--preset {name}: no such preset; there are {', '.join(presets())}")
    return _checked(yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), _Loader), f"preset {name}")


def _file(path: Path) -> dict[str, Any]:
    try:
        return _checked(yaml.load(path.read_text(encoding="utf-8"), _Loader), str(path))
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
            value: Any = yaml.load(text, _Loader)
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


def _explained(section: str, settings: type[BaseModel], error: ValidationError, options: dict[str, str]) -> str:
    """The first problem in one line (for a value that may be of several types, with what each of them asks)."""
    first, *others = error.errors()
    keys, known = _followed(settings, first["loc"])
    name = ".".join([section, *keys])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        if option := options.get(".".join([*keys, key])):
            return f"{option} {first['input']}: these settings have no {key}{_nearest(key, known)}"
        return f"{name}.{key}: unknown key{_nearest(key, known)}"
    if first["type"] == "union_tag_invalid":
        tag, there = first["ctx"]["tag"], first["ctx"]["expected_tags"].replace("'", "").split(", ")
        key = ".".join([*keys, first["ctx"]["discriminator"].strip("'")])
        option = options.get(key) or f"{section}.{key} ="
        return f"{option} {tag}: there is no such one{_nearest(tag, there)}"
    same = [first, *(other for other in others if _followed(settings, other["loc"])[0] == keys)]
    messages = [problem["msg"].removeprefix("Value error, ") for problem in same]
    message = "; or ".join(message[:1].lower() + message[1:] for message in messages)
    if isinstance(first["input"], dict):
        return f"{name}: {message}"
    option = options.get(".".join(keys)) or options.get(".".join(keys[:-1]))  # the latter for an item of a list
    return f"{option} {first['input']}: {message}" if option else f"{name} = {first['input']!r}: {message}"


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
            models = [inner for model in models if part in model.model_fields for inner in _inner(model, str(part))]
        elif isinstance(part, int):
            keys.append(str(part))
    return keys, sorted({key for model in models for key in model.model_fields})


def _inner(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """Settings classes a field may hold."""
    field = model.model_fields[key]
    found: list[type[BaseModel]] = []
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        else:
            waiting.extend(getattr(kind, "__args__", ()))
    return found
