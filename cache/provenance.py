"""Provenance: the origin of a store's rows, as the typed view of a recipe.

A recipe is what a store's bytes depend on, and stays as it is; this says in names and types what the stages ask of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import shown, whole

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
    rows: Recipe

    @property
    def positions(self) -> tuple[int, int | None]:
        """The first position of a context that becomes a row, and where they end; None: with the context."""
        first, last = self.rows.get("positions") or (0, None)
        return max(first, self.rows.get("skip_first", 1)), last

    @property
    def left_out(self) -> tuple[int, ...]:
        """Tokens that become no row, wherever they stand."""
        begin = (self.text.recipe["tokenizer"]["begin"],) if self.rows.get("skip_begin", True) else ()
        return tuple(sorted({*begin, *self.rows.get("skip_tokens", ())}))

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


def expect_rows(said: Recipe) -> None:
    """Raise ValueError unless a recipe's `rows` say in numbers which tokens become rows."""
    if "skip_first" in said:
        whole(said, "skip_first")
    if type(said.get("skip_begin", True)) is not bool:
        raise ValueError(f"skip_begin is {shown(said['skip_begin'])}, not true or false")
    for name in ("skip_tokens", "positions"):
        listed = said.get(name, [])
        if not isinstance(listed, list) or not all(type(one) is int and one >= 0 for one in listed):
            raise ValueError(f"{name} is {shown(listed)}, not a list of whole numbers")
    if len(said.get("positions", (0, 0))) != 2:
        raise ValueError("positions are not two")


def provenance(recipe: Recipe) -> Provenance:
    """The provenance of the rows of an activation store, by its recipe."""
    if "tokens" not in recipe:
        return SourceRows(str(recipe["source"].get("source")))
    text = Text.of(recipe["tokens"])
    return LanguageModelRows(
        recipe["model"]["model"], recipe["layer"], recipe["site"], recipe["hook"], text, recipe["rows"]
    )
