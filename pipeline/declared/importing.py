"""The files of a package that are found by being there: to import them is to register what is in them."""

from importlib import import_module
from pkgutil import iter_modules


def import_files(package: str) -> None:
    """Import every module of a package, each once."""
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
