"""Declarations of classes, read from the text of their files: importing most of them takes the seconds that torch
takes.

`--help`, `sae list` and the tables of figures show what there is without importing any of it. Only literals are read:
the docstring, attributes, and fields as `name: kind = Field(default, description="...")`.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A field of a settings class: the text of its type, its default, what it means."""

    annotation: str
    default: Any
    description: str

    @property
    def kind(self) -> str:
        """Bool, int, float or str, or a list of int, float or str. Names of other types are str."""
        plain = re.sub(r"(?:typing\.)?Annotated\[", "", self.annotation).removesuffix(" | None")
        listed = plain.startswith("tuple[")
        item = re.split(r"\W", plain.removeprefix("tuple["))[0].lower()
        known = next((kind for kind in ("bool", "int", "float") if item.endswith(kind)), "str")
        return f"list of {known}" if listed else known


class Call(NamedTuple):
    """A call among literals, as `Figure("fvu", "FVU", better="low")`."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Declared(NamedTuple):
    """A class: its name, its docstring, its attributes, and its fields that have a plain default and a description."""

    name: str
    help: str
    values: dict[str, Any]
    settings: dict[str, Setting]
    registered: bool = True

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return self.help.strip().split("\n\n")[0].split(". ")[0].replace("\n", " ").rstrip(".")


def declared(package: str, name: str) -> Declared:
    """Read the class of a name from the one file of a package that has it."""
    return next(one for path in _files(package, f"\nclass {name}(") for one in _classes(path) if one.name == name)


def registered(registry: str, tag: str = "name") -> dict[str, Declared]:
    """Read the classes of a registry, as `sae.pipeline.saes.base.ARCHITECTURES`, each by the attribute that names it.

    They are those under `@register` in the files of its package, and whatever has been registered elsewhere by now. The
    attribute may be that of another class in the same file: an architecture's is in its settings.
    """
    module, _, attribute = registry.rpartition(".")
    package = module.rpartition(".")[0]
    found = {}
    for path in _files(package, "\n@register\n"):
        classes = _classes(path)
        for one in classes:
            if one.registered:
                found[next(other.values[tag] for other in (one, *classes) if tag in other.values)] = one
    there: dict[str, Any] = getattr(sys.modules.get(module), attribute, {})
    kinds = {name: one if isinstance(one, type) else type(one) for name, one in there.items()}
    found |= {name: imported(kind) for name, kind in kinds.items() if kind.__module__.rpartition(".")[0] != package}
    return dict(sorted(found.items()))


def imported(kind: type[Any]) -> Declared:
    """Return what a class declares that is imported already."""
    values = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    settings = {
        name: Setting(_text_of(field.annotation), field.default, field.description)
        for name, field in getattr(kind, "model_fields", {}).items()
    }
    return Declared(kind.__name__, kind.__doc__ or "", values, settings)


def _text_of(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _files(package: str, text: str) -> Iterator[Path]:
    """The files of a package, and of those below it, in which a text stands."""
    return (path for path, content in _texts(package).items() if text in content)


@cache
def _texts(package: str) -> dict[Path, str]:
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    return {path: path.read_text("utf-8") for path in Path(spec.submodule_search_locations[0]).rglob("*.py")}


@cache
def _classes(path: Path) -> list[Declared]:
    """The classes of a file."""
    return [_declared(node) for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]


def _declared(node: ast.ClassDef) -> Declared:
    values: dict[str, Any] = {}
    settings: dict[str, Setting] = {}
    for one in node.body:
        match one:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                values |= _literal(name, value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant() as value):
                values |= _literal(name, value)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.Call(args=[value], keywords=words)):
                values |= _literal(name, value)
                said = {word.arg: word.value for word in words}
                match said.get("description"):
                    case ast.Constant(value=str(description)) if name in values:
                        settings[name] = Setting(ast.unparse(kind), values[name], description)
    marked = "register" in map(ast.unparse, node.decorator_list)
    return Declared(node.name, ast.get_docstring(node) or "", values, settings, marked)


def _literal(name: str, value: ast.expr) -> dict[str, Any]:
    """Return the value of an attribute by its name, where that is a literal or a tuple of calls with literals."""
    try:
        if isinstance(value, ast.Tuple) and any(isinstance(one, ast.Call) for one in value.elts):
            return {name: tuple(_call(one) for one in value.elts if isinstance(one, ast.Call))}
        return {name: ast.literal_eval(value)}
    except ValueError:
        return {}


def _call(node: ast.Call) -> Call:
    named = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    return Call(tuple(map(ast.literal_eval, node.args)), named)
