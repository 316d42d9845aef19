"""Presets, files and `--set` as plain data. YAML of today: 1.2's few words, not those of 1.1.

To YAML 1.1 `no` is false, `010` is eight, `1:30` is ninety and `3e-4` a text; here they are what they look like.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sae.cache.errors import SaeError

SECTIONS = (
    "tokenize", "harvest", "synthesize", "train", "decompose", "eval", "report", "analyze", "probe", "match", "steer",
    "explain", "study",
)  # fmt: skip

CRC = "crc32c"  # in every config.json

WORDS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way


for _name, (_pattern, _first) in WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    """A mapping in which no key stands twice; PyYAML would take the last."""
    seen = set()
    for key, _ in node.value:
        if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parsed(text: str) -> Any:
    """The data that YAML text stands for. Raises ValueError, in a few words, where it is none."""
    try:
        content = yaml.load(text, _Loader)
        json.dumps(content, default=str)  # what refers to itself has no end
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (ValueError, RecursionError, TypeError) as error:
        raise ValueError(str(error).partition(";")[0]) from error
    return content


def preset(path: Path) -> dict[str, Any]:
    """The sections of a preset."""
    return _sections(parsed(path.read_text(encoding="utf-8")), f"preset {path.stem}")


def file(path: Path) -> dict[str, Any]:
    """The sections of a user's file, or of the config.json of a run, which is repeated so.

    Raises SaeError naming what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SaeError(f"file = {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SaeError(f"file = {path}: is not UTF-8 text") from error
    try:
        content = parsed(text)
    except ValueError as error:
        raise SaeError(f"file = {path}: is not YAML ({error})") from error
    if isinstance(content, dict) and content.keys() >= {"train", "activations"}:
        content = {"train": content["train"]}
    elif isinstance(content, dict) and content.keys() >= {"decompose", CRC}:
        content = {"decompose": content["decompose"]}
    return _sections(content, str(path))


def override(item: str) -> dict[str, Any]:
    """The sections of one `section.key=value`. Raises SaeError where it is not written so."""
    path, equals, text = item.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise SaeError(f"overrides = {item}: write it as section.key=value, for example train.lr=3e-4")
    if not text.strip():
        raise SaeError(f"overrides = {item}: has no value; write null where none is meant")
    try:
        value = parsed(text)
    except ValueError as error:
        raise SaeError(f"overrides = {item}: the value is not YAML") from error
    return _sections(nested(keys, value), f"overrides = {item}")


def nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A value under its keys: {"sae": {"k": 3}} for ["sae", "k"] and 3."""
    for key in reversed(keys):
        value = {key: value}
    found: dict[str, Any] = value
    return found


def nearest(name: str, known: Sequence[str]) -> str:
    """Return what to try in the place of a name that is none."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _sections(content: Any, where: str) -> dict[str, Any]:
    """A mapping of known sections to mappings."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SaeError(f"{where}: expected sections ({', '.join(SECTIONS)}) with settings inside")
    for name, body in content.items():
        if name not in SECTIONS:
            raise SaeError(f"{where}: unknown section {name!r}{nearest(str(name), SECTIONS)}")
        if body is not None and not isinstance(body, dict):
            raise SaeError(f"{where}: section {name} should hold settings, not {body!r}")
    return content
