"""Dictionaries in the files of other tools: one file per format, found by being there; see `base`."""

from importlib import import_module
from pkgutil import iter_modules

from .base import FORMATS, Format, Metadata, Reading, detect, read, register, write, write_set

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["FORMATS", "Format", "Metadata", "Reading", "detect", "read", "register", "write", "write_set"]
