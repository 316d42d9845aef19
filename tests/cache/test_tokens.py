"""The token store: contexts, documents, vocabulary."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import (
    CHUNK,
    CONTEXT,
    shrunk,
    some,
    token_recipe,
    window_arrays,
    write_activations,
    write_tokens,
)
from support.small_tokens import VOCABULARY_OF_TESTS

from sae.cache import tokens
from sae.cache.errors import DamagedStore, NotFound
from sae.cache.tokens import VOCABULARY, TokenStore, TokenWriter, contexts_per_chunk, sibling

REAL_CHUNK_TOKENS = tokens.CHUNK_TOKENS


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, 5 * CHUNK + 3, ended=True)
    expected = window_arrays(store.recipe, 0, 5 * CHUNK + 3)
    assert (store.n_contexts, store.context_length, store.n_tokens) == (163, CONTEXT, 163 * CONTEXT)
    assert (store.closed, store.split, store.n_vocab) == (True, "train", 1000)
    for start, stop in ((0, 163), (0, 0), (7, 8), (31, 33), (60, 163), (160, 163)):
        contexts = store.contexts(start, stop)
        assert contexts.dtype == np.int64
        np.testing.assert_array_equal(contexts, expected["tokens"][start:stop])
        np.testing.assert_array_equal(store.document_ids(start, stop), expected["document"][start:stop])
        np.testing.assert_array_equal(store.lengths(start, stop), expected["length"][start:stop])


@some
@given(st.integers(1, 300_000))
def test_a_chunk_holds_a_power_of_two_of_contexts(context: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "CHUNK_TOKENS", REAL_CHUNK_TOKENS)
        contexts = contexts_per_chunk(context)
        assert contexts & (contexts - 1) == 0
        assert contexts == 1 or contexts * context <= 65_536
        assert 2 * contexts * context > 65_536
        assert TokenStore.layout({"context_length": context}).first == contexts


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_the_dtype_follows_the_vocabulary(tmp_path: Path, n_vocab: int, dtype: str) -> None:
    store = write_tokens(tmp_path, CHUNK, n_vocab=n_vocab)
    assert store.arrays["tokens"].dtype == dtype
    np.testing.assert_array_equal(store.contexts(0, CHUNK), window_arrays(store.recipe, 0, CHUNK)["tokens"])


def test_a_token_outside_the_vocabulary_is_damage(tmp_path: Path) -> None:
    recipe = token_recipe(n_vocab=900)
    with TokenWriter(tmp_path, "wrong", recipe) as writer:
        writer.append(window_arrays(token_recipe(n_vocab=1000), 0, CHUNK), {})
    with pytest.raises(DamagedStore, match="outside its vocabulary of 900"):
        writer.store.contexts(0, CHUNK)


def test_the_vocabulary_is_bytes(tmp_path: Path) -> None:
    vocabulary = [bytes([i]) for i in range(256)] + [b" the", "é".encode(), b"\xff\xfe", b""]
    with TokenWriter(tmp_path, "a", token_recipe()) as writer:
        writer.write_vocabulary(vocabulary)
        path = writer.path / VOCABULARY
        written = path.stat().st_ino
        writer.write_vocabulary(vocabulary)  # once
        assert path.stat().st_ino == written
    store = TokenStore(writer.path)
    assert store.vocabulary() == vocabulary
    path.write_text('["\u0107"]')
    with pytest.raises(DamagedStore, match=r"vocabulary\.json: is not what was written; tokenize again"):
        store.vocabulary()
    path.unlink()
    with pytest.raises(NotFound, match=r"vocabulary\.json: not there; tokenize again"):
        store.vocabulary()


def test_the_vocabulary_is_committed_with_the_first_window(tmp_path: Path) -> None:
    store = write_tokens(tmp_path, CHUNK)
    path, data = store.path / VOCABULARY, (store.path / VOCABULARY).read_bytes()
    assert VOCABULARY in list(store.committed_files())
    assert store.vocabulary() == VOCABULARY_OF_TESTS
    for damaged in (data.replace(b"t1", b"t2"), b"", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert str(path) in str(store.damage(VOCABULARY))
        with pytest.raises(DamagedStore, match=r"vocabulary\.json: (damaged|missing)"):
            store.vocabulary()
        write_tokens(tmp_path, CHUNK)  # repeating the command restores it
        assert path.read_bytes() == data
    with TokenWriter(tmp_path, store.slug, store.recipe) as writer:
        writer.write_vocabulary([b"another"])
    assert path.read_bytes() == data


def test_a_store_that_lists_no_vocabulary(tmp_path: Path) -> None:
    """As version 0.1.0 made them."""
    recipe = token_recipe()
    with TokenWriter(tmp_path, "a", recipe) as writer:
        writer.append(window_arrays(recipe, 0, CHUNK), {})
        writer.write_vocabulary([b"late"])
    store = TokenStore(writer.path)
    assert VOCABULARY not in list(store.committed_files())
    assert store.vocabulary() == [b"late"]


def test_siblings(tmp_path: Path) -> None:
    train = write_tokens(tmp_path, CHUNK)
    assert sibling(train.recipe, "validation") == token_recipe("validation")
    assert sibling(sibling(train.recipe, "validation"), "train") == train.recipe
    rows = write_activations(tmp_path, torch.ones(CHUNK, 3))
    assert sibling(rows.recipe, "validation")["tokens"] == token_recipe("validation")
    assert train.path.parent == tmp_path / "tokens"
