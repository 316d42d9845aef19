"""Dictionaries in the files of other tools: one file per format, found by being there; see `base`."""

from sae.pipeline.declared.importing import import_files

from .base import FORMATS, Format, Metadata, Reading, detect, read, register, write, write_set

import_files(__name__)

__all__ = ["FORMATS", "Format", "Metadata", "Reading", "detect", "read", "register", "write", "write_set"]
