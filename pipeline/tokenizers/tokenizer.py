"""Tokenizers: tiktoken's encodings, the embedded one, and those of Hugging Face models.

Text is always ordinary text here: "<|endoftext|>" written in a document is encoded as the characters it is made of, and
no tokenizer adds tokens of its own. The tokenize stage puts `begin` before contexts or documents.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sae.cache.errors import SaeError
from sae.pipeline import embedded
from sae.pipeline.language_model.files import LENS_MODELS
from sae.pipeline.runtime.network import download
from sae.pipeline.tokenizers import huggingface
from sae.pipeline.tokenizers.foreign import said
from sae.pipeline.tokenizers.spelling import digest

if TYPE_CHECKING:
    import tiktoken

# GPT-2's: contractions, words, numbers and other signs each with a space before them, white space.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids and back to bytes."""

    @property
    def slug(self) -> str:
        """Short readable name, for folders."""
        ...

    @property
    def n_vocab(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def begin(self) -> int:
        """The token texts start with: end-of-text for the GPT-2 family, beginning-of-sequence for Llama's."""
        ...

    @property
    def has_begin(self) -> bool:
        """Return True if `begin` is meant for that; otherwise it is the token that ends texts, for want of one."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends texts."""
        ...

    @property
    def special(self) -> frozenset[int]:
        """Ids that no text stands for: marks, and the one for what is unknown."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids (uint32, one array a text); nothing is added and special tokens in a text are ordinary text."""
        ...

    def vocabulary(self) -> list[bytes]:
        """The bytes each id stands for, [n_vocab]; empty for an id that is not used."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Identity, as JSON: a name to read and a digest of everything that decides the ids."""
        ...


def tokenizer(spec: str, *, offline: bool = False) -> Tokenizer:
    """The tokenizer that `--tokenizer spec` names.

    "tiny" (embedded), a tiktoken encoding such as "gpt2", a folder with a Hugging Face tokenizer, "hf:org/name", or a
    model of transformer_lens' own such as "gelu-1l", which names its tokenizer.
    Raises SaeError where there is none of that name, or it needs a network that is not there.
    """
    option = f"tokenizer = {spec}"
    if spec == embedded.NAME:
        return TiktokenTokenizer(embedded_encoding())
    if spec in _tiktoken_names():
        return TiktokenTokenizer(_from_tiktoken(spec, offline))
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        return huggingface.from_folder(
            option, huggingface.followed(option, folder, offline=offline), folder.resolve().name
        )
    if spec.startswith("hf:") or spec in LENS_MODELS:
        name = LENS_MODELS.get(spec, spec.removeprefix("hf:"))
        found = huggingface.hub_folder(option, name, offline=offline)
        return huggingface.from_folder(
            option, huggingface.followed(option, found, offline=offline), name.split("/")[-1]
        )
    raise SaeError(
        f"tokenizer = {spec}: no such folder or tokenizer; try tiny, {', '.join(_tiktoken_names())}, a folder with a "
        "tokenizer.json, or hf:org/name"
    )


class TiktokenTokenizer:
    """A byte-level BPE run by tiktoken; ids are ranks."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.slug: str = encoding.name
        self.n_vocab: int = encoding.n_vocab
        self.begin: int = encoding.encode_single_token(_END_OF_TEXT)
        self.end: int | None = self.begin
        self.special = frozenset({self.begin})
        self.has_begin = True  # GPT-2's texts start with what ends the one before

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates: encode_ordinary replaces them, the faster way cannot
            return np.array(self._encoding.encode_ordinary(text), np.uint32)
        except ValueError:  # tiktoken's pattern gives up within about a million blanks
            import regex  # type: ignore[import-untyped]

            pieces = regex.findall(self._encoding._pat_str, text)
            return np.array([i for piece in pieces for i in self._encoding._encode_single_piece(piece)], np.uint32)

    def vocabulary(self) -> list[bytes]:
        return self._vocabulary

    @cached_property
    def _vocabulary(self) -> list[bytes]:
        def token(i: int) -> bytes:
            try:
                return self._encoding.decode_single_token_bytes(i)
            except KeyError:  # some encodings have gaps
                return b""

        return [token(i) for i in range(self.n_vocab)]

    def recipe(self) -> dict[str, Any]:
        return {"name": self.slug, "digest": self._content}

    @cached_property
    def _content(self) -> str:
        # The ranks and the pattern are the whole function; tiktoken has no public name for the pattern.
        return digest([self._encoding._pat_str.encode(), *self.vocabulary()])


@functools.cache
def embedded_encoding() -> tiktoken.Encoding:
    import base64

    import tiktoken

    lines = [line.split() for line in embedded.BPE.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {_END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(embedded.NAME, pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _tiktoken_names() -> list[str]:
    import tiktoken

    return sorted(tiktoken.list_encoding_names())


def _from_tiktoken(name: str, offline: bool) -> tiktoken.Encoding:
    import tiktoken

    try:
        with _guarded_downloads(offline):
            return tiktoken.get_encoding(name)
    except (
        OSError,
        ValueError,
    ) as error:  # no network, a refusal, a download that is not what it should be
        raise SaeError(
            f"tokenizer = {name}: not in tiktoken's cache, and cannot be fetched ({said(error)}); try "
            "`tokenizer = tiny`, a local Hugging Face folder, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error


@contextmanager
def _guarded_downloads(offline: bool) -> Iterator[None]:
    """Let tiktoken read its cache but not wait for a server that is not there: its requests have no time limit."""
    import tiktoken.load

    original = tiktoken.load.read_file

    def read_file(path: str) -> bytes:
        if "://" not in path:
            return original(path)
        if offline:
            raise ConnectionError("the network is switched off")
        return download(path)

    tiktoken.load.read_file = read_file
    try:
        yield
    finally:
        tiktoken.load.read_file = original
