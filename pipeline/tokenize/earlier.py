"""Token stores that were made before of what is asked for now: of another state of the text, or in another layout."""

from collections.abc import Callable
from pathlib import Path

from sae.cache import catalogue
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.tokens import TokenStore
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.tokenize.sources import Moving, TextSource, Unreachable
from sae.pipeline.tokenizers.former import begun
from sae.pipeline.tokenizers.tokenizer import Tokenizer


def settled(source: Moving, recipe_of: Callable[[TextSource], Recipe], root: Path, progress: Progress) -> TextSource:
    """A source that may have moved: as it is now, or as a store has it where that cannot be found out.

    `recipe_of` gives the recipe of the training store. Says so where a store is of an earlier state.
    """
    older: list[tuple[TokenStore, TextSource]] = []
    # what cannot be read is said by `sae cache ls`; it is no reason not to make another store
    for store in catalogue.readable(root, catalogue.folders(root, TokenStore.kind))[0]:
        assert isinstance(store, TokenStore)
        then = source.earlier(store.recipe["source"])
        if then is not None and canonical(recipe_of(then)) == canonical(store.recipe):
            older.append((store, then))
    most = max(older, key=lambda item: item[0].n_contexts, default=None)
    try:
        now = recipe_of(source)
    except Unreachable as error:
        if most is None:
            raise
        progress.note(f"{error}; going on with the text that {most[0].key} is of")
        return most[1]
    if most is not None and catalogue.of_recipe(root, TokenStore, now) is None:
        progress.note(
            f"a new store: the text has changed since {most[0].key} ({most[0].n_tokens:,} tokens) was made; "
            f"`source = {most[1]}` continues that one"
        )
    return source


def point_to_older(root: Path, slug: str, recipe: Recipe, tok: Tokenizer, progress: Progress) -> None:
    """Say where the same text lies in contexts of the layout that was the default once."""
    older = {name: value for name, value in recipe.items() if name not in ("begin", "separator")}
    if older == recipe:
        return
    older = begun(root, slug, older, tok, progress)
    if (found := catalogue.of_recipe(root, TokenStore, older)) is not None and found.n_contexts:
        progress.note(
            f"a new store: contexts begin with the begin token now, and not only documents as in {found.key}; "
            "`tokenize.begin = document` continues that one"
        )
