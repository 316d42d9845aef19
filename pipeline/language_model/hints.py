"""Hints: the place where what a store was made from is now, as far as the store may say so.

Hints and names in a store are the choice of whoever made it. Followed are those that lead to this machine alone, where
what is found has to be what the recipe says before anything of it is used: an absolute path, the name that the recipe
itself has (a hub's commit included), the embedded model. Everything else is said, and asked for.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe
from sae.cache.disk.parsing import inner, is_plain_name, shown, text
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.head import RECIPE
from sae.cache.store.store import HINTS, Store
from sae.cache.tokens import TokenStore
from sae.pipeline import embedded
from sae.pipeline.language_model.files import RANDOM, find_model

if TYPE_CHECKING:
    from sae.pipeline.language_model import LanguageModel


def expect_model(recipe: Recipe) -> None:
    """Raise ValueError unless a recipe says which model it is of: a hub's commit or a digest, and a precision."""
    model = inner(recipe, "model")
    for name, form in (("revision", "[0-9a-f]{40}"), ("weights", "[0-9a-f]{64}")):
        said = model.get(name)
        if said is not None and not (isinstance(said, str) and re.fullmatch(form, said)):
            raise ValueError(f"the model's {name} is {shown(said)}")
    for name in ("dtype", "processing"):
        text(model, name)


def model_of(store: ActivationStore, given: str | None, offline: bool) -> str:
    """Return the place of a store's language model: where the user says, else where the store may say.

    A folder's and a hub's files are found and compared with the recipe here, before any of them is loaded. Raises
    SaeError where they are others, or where the user has to say it.
    """
    try:
        expect_model(store.recipe)
    except ValueError as error:
        raise DamagedStore(f"{store.path / RECIPE}: {error}; remove the store and make it again") from error
    wanted = store.recipe["model"]
    name = given if given is not None else followed(store, "model", wanted["model"])
    of_hub = wanted["revision"] is not None and not Path(name).is_absolute()
    here = name == embedded.NAME or _is_folder(name) or (name.startswith(RANDOM) and "/" not in name)
    if given is None and not (of_hub or here):
        raise SaeError(f"{store.path / HINTS}: the model is said to be at {name}, which is not a folder; say `model`")
    if name.startswith(RANDOM):
        return name  # nothing is read but a configuration that the user named, or none
    files = find_model(name, revision=None if _is_folder(name) else wanted["revision"], offline=offline)
    found = {"revision": files.revision, "weights": files.digest() if files.revision is None else None}
    if differs := [key for key, value in found.items() if wanted[key] != value]:
        raise other_model(store, name, differs)
    return name


def boot(store: ActivationStore, model: str | None, device: str, offline: bool) -> "LanguageModel":
    """The language model a store was harvested from. Raises SaeError when what is found has other weights."""
    from sae.pipeline.language_model import LanguageModel

    name = model_of(store, model, offline)
    wanted = store.recipe["model"]
    found = LanguageModel.boot(name, device=device, dtype=wanted["dtype"], revision=wanted["revision"], offline=offline)
    differs = [key for key, value in found.recipe().items() if key != "model" and wanted[key] != value]
    if differs:
        raise other_model(store, name, differs)
    return found


def other_model(store: ActivationStore, name: str, differs: list[str]) -> SaeError:
    """The error for a model that is not the one a store was harvested with."""
    return SaeError(
        f"model = {name}: its {', '.join(differs)} differ from those {store.key} was harvested with; "
        "give that model, or harvest again"
    )


def tokenizer_of(store: TokenStore, given: str | None) -> str:
    """Return the name of a store's tokenizer; the caller compares it with the recipe."""
    name = store.recipe["tokenizer"]["name"]
    if given is not None:
        return given
    if not is_plain_name(name):
        raise DamagedStore(f"{store.path / RECIPE}: {shown(name)} is not the name of a tokenizer; give `tokenizer`")
    return followed(store, "tokenizer", name)


def source_of(store: TokenStore, given: str | None) -> str:
    """Return the place of a store's text: its own name (the commit of a hub's data set), or files of this machine."""
    return given or _named(store) or files_of(store, None, "text is")


def files_of(store: Store, given: str | None, what: str) -> str:
    """Return where the files that a store was made from are now: where the user says, else where the store may say.

    Raises SaeError, which calls them `what` ("rows are"), where neither does.
    """
    if given is None and "source" not in store.hints:
        raise SaeError(f"{store.path}: where its {what} now is not known; say it with `source`")
    return given or followed(store, "source", None)


def followed(store: Store, what: str, name: str | None) -> str:
    """Return the hint of a store, where that is an absolute path or the name in its recipe; the latter where it says
    none.

    Raises SaeError for anything else.
    """
    hint = store.hints.get(what, name)
    assert hint is not None
    if hint == name or Path(hint).is_absolute():
        return hint
    raise SaeError(
        f"{store.path / HINTS}: names the {what} {hint}; where that is right, repeat with `{what}` and that name"
    )


def _named(store: TokenStore) -> str | None:
    """The name of a source that says by itself where it is: the commit of a hub's data set; None for files."""
    source: dict[str, Any] = store.recipe["source"]
    try:
        kind = text(source, "source")
        if kind != "hub":
            return "python" if kind == "python" else None
        config = "" if source.get("config") is None else text(source, "config")
        dataset, revision, split = (text(source, name) for name in ("dataset", "revision", "split"))
        return f"hub:{dataset}@{revision}:{config}:{split}"
    except ValueError as error:
        raise DamagedStore(f"{store.path / RECIPE}: its source cannot be read ({error}); give `source`") from error


def _is_folder(name: str) -> bool:
    return Path(name).expanduser().is_dir()
