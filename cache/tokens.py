"""The token store: documents cut into contexts of equal length.

    tokens    [contexts, T]  uint16, or uint32 for vocabularies above 65,536
    document  [contexts, T]  uint32, which document each token belongs to (numbered in store order)
    length    [contexts]     uint32, how many tokens of a context are real (below T only where packing pads)

A row of this store is a context. The first window is about 65,536 tokens, the largest about 4 million.
"""

import json
from dataclasses import replace
from typing import ClassVar

import numpy as np

from sae.cache.disk.durable import checksum, read, write_in
from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import MOST_BYTES, inner, parse, shown, text, whole
from sae.cache.errors import DamagedStore, NotFound
from sae.cache.store.arrays import ArraySpec
from sae.cache.store.manifest import Window, Windows
from sae.cache.store.store import VOCABULARY as VOCABULARY
from sae.cache.store.store import Store
from sae.cache.store.writer import Writer

CHUNK_TOKENS = 65_536
WINDOW_CHUNKS = 64
MOST_CONTEXT = 1 << 24  # tokens
MOST_VOCABULARY = 1 << 32
SPLITS = ("train", "validation")


def contexts_per_chunk(context_length: int) -> int:
    """The largest power of two of contexts that holds at most CHUNK_TOKENS tokens."""
    return 1 << max(0, (CHUNK_TOKENS // context_length).bit_length() - 1)


class TokenStore(Store):
    """Contexts of tokens, with the documents they came from."""

    kind: ClassVar[str] = "tokens"
    beside: ClassVar[tuple[str, ...]] = (VOCABULARY,)

    @classmethod
    def expect(cls, recipe: Recipe) -> None:
        whole(recipe, "context_length", 1, MOST_CONTEXT)
        tokenizer = inner(recipe, "tokenizer")
        text(tokenizer, "name")
        whole(tokenizer, "begin", 0, whole(tokenizer, "n_vocab", 1, MOST_VOCABULARY) - 1)
        inner(recipe, "source")
        expect_split(recipe)

    @classmethod
    def specs(cls, recipe: Recipe) -> list[ArraySpec]:
        length = recipe["context_length"]
        chunk = contexts_per_chunk(length)
        wide = recipe["tokenizer"]["n_vocab"] > 1 << 16
        dtype, fill = ("<u4", (1 << 32) - 1) if wide else ("<u2", (1 << 16) - 1)
        return [
            ArraySpec("tokens", dtype, (length,), chunk, ("context", "position"), fill),
            ArraySpec("document", "<u4", (length,), chunk, ("context", "position"), (1 << 32) - 1),
            ArraySpec("length", "<u4", (), chunk, ("context",), 0),
        ]

    @classmethod
    def layout(cls, recipe: Recipe) -> Windows:
        chunk = contexts_per_chunk(recipe["context_length"])
        return Windows(chunk, chunk * WINDOW_CHUNKS)

    @property
    def context_length(self) -> int:
        return int(self.recipe["context_length"])

    @property
    def n_vocab(self) -> int:
        return int(self.recipe["tokenizer"]["n_vocab"])

    @property
    def split(self) -> str:
        """`train` or `validation`: no document is in both."""
        return str(self.recipe["split"])

    @property
    def n_contexts(self) -> int:
        return self.n_rows

    @property
    def n_tokens(self) -> int:
        """Places for tokens: contexts times their length."""
        return self.n_rows * self.context_length

    def contexts(self, start: int, stop: int) -> np.ndarray:
        """Tokens of contexts [start, stop): int64 [stop - start, T]. DamagedStore for an id beyond the vocabulary."""
        tokens = self.read("tokens", start, stop).astype(np.int64)
        if tokens.size and int(tokens.max()) >= self.n_vocab:
            raise DamagedStore(f"{self.path}: token {tokens.max()} is outside its vocabulary of {self.n_vocab}")
        return tokens

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """Document of every token: uint32 [stop - start, T]."""
        return self.read("document", start, stop)

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Real tokens in each context: int64 [stop - start]. DamagedStore for more than a context has."""
        lengths = self.read("length", start, stop).astype(np.int64)
        if lengths.size and int(lengths.max()) > self.context_length:
            raise DamagedStore(f"{self.path}: a context of {lengths.max()} tokens, where {self.context_length} fit")
        return lengths

    def expect_positions(self, positions: np.ndarray, store: Store) -> None:
        """Raise DamagedStore where positions [n] that a store names are not of tokens that are here."""
        if positions.size and not 0 <= int(positions.min()) <= int(positions.max()) < self.n_tokens:
            raise DamagedStore(
                f"{store.path}: names token {positions.max()}, {self.key} has {self.n_tokens:,}; run `tokenize()` "
                "again where tokens were lost"
            )

    def vocabulary(self) -> list[bytes]:
        """The bytes every token stands for, so that later stages can show text without the tokenizer."""
        path = self.path / VOCABULARY
        windows = self.manifest.windows
        # stores of version 0.1.0 do not list it
        data = self.stored(VOCABULARY) if windows and VOCABULARY in windows[0].files else read(path, MOST_BYTES)
        if data is None:
            raise NotFound(f"{path}: not there; tokenize again to restore it")
        try:
            entries = parse(data)
            if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                raise ValueError("no list of texts")
            return [entry.encode("latin-1") for entry in entries]
        except ValueError as error:
            raise DamagedStore(f"{path}: is not what was written; tokenize again to restore it") from error


class TokenWriter(Writer):
    """Appends windows of contexts."""

    store_class: ClassVar[type[Store]] = TokenStore
    store: TokenStore
    _vocabulary: tuple[int, str] | None = None  # size and checksum

    def write_vocabulary(self, vocabulary: list[bytes]) -> None:
        """Store what each token stands for, before the first window, which lists it; later only restore what was lost.

        What was committed stays: other bytes than those are not written over them.
        """
        data = vocabulary_bytes(vocabulary)
        self._vocabulary = (len(data), checksum(data))
        windows = self.store.manifest.windows
        committed = windows[0].files.get(VOCABULARY, self._vocabulary) if windows else self._vocabulary
        if committed == self._vocabulary and read(self.path / VOCABULARY) != data:
            write_in(self.path, VOCABULARY, data)

    def commit(self, window: Window) -> Window:
        """As for every store; the first window lists the vocabulary, too."""
        if window.index == 0 and self._vocabulary is not None:
            window = replace(window, files={**window.files, VOCABULARY: self._vocabulary})
        return super().commit(window)


def vocabulary_bytes(vocabulary: list[bytes]) -> bytes:
    """vocabulary.json: what each token stands for, each character a byte."""
    return json.dumps([entry.decode("latin-1") for entry in vocabulary]).encode()


def sibling(recipe: Recipe, split: str) -> Recipe:
    """The recipe of the same store for the other documents (works for token recipes and for recipes built on them)."""
    if "split" in recipe:
        return {**recipe, "split": split}
    return {**recipe, "tokens": sibling(recipe["tokens"], split)}


def expect_split(recipe: Recipe) -> None:
    """Raise ValueError unless the recipe says which documents its store has."""
    if text(recipe, "split") not in SPLITS:
        raise ValueError(f"split is {shown(recipe['split'])}, not {' or '.join(SPLITS)}")
