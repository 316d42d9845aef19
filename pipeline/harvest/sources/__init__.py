"""Sources of rows: one file per source, found by being there; see `base`."""

from sae.pipeline.declared.importing import import_files

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

import_files(__name__)

__all__ = [
    "SOURCES", "RowSource", "Rows", "SourceConfig", "Stream", "Supply", "WindowTask", "register",
    "settings_of_sources", "source_of",
]  # fmt: skip
