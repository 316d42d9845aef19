"""Where the rows of a store came from: the typed view of a recipe.

A recipe is what a store's bytes depend on, and stays as it is; this says in names and types what the stages ask of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sae.cache.disk.identity import Recipe

MOST_FILES = 3  # named in a description of a text


class Text(NamedTuple):
    """The tokens that rows were computed from, by the recipe of their store.

    context_length: tokens in a context. begins_contexts: whether every context starts with the begin token.
    dataset: the data set on the hub, where it is one. described: the data set, the names of files, or the kind of text.
    """

    recipe: Recipe
    context_length: int
    begins_contexts: bool
    n_vocab: int
    dataset: str | None
    described: str

    @classmethod
    def of(cls, recipe: Recipe) -> Text:
        source = recipe["source"]
        described = str(source.get("dataset") or source.get("source") or "")
        if source.get("source") == "files" and isinstance(listed := source.get("files"), list):
            names = [str(file.get("name")) for file in listed if isinstance(file, dict)]
            more = f" and {len(names) - MOST_FILES:,} more" if names[MOST_FILES:] else ""
            described = ", ".join(names[:MOST_FILES]) + more
        return cls(
            recipe, recipe["context_length"], recipe.get("begin") == "context", recipe["tokenizer"]["n_vocab"],
            source.get("dataset"), described,
        )  # fmt: skip


@dataclass(frozen=True)
class LanguageModelRows:
    """Rows that a language model computed at a site of a layer, of some text."""

    kind: ClassVar[str] = "language_model"

    model: str
    layer: int
    site: str
    hook: str
    text: Text

    @property
    def point(self) -> str:
        """The layer and the site: `6.mlp_out`."""
        return f"{self.layer}.{self.site}"


@dataclass(frozen=True)
class SourceRows:
    """Rows that a source yields without a language model: made of known features, or of somebody's table."""

    kind: str
    text: ClassVar[None] = None


Provenance = LanguageModelRows | SourceRows


def provenance(recipe: Recipe) -> Provenance:
    """The provenance of the rows of an activation store, by its recipe."""
    if "tokens" not in recipe:
        return SourceRows(str(recipe["source"].get("source")))
    text = Text.of(recipe["tokens"])
    return LanguageModelRows(recipe["model"]["model"], recipe["layer"], recipe["site"], recipe["hook"], text)
