"""Sources of text: `text_source("python", offline=True).open()` yields documents."""

from sae.pipeline.tokenize.sources.base import (
    Document,
    DocumentStream,
    Moving,
    TextSource,
    Unreachable,
    is_validation,
    registered,
    text_source,
)

__all__ = [
    "Document",
    "DocumentStream",
    "Moving",
    "TextSource",
    "Unreachable",
    "is_validation",
    "registered",
    "text_source",
]
