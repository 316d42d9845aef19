"""Tokenizers of Hugging Face folders: what tokenizer.json says, whatever class a configuration names.

The file is read by the `tokenizers` library alone. transformers builds some classes anew from the vocabulary and leaves
out how the file cuts text (digits, say), so that ids would not be those the model was trained on. Only a folder that
has no tokenizer.json goes through it, and is compared with its own vocabulary. Code in a folder is never run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend

from sae.cache.errors import SaeError
from sae.cache.printable import printable
from sae.pipeline.language_model.files import is_of_lens
from sae.pipeline.runtime.network import Refused, snapshot
from sae.pipeline.tokenizers.foreign import foreign_json, said
from sae.pipeline.tokenizers.spelling import digest, spell

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CONFIG = "config.json"
FILES = (
    TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, CONFIG, "added_tokens.json",
    "vocab.json", "merges.txt", "*.model",
)  # fmt: skip
MOST_IDS = 1 << 22  # the largest vocabularies in use have about a million
FUNCTION = ("added_tokens", "normalizer", "pre_tokenizer", "model")  # what of tokenizer.json turns text into ids


class Ends(NamedTuple):
    """The tokens that stand around texts."""

    begin: int
    has_begin: bool  # whether it is meant for that, or stands in for want of one
    end: int | None


class HuggingFaceTokenizer:
    """A backend of the `tokenizers` library and the tokens that stand around texts."""

    def __init__(self, backend: Backend, slug: str, ends: Ends, folder: Path) -> None:
        self.slug = re.sub(r"[^A-Za-z0-9._]+", "-", slug).strip("-.") or "tokenizer"
        self.begin, self.has_begin, self.end = ends
        self.folder = folder
        self.backend = plain(backend)
        self._ids: dict[str, int] = backend.get_vocab()
        self.n_vocab = max(self._ids.values()) + 1

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def vocabulary(self) -> list[bytes]:
        added = self.backend.get_added_tokens_decoder()
        tokens = [b""] * self.n_vocab
        style = json.loads(self.backend.to_str())
        write = spell(style["decoder"] or style["pre_tokenizer"])
        for token, i in self._ids.items():
            tokens[i] = added[i].content.encode() if i in added else write(token)
        return tokens

    @cached_property
    def special(self) -> frozenset[int]:
        whole = json.loads(self.backend.to_str())
        unknown = whole["model"].get("unk_token"), whole["model"].get("unk_id")
        ids = {token["id"] for token in whole["added_tokens"] if token["special"]}
        return frozenset({*ids, self._ids.get(unknown[0], unknown[1])} - {None})

    def recipe(self) -> dict[str, Any]:
        return {"name": self.slug, "digest": self._content}

    @cached_property
    def _content(self) -> str:
        return function_digest(self.backend)


def from_folder(option: str, folder: Path, slug: str) -> HuggingFaceTokenizer:
    """The tokenizer of a folder. Raises SaeError, one line that begins with `option`, where there is none to trust."""
    said_of_file = foreign_json(folder / TOKENIZER, option)
    if said_of_file is None:
        from sae.pipeline.tokenizers.conversion import converted

        backend, ends = converted(option, folder)
    else:
        backend = checked(option, said_of_file)
        ends = _ends(option, folder, backend)
    return HuggingFaceTokenizer(backend, slug, ends, folder)


def from_file(option: str, folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder's tokenizer.json to compare with, whatever begins its texts."""
    backend = checked(option, foreign_json(folder / TOKENIZER, option) or {})
    return HuggingFaceTokenizer(backend, folder.name, Ends(0, False, None), folder)


def hub_folder(option: str, name: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """Folder with the small files of a hub repository's tokenizer: from the local cache if they are there."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, TOKENIZER, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
        return snapshot(name, FILES, revision=revision, offline=offline)
    except (Refused, errors.HFValidationError) as error:
        absent = isinstance(error, Refused) and not error.definite
        why = f"not in the local Hugging Face cache, and {said(error)}" if absent else said(error)
        raise SaeError(f"{option}: {why}; try `tokenizer = tiny` or a local folder") from error


def followed(option: str, folder: Path, *, offline: bool = False) -> Path:
    """The folder of a model's tokenizer: the model's own, but for transformer_lens' own models, which name another."""
    if os.path.lexists(folder / TOKENIZER):
        return folder
    config = foreign_json(folder / CONFIG, option) or {}
    name = config.get("tokenizer_name")
    return hub_folder(option, name, offline=offline) if is_of_lens(config) and isinstance(name, str) else folder


def checked(option: str, whole: dict[str, Any]) -> Backend:
    """The backend of a tokenizer.json. Raises SaeError where it has no vocabulary, or ids it cannot mean."""
    model, added = whole.get("model"), whole.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not vocabulary or not isinstance(added, list):
        raise SaeError(f"{option}: has no vocabulary; its {TOKENIZER} is not a tokenizer's, try a whole copy")
    if isinstance(vocabulary, dict):
        ids = list(vocabulary.values())
        if wrong := [i for i in ids if type(i) is not int or not 0 <= i < MOST_IDS]:
            raise SaeError(f"{option}: its {TOKENIZER} has the id {printable(str(wrong[0])[:40])}; fetch it again")
        if len(set(ids)) < len(ids):
            raise SaeError(f"{option}: its {TOKENIZER} gives one id to two tokens; fetch it again")
    if isinstance(model, dict) and model.get("dropout"):
        raise SaeError(f"{option}: its {TOKENIZER} has a dropout, which gives other ids every time; set it to null")
    backend = _loaded(option, whole)
    for token in added:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise SaeError(
                f"{option}: its {TOKENIZER} gives {printable(token['content'])} the id {token['id']}, where the "
                f"vocabulary leaves {found}; fetch it again"
            )
    return backend


def plain(backend: Backend) -> Backend:
    """A backend that neither cuts nor fills texts, and to which special tokens in a text are ordinary text."""
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def function_digest(backend: Backend) -> str:
    """Digest of what turns text into ids; not of how ids are padded, cut or turned back into text."""
    whole = json.loads(backend.to_str())
    return digest([json.dumps({key: whole[key] for key in FUNCTION}, sort_keys=True).encode()])


def _loaded(option: str, whole: dict[str, Any]) -> Backend:
    # What was checked is what is loaded: the text is written anew.
    try:
        with _silenced():
            return Backend.from_str(json.dumps(whole))
    except BaseException as error:
        if not _of_the_library(error):
            raise
        raise SaeError(f"{option}: its {TOKENIZER} is not understood ({said(error)}); fetch it again") from None


def _of_the_library(error: BaseException) -> bool:
    """Return True if an error is one of the `tokenizers` library: a bare Exception, or a panic of Rust."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep a panic of Rust from being reported on stderr beside the error it raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _ends(option: str, folder: Path, backend: Backend) -> Ends:
    """The tokens around texts. A name comes from the tokenizer's configuration, else from the class it names; else the
    model's configuration has an id.
    """
    config = foreign_json(folder / TOKENIZER_CONFIG, option) or {}
    model = foreign_json(folder / CONFIG, option) or {}
    special = {} if "added_tokens_decoder" in config else foreign_json(folder / SPECIAL_TOKENS, option) or {}
    named = {**config, **special}

    def find(key: str) -> int | None:
        if key not in named:
            default = _class_default(config, model, key)
            return backend.token_to_id(default) if default is not None else None
        token = named[key].get("content") if isinstance(named[key], dict) else named[key]
        if token is None:
            return None
        found = backend.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            what = printable(str(token)[:40])
            raise SaeError(f"{option}: its {key} {what} is not in its {TOKENIZER}; try a whole copy, or another")
        return found

    def counted(key: str) -> int | None:
        ids = model.get(key)
        first = ids[0] if isinstance(ids, list) and ids else ids
        return first if type(first) is int and 0 <= first < MOST_IDS and backend.id_to_token(first) else None

    bos, eos = find("bos_token"), find("eos_token")
    if bos is None and eos is None:
        bos, eos = counted("bos_token_id"), counted("eos_token_id")
    if bos is None and eos is None:
        bos = find("cls_token")
    begin = eos if bos is None else bos
    if begin is None:
        raise SaeError(f"{option}: has neither a bos nor an eos token to begin documents with; try another")
    return Ends(begin, bos is not None, eos)


def _class_default(config: dict[str, Any], model: dict[str, Any], key: str) -> str | None:
    """The special token that the tokenizer's class stands for where its configuration is silent, as in GPT-2's."""
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    kind = model.get("model_type")
    if not isinstance(name, str) and not isinstance(kind, str):
        return None
    import inspect

    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    name = name if isinstance(name, str) else TOKENIZER_MAPPING_NAMES.get(kind)
    if name is None or not re.fullmatch(r"\w+Tokenizer(Fast)?", name):
        return None
    found = tokenizer_class_from_name(name)
    if not isinstance(found, type):
        return None
    parameter = inspect.signature(found).parameters.get(key)
    empty = parameter is None or parameter.default in (None, inspect.Parameter.empty)
    return None if empty or parameter is None else str(parameter.default)
