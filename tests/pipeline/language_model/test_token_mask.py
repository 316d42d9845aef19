"""Which tokens become rows, against the rule said slowly, and where windows of them start, against counting."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_models import BEGIN, CONTEXT, VOCAB, made_up, token_store
from support.small_stores import few, shrunk, some

from sae.cache.errors import SaeError
from sae.cache.store.manifest import Windows
from sae.pipeline.language_model import token_mask as module
from sae.pipeline.language_model.token_mask import TokenMask, TokenPosition, TokenRows


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk() as patch:
        patch.setattr(module, "SCAN_CONTEXTS", 5)
        yield


positions = st.none() | st.tuples(st.integers(0, CONTEXT - 1), st.integers(1, CONTEXT + 3)).filter(
    lambda p: p[0] < p[1]
)


@some
@given(
    st.integers(0, CONTEXT),
    st.booleans(),
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
    positions,
    st.integers(0, 9),
)
def test_the_rule_is_what_it_says(
    skip_first: int, skip_begin: bool, skip_tokens: list[int], kept: tuple[int, int] | None, seed: int
) -> None:
    if kept is not None and skip_first >= kept[1]:
        with pytest.raises(SaeError, match=f"with skip_first {skip_first} keeps no position"):
            TokenMask(skip_first=skip_first, positions=kept)
        return
    rule = TokenMask(skip_first=skip_first, skip_begin=skip_begin, skip_tokens=skip_tokens, positions=kept)
    tokens, lengths = made_up(5, seed=seed), np.random.default_rng(seed).integers(1, CONTEXT + 1, 5)
    mask = rule.mask(tokens, lengths, BEGIN)
    for context in range(5):
        for place in range(CONTEXT):
            token = tokens[context, place]
            wanted = (
                place >= skip_first
                and place < lengths[context]
                and not (skip_begin and token == BEGIN)
                and token not in skip_tokens
                and (kept is None or kept[0] <= place < kept[1])
            )
            assert mask[context, place] == wanted


def test_a_rule_that_says_nothing_new_is_the_rule_of_old() -> None:
    """What is not used is no part of a store's identity, nor is the order of the tokens."""
    assert TokenMask().recipe() == {"skip_first": 1, "skip_begin": True}
    assert TokenMask(skip_tokens=[7, 5, 7]) == TokenMask(skip_tokens=[5, 7])
    full = TokenMask(skip_tokens=[7, 5], positions=[1, 9])
    assert full.recipe() == {"skip_first": 1, "skip_begin": True, "skip_tokens": [5, 7], "positions": [1, 9]}
    assert TokenMask.model_validate(full.recipe()) == full


@few
@given(
    st.integers(1, 60),
    st.integers(0, 70),
    st.sampled_from([TokenMask(), TokenMask(positions=(3, 5)), TokenMask(skip_first=14)]),
)
def test_windows_start_where_counting_says(
    tmp_path_factory: pytest.TempPathFactory, n: int, within: int, rule: TokenMask
) -> None:
    tokens = made_up(n, seed=n)
    store = token_store(tmp_path_factory.mktemp("tokens"), tokens, ended=False)
    windows = Windows(32, 128)
    counted = TokenRows(store, rule).count(windows, min(within, n))
    mask = rule.mask(tokens, np.full(n, CONTEXT), BEGIN)
    assert counted.rows == mask.sum()
    assert counted.within == mask[:within].sum()
    assert len(counted.starts) == windows.count(counted.rows) + 1
    of_row = np.argwhere(mask)[:, 0]  # the context of each row
    for window, place in enumerate(counted.starts):
        before = min(windows.start(window), counted.rows)  # rows before it
        if before == 0:
            assert place == TokenPosition(0, 0)
            continue
        last = of_row[before - 1]
        used = int((of_row[:before] == last).sum())
        assert place == (TokenPosition(last + 1, 0) if used == mask[last].sum() else TokenPosition(last, used))


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    store = token_store(tmp_path, made_up(4))
    with pytest.raises(SaeError, match=r"^harvest.rows.skip_tokens = 61: the tokenizer of \S+ has tokens 0 to 60$"):
        TokenRows(store, TokenMask(skip_tokens=(3, VOCAB)))
