"""Tokenizers: tiktoken's encodings, the embedded one, and those of Hugging Face models.

Text is always ordinary text here: "<|endoftext|>" written in a document is encoded as the characters it is made of, and
no tokenizer adds tokens of its own. The tokenize stage puts `begin` before contexts or documents.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cache.errors import SaeError
from pipeline import embedded
from pipeline.network import hub_address, hub_errors, offline_wanted, reachable

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
        """Whether `begin` is meant for that; otherwise it is the token that ends texts, for want of one."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends texts."""
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

    "tiny" (embedded), a tiktoken encoding such as "gpt2", a folder with a Hugging Face tokenizer, or "hf:org/name".
    Raises SaeError where there is none of that name, or it needs a network that is not there.
    """
    if spec == embedded.NAME:
        return TiktokenTokenizer(embedded_encoding())
    if spec in _tiktoken_names():
        return TiktokenTokenizer(_from_tiktoken(spec, offline))
    if spec.startswith("hf:"):
        return HuggingFaceTokenizer(
            _from_hub(spec.removeprefix("hf:"), offline), spec.split("/")[-1].removeprefix("hf:")
        )
    folder = Path(spec).expanduser()
    if spec and folder.is_dir():
        return HuggingFaceTokenizer(_from_folder(spec, folder), folder.resolve().name)
    raise SaeError(
        f"--tokenizer {spec}: no such folder or tokenizer; try tiny, {', '.join(_tiktoken_names())}, a folder with a "
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
        self.has_begin = True  # GPT-2's texts start with what ends the one before

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates: encode_ordinary replaces them, the faster way cannot
            return np.array(self._encoding.encode_ordinary(text), np.uint32)

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
        return _digest([self._encoding._pat_str.encode(), *self.vocabulary()])


class HuggingFaceTokenizer:
    """A tokenizer that transformers loads."""

    def __init__(self, loaded: Any, slug: str) -> None:
        self._loaded = loaded
        self.slug = re.sub(r"[^A-Za-z0-9._]+", "-", slug).strip("-.") or "tokenizer"
        self._ids: dict[str, int] = loaded.get_vocab()
        self._added: dict[int, str] = {i: str(token) for i, token in loaded.added_tokens_decoder.items()}
        if len(self._ids) <= len(self._added):
            # What transformers makes, without a word, of a folder that has a model's config and no tokenizer.
            raise SaeError(
                f"--tokenizer {slug}: has no vocabulary (is tokenizer.json missing?); try a whole copy, or gpt2"
            )
        self.n_vocab = max(self._ids.values()) + 1
        begin = loaded.bos_token_id if loaded.bos_token_id is not None else loaded.eos_token_id
        if begin is None:
            raise SaeError(
                f"--tokenizer {slug}: has neither a bos nor an eos token to begin documents with; try another"
            )
        self.begin, self.has_begin = int(begin), loaded.bos_token_id is not None
        self.end: int | None = loaded.eos_token_id
        self._backend = getattr(loaded, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        if self._backend is not None:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(one.ids, np.uint32) for one in found]
        found = self._loaded(texts, add_special_tokens=False, split_special_tokens=True, truncation=False)["input_ids"]
        return [np.array(ids, np.uint32) for ids in found]

    def vocabulary(self) -> list[bytes]:
        spell = _byte_level if self._is_byte_level() else _sentence_piece
        tokens = [b""] * self.n_vocab
        for token, i in self._ids.items():
            tokens[i] = self._added[i].encode() if i in self._added else spell(token)
        return tokens

    def _is_byte_level(self) -> bool:
        """Whether tokens are written in GPT-2's alphabet, in which every byte has a printable character of its own."""
        if self._backend is not None:
            return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])
        return hasattr(self._loaded, "byte_decoder")

    def recipe(self) -> dict[str, Any]:
        parts = [f"{i}\t{token}".encode() for token, i in sorted(self._ids.items(), key=lambda item: item[1])]
        if self._backend is not None:
            # What turns text into ids; not how ids are padded, cut or turned back into text.
            whole = json.loads(self._backend.to_str())
            keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
            parts = [json.dumps({key: whole[key] for key in keys}, sort_keys=True).encode()]
        return {"name": self.slug, "digest": _digest(parts)}


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's table: the character that stands for a byte -> the byte.

    Printable bytes stand for themselves, the others for the characters from 256 on, in order (Radford et al. 2019).
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    table = byte_alphabet()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)


def _sentence_piece(token: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


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
    ) as error:  # no network, a server that refuses, a download that is not what it should be
        line = str(error).splitlines()[0][:200]
        raise SaeError(
            f"--tokenizer {name}: not in tiktoken's cache, and cannot be fetched ({line}); try --tokenizer tiny, "
            "a local Hugging Face folder, or set TIKTOKEN_CACHE_DIR to a folder that has it"
        ) from error


@contextmanager
def _guarded_downloads(offline: bool) -> Iterator[None]:
    """Let tiktoken read its cache but not wait for a server that is not there: its requests have no time limit."""
    import tiktoken.load

    original = tiktoken.load.read_file

    def read_file(path: str) -> bytes:
        if "://" in path:
            if offline:
                raise ConnectionError("the network is switched off")
            if not reachable(path):
                raise ConnectionError("no network")
        return original(path)

    tiktoken.load.read_file = read_file
    try:
        yield
    finally:
        tiktoken.load.read_file = original


def _from_folder(spec: str, folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        what = f"no tokenizer that transformers can read ({_first_line(error)})"
        raise SaeError(f"--tokenizer {spec}: {what}; it needs a tokenizer.json") from error


def _from_hub(name: str, offline: bool) -> Any:
    """From the local Hugging Face cache if it is there, else from the hub."""
    import transformers

    load = transformers.AutoTokenizer.from_pretrained
    try:
        return load(name, local_files_only=True)
    except hub_errors() as error:
        if offline_wanted(offline):
            what = "not in the local Hugging Face cache, and the network is switched off"
            raise SaeError(f"--tokenizer hf:{name}: {what}; try --tokenizer tiny or a local folder") from error
        if not reachable(hub_address()):
            what = f"not in the local Hugging Face cache, and {hub_address()} cannot be reached"
            raise SaeError(f"--tokenizer hf:{name}: {what}; try --tokenizer tiny or a local folder") from error
    try:
        return load(name)
    except hub_errors() as error:
        raise SaeError(f"--tokenizer hf:{name}: {_first_line(error)}; check the name, or try a local folder") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
