"""Registries: what the files of a package hold, found by being there. To import a file is to register what is in it."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def import_files(package: str) -> None:
    """Import every module of a package, each once."""
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")


def enter(registry: dict[str, Any], what: str, name: str, one: object) -> None:
    """Put one more of what a registry holds into it, under its name. ValueError where another has it."""
    if name in registry:
        raise ValueError(f"{what} {name}: there is one of that name")
    registry[name] = one


def in_files(package: str, registry: dict[str, Kind]) -> dict[str, Kind]:
    """A registry by name, with what is in the files of a package."""
    import_files(package)
    return dict(sorted(registry.items()))
