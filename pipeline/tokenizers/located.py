"""The tokenizer of the text that rows came from."""

from pathlib import Path

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.provenance import Text
from sae.cache.tokens import TokenStore
from sae.pipeline.language_model import hints
from sae.pipeline.language_model.files import RANDOM
from sae.pipeline.tokenizers.former import judge
from sae.pipeline.tokenizers.matching import difference, model_tokenizer
from sae.pipeline.tokenizers.tokenizer import Tokenizer, tokenizer


def tokenizer_of(
    root: Path, text: Text, store: ActivationStore, *, given: str | None = None, model: str | None = None,
    offline: bool = False,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of a store's text: the one given, else the one its tokens name, else the model's own.

    model: where that is, if not where the harvest found it. Raises SaeError where none is to be had, or is the same.
    """
    wanted = text.recipe["tokenizer"]
    if given is not None:
        found = tokenizer(given, offline=offline)
        if judge(found, wanted) != "same":
            raise SaeError(
                f"tokenizer = {given}: is another one than {wanted['name']!r}, which {store.key} was made with"
            )
        return found
    tokens = catalogue.of_recipe(root, TokenStore, text.recipe)
    failed: SaeError | None = None
    if tokens is not None:
        try:
            found = tokenizer(hints.tokenizer_of(tokens, None), offline=offline)
            if judge(found, wanted) == "same":
                return found
        except SaeError as error:
            failed = error
    name = hints.followed(store, "model", store.recipe["model"]["model"]) if model is None else model
    own = model_tokenizer(name.removeprefix(RANDOM), revision=store.recipe["model"]["revision"], offline=offline)
    if own is not None and own.recipe()["digest"] == wanted.get(
        "digest"
    ):  # the same by what it does, whatever its name
        return own
    if own is not None and tokens is not None and difference(tokens, own) is None:
        return own
    raise failed or SaeError(
        f"{wanted['name']}: the tokenizer of this run's text is not to be had; put its token store "
        "back into the cache (`tokenize()`), or give the model's folder with its tokenizer (`model`)"
    )
