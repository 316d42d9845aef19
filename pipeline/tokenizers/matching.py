"""Comparison of a token store's tokenizer with a model's own, by content: a vocabulary's size is no identity.

Two tokenizers are the same where the digests in their recipes are, or else where each id stands for the same bytes and
stored documents, turned into text and encoded again, give the same ids. So tiktoken's gpt2 is a Hugging Face folder of
GPT-2, and one that cuts numbers otherwise is not.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sae.cache.errors import NotFound, SaeError
from sae.cache.printable import printable
from sae.cache.tokens import TokenStore
from sae.pipeline import embedded
from sae.pipeline.language_model.files import LENS_MODELS, RANDOM
from sae.pipeline.runtime.network import offline_wanted
from sae.pipeline.tokenizers import huggingface
from sae.pipeline.tokenizers.tokenizer import Tokenizer, tokenizer

SAMPLE = 1 << 16  # tokens of a store that are encoded again
UNSETTLED = 64  # tokens at the end of a document cut off: the rest might have joined them
GPT2 = "gpt2"
GPT2_DIGEST = "3611c8056026cc0aabd8cfd5b5aa66f0"  # of tiktoken's
GPT2_MODELS = {
    *(f"{owner}{GPT2}{size}" for owner in ("", "openai-community/") for size in ("", "-medium", "-large", "-xl")),
    "distilgpt2", "distilbert/distilgpt2",
}  # fmt: skip


def matches(tokens: TokenStore, model: str, *, revision: str | None = None, offline: bool = False) -> bool:
    """Return True if the store was made with the tokenizer of the model `--model model` names; False where nobody
    knows.

    `revision` is the commit of a hub's model. Raises SaeError where it is another tokenizer, saying both and where
    they differ.
    """
    name = model.removeprefix(RANDOM)
    digest = tokens.recipe["tokenizer"].get("digest")
    if name in GPT2_MODELS and digest == GPT2_DIGEST and not Path(name).is_dir():
        return True
    own = model_tokenizer(name, revision=revision, offline=offline)
    if own is None:
        return False
    try:
        found = difference(tokens, own)
    except NotFound:  # tokens without their vocabulary
        return False
    if found is not None:
        raise SaeError(
            f"tokens_from = {tokens.key}: was made with another tokenizer ({tokens.recipe['tokenizer']['name']}) than "
            f"the one of `model = {model}`: {found}; tokenize again with `tokenizer = {_spec(name)}`, or take it as it "
            "is with `harvest.tokenizer = unchecked`"
        )
    return True


def model_tokenizer(name: str, *, revision: str | None = None, offline: bool = False) -> Tokenizer | None:
    """The tokenizer in a model's folder or repository; None where there is none, or none that can be had."""
    if name == embedded.NAME:
        return tokenizer(name)
    option, folder = f"model = {name}", Path(os.path.expanduser(name))
    offline = offline_wanted(offline)
    try:
        if not folder.is_dir():
            repository = LENS_MODELS.get(name, name)
            folder = huggingface.hub_folder(option, repository, revision=revision, offline=offline)
        folder = huggingface.followed(option, folder, offline=offline)
    except SaeError:
        return _gpt2() if name in GPT2_MODELS else None
    if os.path.lexists(folder / huggingface.TOKENIZER):
        return huggingface.from_file(option, folder)
    try:
        return huggingface.from_folder(option, folder, folder.name)
    except SaeError:
        return _gpt2() if name in GPT2_MODELS else None


def difference(tokens: TokenStore, own: Tokenizer) -> str | None:
    """Return how a store's tokenizer differs from another, in words; None where it does not. NotFound: no
    vocabulary.
    """
    if tokens.recipe["tokenizer"].get("digest") == own.recipe()["digest"]:
        return None
    table, other = tokens.vocabulary(), own.vocabulary()
    for i, (stored, there) in enumerate(zip(table, other, strict=False)):
        if stored != there and stored and there:
            return f"token {i} is {_shown(stored)} in the store and {_shown(there)} there"
    for ids, whole in _documents(tokens):
        again = _encoded_again(ids, table, own)
        end = len(ids) if whole else len(ids) - UNSETTLED
        if again is None or any(np.array_equal(found[:end], ids[:end]) for found in again):
            continue
        shared = max(_shared(found, ids) for found in again)
        text = b"".join(table[i] for i in ids[max(0, shared - 2) : shared + 6])
        return f"the same vocabulary, but {_shown(text)} is cut into other tokens there than in the store"
    return None


def _gpt2() -> Tokenizer | None:
    try:
        return tokenizer(GPT2, offline=True)
    except SaeError:
        return None


def _spec(model: str) -> str:
    """Return the value of `--tokenizer` for a model's tokenizer."""
    if model == embedded.NAME or model in LENS_MODELS or Path(os.path.expanduser(model)).is_dir():
        return model
    return GPT2 if model in GPT2_MODELS else f"hf:{model}"


def _documents(tokens: TokenStore) -> Iterator[tuple[np.ndarray, bool]]:
    """Ids (int64) of the first documents without begin tokens and separators, and whether they are all there."""
    contexts = min(tokens.n_contexts, max(1, SAMPLE // tokens.context_length))
    if not contexts:
        return
    recipe = tokens.recipe
    ids, numbers = tokens.contexts(0, contexts), tokens.document_ids(0, contexts)
    kept = np.arange(tokens.context_length) < tokens.lengths(0, contexts)[:, None]
    kept &= ~np.isin(ids, [i for i in (recipe["tokenizer"]["begin"], recipe.get("separator")) if i is not None])
    ids, numbers = ids[kept], numbers[kept]
    parts = np.split(ids, np.flatnonzero(np.diff(numbers)) + 1)
    yield from ((part, place < len(parts) - 1) for place, part in enumerate(parts))


def _encoded_again(ids: np.ndarray, table: list[bytes], own: Tokenizer) -> list[np.ndarray] | None:
    """Encode the text of some ids again, with and without the space some put first; None: no sure text."""
    if not own.special.isdisjoint(ids.tolist()):
        return None
    try:
        text = b"".join(table[i] for i in ids).decode()
    except UnicodeDecodeError:
        return None
    return own.encode_batch([text, text.removeprefix(" ")])


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many ids two documents begin with alike."""
    n = min(len(one), len(other))
    return int(np.argmin(np.append(one[:n] == other[:n], False)))


def _shown(text: bytes) -> str:
    return printable(repr(text.decode("utf-8", "replace"))[:40])
