"""Activation stores by the point of the model that they are of: `6.mlp_in` is the site mlp_in of layer 6."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from sae.cache import catalogue
from sae.cache.activations import ActivationStore, origin
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import NotFound, SaeError
from sae.cache.provenance import LanguageModelRows, provenance

OWN = ("layer", "site", "hook", "d")  # what differs between stores of one pass

Where = tuple[int, str]
"""A layer and a site."""

HOOKS = {  # site -> what transformer_lens calls it, inside `blocks.<layer>.`
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "attn_z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
}
COMPUTED = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_post", "mlp_out", "resid_post")
"""The sites of a layer in the order in which a model computes them."""

_MODULES = {"": "resid_post", ".mlp": "mlp_out", ".attn": "attn_out", ".self_attn": "attn_out"}


def hook_name(layer: int, site: str) -> str:
    """Return transformer_lens' name of a site of a layer."""
    return f"blocks.{layer}.{HOOKS[site]}"


def point_of_hook(name: str) -> Where | None:
    """The layer and the site that a hook point of transformer_lens is, or the output of a Hugging Face model's module
    (`layers.5`, `transformer.h.5.mlp`); None where it is neither."""
    if (lens := re.fullmatch(r"blocks\.([0-9]{1,9})\.(.+)", name)) is not None:
        return next(((int(lens[1]), site) for site, hook in HOOKS.items() if hook == lens[2]), None)
    module = re.fullmatch(r"(?:\w+\.)*(?:layers|h)\.([0-9]{1,9})((?:\.\w+)?)", name)
    return None if module is None or module[2] not in _MODULES else (int(module[1]), _MODULES[module[2]])


def point_in(text: str) -> Where | None:
    """The layer and the site that `LAYER.SITE` names; None for what is not written so."""
    found = re.fullmatch(r"([0-9]{1,9})\.(\w+)", text)
    return None if found is None else (int(found[1]), found[2])


def point_of(store: ActivationStore) -> Where | None:
    """The layer and the site that a store is of; None where its rows come from no model."""
    source = provenance(store.recipe)
    return (source.layer, source.site) if isinstance(source, LanguageModelRows) else None


def expect_in_order(stores: Sequence[ActivationStore]) -> None:
    """Raise SaeError, naming both, where a model computes the point of a store no earlier than that of the next one."""
    for store, following in pairwise(stores):
        one, other = point_of(store), point_of(following)
        if one is not None and other is not None and _time(one) >= _time(other):
            raise SaeError(
                f"{store.key}: {_text(one)} is computed no earlier than {_text(other)} ({following.key}), and has to "
                "be; name layers from the first to the last, each reading what it does before it writes"
            )


def expect_read_first(read: ActivationStore, written: ActivationStore) -> None:
    """Raise SaeError, naming both, where one model computes the point that is written before the one that is read."""
    if read.recipe.get("model") == written.recipe.get("model") and point_of(read) != point_of(written):
        expect_in_order((read, written))


def _time(point: Where) -> tuple[int, int]:
    """When a model computes a point."""
    layer, site = point
    return layer, COMPUTED.index(site) if site in COMPUTED else len(COMPUTED)


def beside(root: Path, reference: ActivationStore) -> dict[Where, ActivationStore]:
    """The stores that hold rows and differ from a reference in their point alone, itself included, in order."""
    wanted = _common(reference.recipe)
    found = [store for store in _stores(root) if _common(store.recipe) == wanted]
    return dict(sorted((point, store) for store in found if (point := point_of(store)) is not None))


def at_point(
    root: Path, point: Where, argument: str, fits: Callable[[ActivationStore], bool] = lambda store: True
) -> ActivationStore:
    """The training store of a point: of those that the last harvest made if one is, else the only one there is.

    fits: which stores are asked at all. Raises NotFound, with the points there are, or SaeError listing the candidates.
    """
    every = {store.path.name: store for store in _stores(root) if store.split == "train" and fits(store)}
    found = {key: store for key, store in every.items() if point_of(store) == point}
    if not found:
        there = sorted({its for store in every.values() if (its := point_of(store)) is not None})
        raise NotFound(f"{argument} = {_text(point)}: no store of it in {root}; {_listed(there)}")
    last = [found[key] for key in catalogue.latest(root).get(ActivationStore.kind, []) if key in found]
    return _only([*last] or [*found.values()], argument, point)


def aligned(root: Path, reference: ActivationStore, point: Where, argument: str) -> ActivationStore:
    """The store of a point whose rows align with a reference's, of the same model and codec if there are several.

    Where none aligns, one that does not: what it is made of other than the reference is said where both are read.
    """
    every = [store for store in _stores(root) if store.split == reference.split]
    found = [store for store in every if point_of(store) == point]
    if not found:
        mine = [store for store in every if _rows(store.recipe) == _rows(reference.recipe)]
        there = sorted({its for store in mine if (its := point_of(store)) is not None})
        raise NotFound(f"{argument} = {_text(point)}: no store of it beside {reference.key}; {_listed(there)}")
    for alike in (_rows, lambda recipe: canonical(recipe["model"]), lambda recipe: canonical(recipe["codec"])):
        found = [store for store in found if alike(store.recipe) == alike(reference.recipe)] or found
    return _only(found, argument, point)


def _only(found: Sequence[ActivationStore], argument: str, point: Where) -> ActivationStore:
    if len(found) > 1:
        names = catalogue.listed([store.path for store in found])
        raise SaeError(f"{argument} = {_text(point)}: ambiguous; give one of {names}")
    return found[0]


def _stores(root: Path) -> list[ActivationStore]:
    """Every activation store that can be read and has rows."""
    found, _ = catalogue.readable(root, catalogue.folders(root, ActivationStore.kind))
    return [store for store in found if isinstance(store, ActivationStore) and store.n_rows]


def _common(recipe: Recipe) -> str:
    return canonical({key: value for key, value in recipe.items() if key not in OWN})


def _rows(recipe: Recipe) -> str:
    """Return the part of a recipe that two stores have in common whose rows align."""
    return canonical({"origin": origin(recipe), "rows": recipe.get("rows")})


def _text(point: Where) -> str:
    return f"{point[0]}.{point[1]}"


def _listed(points: Sequence[Where]) -> str:
    return f"there is {', '.join(map(_text, points))}" if points else "`harvest()` makes stores of points"
