"""The layout of documents in contexts: which tokens stand before contexts and documents and between documents.

The begin token stands before each context, before each document or nowhere. A separator stands between two documents
of one context: never at a context's start, where there is nothing to separate.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sae.cache.errors import SaeError
from sae.pipeline.tokenizers.tokenizer import Tokenizer

Begin = Literal["context", "document", "none"]
DEFAULT, BEGIN, EOS, NONE = "default", "begin", "eos", "none"  # separators by other names than a token's own


@dataclass(frozen=True)
class Layout:
    """The rule by which documents of given tokens become contexts."""

    context: int  # tokens in a context, its begin token among them
    packing: str  # concat, document
    token: int  # the tokenizer's begin token, which also pads
    begin: Begin = "document"
    separator: int | None = None
    min_tokens: int = 0  # documents of fewer are left out

    @property
    def body(self) -> int:
        """Tokens of a context that come from documents."""
        return self.context - (self.begin == "context")

    def recipe(self) -> dict[str, Any]:
        """The JSON form that goes into a store's recipe; what is as before there was a choice is left out."""
        fields = {"begin": self.begin, "separator": self.separator, "min_tokens": self.min_tokens}
        plain = Layout(self.context, self.packing, self.token)
        return {name: value for name, value in fields.items() if value != getattr(plain, name)}

    def keeps(self, ids: np.ndarray) -> bool:
        """Return True if a document is long enough. One without tokens is something only where it has its begin
        token."""
        return len(ids) >= (self.min_tokens or int(self.begin != "document"))

    def document(self, ids: np.ndarray) -> np.ndarray:
        """uint32: a document as it lies behind another one: separator, begin token, its own tokens."""
        lead = [self.separator] if self.separator is not None else []
        lead += [self.token] if self.begin == "document" else []
        return np.concatenate([np.array(lead, np.uint32), ids.astype(np.uint32, copy=False)])


def layout(
    tok: Tokenizer, context: int, packing: str, *, begin: Begin | None, separator: str | int | None, min_tokens: int
) -> Layout:
    """The layout that settings ask for with a tokenizer.

    `begin` None: `context` where the tokenizer has a token that begins texts, else `document`. `separator` is a token's
    id or text, `begin`, `eos`, `none`, or `default`: the begin token between documents where contexts begin with it.
    Raises SaeError for a separator that the tokenizer does not have, or that would change nothing.
    """
    begin = begin or ("context" if tok.has_begin else "document")
    if separator == DEFAULT:
        separator = BEGIN if begin == "context" and packing == "concat" else NONE
    token = None if separator is None or separator == NONE else _id(tok, separator)
    if token is not None and packing == "document":
        raise SaeError(
            f"tokenize.separator = {separator}: with `packing = document` no context holds two documents; leave it out"
        )
    if token == tok.begin and begin == "document":
        raise SaeError(
            f"tokenize.separator = {separator}: is the begin token, and with tokenize.begin = document each document "
            "begins with it already; leave it out"
        )
    return Layout(context, packing, tok.begin, begin, token, min_tokens)


def _id(tok: Tokenizer, separator: str | int) -> int:
    """The token that a setting names."""
    if isinstance(separator, int):
        if separator < tok.n_vocab:
            return separator
        raise SaeError(f"tokenize.separator = {separator}: {tok.slug} has tokens 0 to {tok.n_vocab - 1}")
    if separator == BEGIN:
        return tok.begin
    if separator == EOS:
        if tok.end is None:
            raise SaeError(f"tokenize.separator = eos: {tok.slug} has no such token; try begin, or a token's id")
        return tok.end
    found = [i for i, token in enumerate(tok.vocabulary()) if token == separator.encode("utf-8", "surrogatepass")]
    if len(found) != 1:
        what = f"the text of tokens {', '.join(map(str, found))}; give the id" if found else "not a token of its own"
        raise SaeError(
            f"tokenize.separator = {separator!r}: in {tok.slug} {what}; try begin, eos, none, or a token's text or id"
        )
    return found[0]
