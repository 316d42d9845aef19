"""Sources of rows: one file per source, found by being there; see `base`."""

from importlib import import_module
from pkgutil import iter_modules

from .base import (
    SOURCES,
    Rows,
    RowSource,
    SourceConfig,
    Stream,
    Supply,
    WindowTask,
    register,
    settings_of_sources,
    source_of,
)

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "SOURCES", "RowSource", "Rows", "SourceConfig", "Stream", "Supply", "WindowTask", "register",
    "settings_of_sources", "source_of",
]  # fmt: skip
