"""Token stores of earlier versions, in which transformers built a tokenizer anew: which of them hold the right ids.

Their recipes name what was built. Where it does to every text what tokenizer.json says, the store is continued under
its own recipe; where it does not, its tokens are not those the model was trained on.
"""

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

from sae.cache import catalogue
from sae.cache.disk.identity import Recipe, canonical, key
from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.tokenizers.conversion import build
from sae.pipeline.tokenizers.huggingface import FUNCTION, HuggingFaceTokenizer, function_digest, plain
from sae.pipeline.tokenizers.tokenizer import Tokenizer

Verdict = Literal["same", "other", "unknown"]
_OTHER: dict[Verdict, str] = {
    "other": "ids that are not always those of tokenizer.json, since an earlier version built it anew; do not use it",
    "unknown": "another tokenizer of that name",
}


def identity(tok: Tokenizer) -> Recipe:
    """Return the part of a token store's recipe that identifies its tokenizer."""
    return {**tok.recipe(), "n_vocab": tok.n_vocab, "begin": tok.begin}


def judge(tok: Tokenizer, said: Recipe) -> Verdict:
    """Compare a recipe's tokenizer with `tok`: the same function of text; what an earlier version took for it, with
    other ids; or nothing that is known.
    """
    if said == identity(tok):
        return "same"
    if not isinstance(tok, HuggingFaceTokenizer):
        return "unknown"
    try:
        built = getattr(build(f"tokenizer = {tok.slug}", tok.folder), "backend_tokenizer", None)
    except SaeError:  # what cannot be built made no store
        return "unknown"
    if built is None or said.get("digest") != function_digest(plain(built)):
        return "unknown"
    return "same" if said["begin"] == tok.begin and _function(built) == _function(tok.backend) else "other"


def begun(root: Path, slug: str, recipe: Recipe, tok: Tokenizer, progress: Progress) -> Recipe:
    """The recipe under which a token store was begun: an earlier version's where its ids are the same, else `recipe`.

    Says so where there is a store of the same text with a tokenizer of the same name that gives other ids.
    """
    name = key(slug, recipe)
    if (root / TokenStore.kind / name).exists():
        return recipe
    for path in catalogue.folders(root, TokenStore.kind):
        if path.name[:-8] != name[:-8]:
            continue
        try:
            found = TokenStore(path).recipe
        except SaeError:  # a damaged neighbour is told of where it is used
            continue
        named = found["tokenizer"]
        if canonical({**recipe, "tokenizer": named}) != canonical(found) or named["name"] != tok.slug:
            continue
        verdict = judge(tok, named)
        if verdict == "same":
            return found
        progress.note(f"a new store: {path.name} has the same text, with {_OTHER[verdict]}")
    return recipe


def _function(backend: Backend) -> dict[str, Any]:
    """Return what a backend does to text. Special tokens are not looked for there, and no suffix is an empty one."""
    whole = json.loads(backend.to_str())
    model = {**whole["model"], "added_tokens": [token for token in whole["added_tokens"] if not token["special"]]}
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        model[affix] = model.get(affix) or None
    return {**{key: whole[key] for key in FUNCTION}, "added_tokens": None, "model": model}
