"""Sources of text: `text_source("python", offline=True).open()` yields documents."""

from pipeline.sources.base import Document, DocumentStream, TextSource, is_validation, registered, text_source

__all__ = ["Document", "DocumentStream", "TextSource", "is_validation", "registered", "text_source"]
