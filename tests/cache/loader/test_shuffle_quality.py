"""Shuffle quality: against what batches of planted document effects do, and against orders known to mix badly."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_stores import CHUNK, CONTEXT, heavy_rows, shrunk, write_activations, write_tokens

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.loader import Loader
from sae.cache.loader.shuffle_quality import mixing, mixing_of
from sae.cache.store.manifest import Windows
from sae.cache.tokens import TokenStore

BATCH = 256


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ActivationStore, TokenStore]]:
    """65,536 rows, all tokens of 8,192 contexts; a document has 37 tokens."""
    root = tmp_path_factory.mktemp("mixing")
    with shrunk() as patch:
        patch.setattr("sae.cache.activations.CHUNK_ROWS", 256)
        patch.setattr("sae.cache.activations.WINDOWS", Windows(256, 4096))
        n = 16 * 4096
        store = write_activations(root, torch.arange(n)[:, None].float(), "float32")
        yield store, write_tokens(root, n // CONTEXT)


def test_the_loader_mixes(stores: tuple[ActivationStore, TokenStore]) -> None:
    found = mixing(*stores, batch=BATCH, open_chunks=32)
    assert (found.unit, found.rows, found.batch) == ("document", 65_536, BATCH)
    assert 0.9 < found.variance_ratio <= 1.07
    assert abs(found.correlation) < 0.1
    assert found.distinct > 0.9 * BATCH
    assert found.most < 4


def test_fewer_open_chunks_mix_less(stores: tuple[ActivationStore, TokenStore]) -> None:
    ratios = [mixing(*stores, batch=BATCH, open_chunks=n).variance_ratio for n in (32, 8, 2)]
    assert ratios == sorted(ratios)
    assert ratios[-1] > 1.3


def test_the_figures_are_those_of_planted_effects(stores: tuple[ActivationStore, TokenStore]) -> None:
    """Rows made of document effects and noise, batched by the loader itself: the same ratio, but for chance."""
    store, tokens = stores
    random = np.random.default_rng(0)
    document = tokens.document_ids(0, tokens.n_contexts).reshape(-1)
    effects = random.standard_normal((document.max() + 1, 200))
    with Loader(store, BATCH, open_chunks=2, epochs=1) as loader:
        batches = [one[:, 0].long().numpy() for one in loader]
    means = np.stack([0.3**0.5 * effects[document[rows]].mean(axis=0) for rows in batches])
    means += 0.7**0.5 * random.standard_normal(means.shape) / BATCH**0.5
    means -= 0.3**0.5 * effects[document].mean(axis=0)
    ratio = (means**2).mean() * BATCH
    correlation = (means[1:] * means[:-1]).mean() / (means**2).mean()
    found = mixing(store, tokens, batch=BATCH, open_chunks=2)
    assert found.variance_ratio == pytest.approx(ratio, rel=0.05)
    assert found.correlation == pytest.approx(correlation, abs=0.05)
    distinct = [len(set(document[rows].tolist())) for rows in batches]
    most = [np.bincount(document[rows]).max() for rows in batches]
    assert found.distinct == pytest.approx(np.mean(distinct), rel=0.05)
    assert found.most == pytest.approx(np.mean(most), rel=0.1)


def test_without_the_token_store_contexts_stand_for_documents(stores: tuple[ActivationStore, TokenStore]) -> None:
    found = mixing(stores[0], batch=BATCH)
    assert found.unit == "context"
    assert found.as_json()["unit"] == "context"
    assert found.variance_ratio <= 1.07


def test_a_store_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with shrunk():
        store = write_activations(tmp_path, heavy_rows(2 * CHUNK, 3))
        with pytest.raises(SaeError, match="has 64 rows, a batch 4,096; harvest more"):
            mixing(store)
        assert mixing(store, batch=2 * CHUNK).batches == 1


def test_the_token_store_is_found_in_the_cache(stores: tuple[ActivationStore, TokenStore], tmp_path: Path) -> None:
    store, tokens = stores
    root = store.path.parent.parent
    assert mixing_of(root, store) == mixing(store, tokens)
    assert mixing_of(tmp_path, store).unit == "context"
    with pytest.raises(
        SaeError, match=f"shuffle_quality = True: {tokens.key} holds tokens; name a store of activations"
    ):
        mixing_of(root, tokens)
