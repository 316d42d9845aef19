"""Recipes and the names they give: stable, readable, and safe as folder names."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import some

from sae.cache.disk.identity import canonical, digest, key

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
recipes = st.dictionaries(st.text(), values, max_size=4)


def test_the_hash_is_pinned() -> None:
    """Names of stores that exist must never change."""
    recipe = {"model": "gpt2", "layer": 6, "codec": {"name": "int8", "step": 0.08, "zstd": 1}, "text": "é"}
    assert canonical(recipe) == (
        '{"codec":{"name":"int8","step":0.08,"zstd":1},"layer":6,"model":"gpt2","text":"\\u00e9"}'
    )
    assert digest(recipe) == "febbe416"


@some
@given(recipes)
def test_a_recipe_survives_its_file(recipe: dict[str, object]) -> None:
    assert digest(json.loads(json.dumps(recipe, indent=2))) == digest(recipe)


@some
@given(recipes)
def test_the_order_of_keys_means_nothing(recipe: dict[str, object]) -> None:
    assert canonical(dict(reversed(recipe.items()))) == canonical(recipe)


@some
@given(recipes, recipes)
def test_other_recipes_have_other_texts(one: dict[str, object], other: dict[str, object]) -> None:
    assert (canonical(one) == canonical(other)) == (
        json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"a": value})
    with pytest.raises(TypeError):
        canonical({"a": object()})


@some
@given(st.text(max_size=120))
def test_a_key_is_one_plain_folder_name(slug: str) -> None:
    name = key(slug, {"a": 1})
    assert re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9._-]*-)?[0-9a-f]{8}", name)
    assert len(name) <= 89
    assert name.endswith(digest({"a": 1}))
