"""Top contexts against brute force, and the alignment of tokens with the rows that fired."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_rows import BEGIN, D, Readout, Stores, T, build
from torch import Tensor, nn

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.interpret.best import Best, random_scores
from sae.pipeline.interpret.examples import Example, Feature, Features
from sae.pipeline.interpret.features import FeaturesConfig, records
from sae.pipeline.interpret.gather import gather
from sae.pipeline.interpret.statistics import expect_latents
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Latents, create, parse


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return build(tmp_path_factory.mktemp("small"), 40)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """More rows than the first window holds."""
    stores = build(tmp_path_factory.mktemp("large"), 700, codec_text="int8", seed=1)
    assert len(stores[1].manifest.windows) == 2
    return stores


def find(stores: Stores, sae: Any = None, **settings: Any) -> Features:
    tokens, store = stores
    return described(sae or Readout(), Dataset.of(store), tokens, FeaturesConfig(**settings))


def described(sae: Any, dataset: Dataset, tokens: TokenStore, config: FeaturesConfig) -> Features:
    return records(gather(sae, dataset, tokens, config, Silent()), dataset, config)


def examples(feature: Feature) -> Iterator[Example]:
    yield from feature.top
    for band in feature.bands:
        yield from band.examples


def brute_force(stores: Stores, latent: int, n: int, rows: int | None = None) -> list[tuple[float, int]]:
    """(value, position) of the n largest firings, the best of each document only."""
    tokens, store = stores
    rows = store.n_rows if rows is None else rows
    values = store.rows(0, rows)[:, latent].relu().tolist()
    documents = tokens.document_ids(0, tokens.n_contexts).reshape(-1)
    best: dict[int, tuple[float, int]] = {}
    for value, position in zip(values, store.positions(0, rows).tolist(), strict=True):
        document = int(documents[position])
        if value > 0 and (document not in best or (-value, position) < (-best[document][0], best[document][1])):
            best[document] = (value, position)
    return sorted(best.values(), key=lambda one: (-one[0], one[1]))[:n]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_streaming_equals_brute_force(seed: int, n: int, batches: int, one_per_document: bool) -> None:
    random = np.random.default_rng(seed)
    size = 120
    latent, document = random.integers(0, 3, size), random.integers(0, 8, size)
    value = random.integers(1, 6, size).astype(np.float32)
    position = random.permutation(size)
    table = Best(4, n, one_per_document=one_per_document)
    for part in np.array_split(random.permutation(size), batches):
        columns = latent, value.astype(np.int64), value, position, document
        table.update(*(torch.from_numpy(column[part]) for column in columns))
    for j in range(4):
        found = sorted(
            (-float(value[i]), int(position[i]), int(document[i])) for i in range(size) if latent[i] == j
        )  # fmt: skip
        if one_per_document:
            found = [one for i, one in enumerate(found) if one[2] not in {earlier[2] for earlier in found[:i]}]
        assert table.of(j) == [(-v, p, d) for v, p, d in found[:n]]


@pytest.mark.parametrize("sparse", [False, True])
def test_top_contexts_of_a_store_with_several_windows(large: Stores, sparse: bool) -> None:
    found = find(large, Readout(sparse=sparse), latents=range(1, D), top=5)
    for feature in found.features:
        expected = brute_force(large, feature.latent, 5)
        assert [e.position for e in feature.top] == [position for _, position in expected]
        assert [e.value for e in feature.top] == pytest.approx([value for value, _ in expected], rel=1e-5)
        assert len({e.document for e in feature.top}) == 5


def test_every_value_stands_on_its_token(small: Stores) -> None:
    """A latent fires on its own token id and nowhere else; tokens that are no rows are None, not 0."""
    tokens, store = small
    text = tokens.contexts(0, tokens.n_contexts).reshape(-1)
    documents = tokens.document_ids(0, tokens.n_contexts).reshape(-1)
    values = dict(zip(store.positions(0, store.n_rows).tolist(), store.rows(0, store.n_rows).tolist(), strict=True))
    found = find(small, latents=range(1, D), before=6, after=3)
    unseen = 0
    for feature in found.features:
        assert feature.top and feature.bands
        for example in examples(feature):
            assert example.tokens[example.peak] == feature.latent
            assert example.activations[example.peak] == example.value > 0
            assert example.document == documents[example.position]
            first = example.position - example.peak
            assert first // T == example.position // T == (first + len(example.tokens) - 1) // T
            assert example.peak == min(6, example.position % T)
            for place, token, value in zip(range(first, first + 99), example.tokens, example.activations, strict=False):
                assert token == text[place]
                if place in values:
                    assert value == (pytest.approx(values[place][feature.latent]) if token == feature.latent else 0)
                else:
                    assert value is None and (token == BEGIN or place % T == 0)
                    unseen += 1
    assert unseen


def test_statistics(small: Stores) -> None:
    _, store = small
    rows = store.rows(0, store.n_rows).relu().double()
    found = find(small, latents=range(D))
    assert (found.rows, found.d_sae, found.live) == (store.n_rows, D, D - 1)
    for feature in found.features[1:]:
        column = rows[:, feature.latent]
        fired = int((column > 0).sum())
        assert feature.fired == fired == sum(one.count for one in feature.histogram)
        assert feature.density == pytest.approx(fired / store.n_rows, rel=1e-5)
        assert feature.max == column.max() == feature.top[0].value
        assert feature.mean == pytest.approx(column.sum().item() / fired, rel=1e-5)
        assert feature.frequent[0].token == feature.latent and feature.frequent[0].count == feature.sampled
        for one in feature.histogram:
            assert int(((column >= one.low) & (column < one.high)).sum()) == one.count


class Signed(Readout):
    """The largest four by magnitude, with their sign, as AbsTopK has them; what is negative is so by this."""

    def __init__(self, flip: bool) -> None:
        super().__init__(D)
        self.flip = flip

    def encode(self, x: Tensor) -> Latents:
        """Readout's latents; those of even number negative."""
        dense = super().encode(x).dense()
        if self.flip:
            dense = dense * torch.where(torch.arange(D) % 2 == 0, -1, 1)
        indices = dense.abs().topk(4, dim=1).indices
        return Latents.of_rows(dense.gather(1, indices), indices, D)


def test_strength_is_magnitude_whatever_the_sign(large: Stores) -> None:
    """A dictionary whose latents fire with either sign shows the same contexts as one without signs, and the signs."""
    plain, signed = (find(large, Signed(flip), count=100, top=5, sample=256) for flip in (False, True))
    assert sum(feature.latent % 2 == 0 and bool(feature.top) for feature in signed.features) > 3
    for one, other in zip(plain.features, signed.features, strict=True):
        sign = -1 if other.latent % 2 == 0 else 1
        for was, now in zip(examples(one), examples(other), strict=True):
            assert (now.position, now.value) == (was.position, sign * was.value)
            assert now.activations == [value and sign * value for value in was.activations]
        assert other.model_copy(update={"top": [], "bands": []}) == one.model_copy(update={"top": [], "bands": []})


def test_a_latent_of_both_signs(large: Stores) -> None:
    """No firing is missing from what is counted, and the strongest of either sign come first."""
    _, store = large
    rows = store.rows(0, store.n_rows)
    values = torch.where(torch.arange(store.n_rows)[:, None] % 2 == 0, rows, -rows) * (rows > 0)
    by_row = {row.numpy().tobytes(): value for row, value in zip(rows, values, strict=True)}

    class Both:
        d_sae = D

        def encode(self, x: Tensor) -> Latents:
            return Latents.of_dense(torch.stack([by_row[row.numpy().tobytes()] for row in x]))

    for feature in find(large, Both(), latents=range(1, D), top=6).features:
        column = values[:, feature.latent]
        assert feature.fired == int((column != 0).sum()) == sum(one.count for one in feature.histogram)
        assert feature.max == abs(feature.top[0].value) == pytest.approx(column.abs().max().item(), rel=1e-5)
        assert feature.mean == pytest.approx(column.abs().sum().item() / feature.fired, rel=1e-5)
        strengths = [abs(example.value) for example in feature.top]
        assert strengths == sorted(strengths, reverse=True)
    shown = [e.value for f in find(large, Both(), latents=range(1, D), top=6).features for e in examples(f)]
    assert min(shown) < 0 < max(shown)


def test_a_latent_that_never_fires(small: Stores) -> None:
    (feature,) = find(small, latents=[BEGIN]).features
    assert (feature.fired, feature.max, feature.mean, feature.density) == (0, 0, 0, 0)
    assert not (feature.top or feature.bands or feature.histogram or feature.frequent)


def test_weaker_contexts_come_from_their_quarter(large: Stores) -> None:
    _, store = large
    values = store.rows(0, store.n_rows).relu().numpy()
    found = find(large, latents=range(1, D), sample=256, weaker=3)
    for feature in found.features:
        fired = np.sort(values[:, feature.latent][values[:, feature.latent] > 0])
        assert [(band.low, band.high) for band in feature.bands] == [(0.75, 1), (0.5, 0.75), (0.25, 0.5), (0, 0.25)]
        documents = [example.document for example in examples(feature)]
        assert len(documents) == len(set(documents))
        for band in feature.bands:
            assert len(band.examples) == 3
            low, high = np.quantile(fired, [max(0, band.low - 0.12), min(1, band.high + 0.12)])
            for example in band.examples:
                assert low - 1e-3 <= example.value <= high + 1e-3


def test_the_sample_is_uniform_and_knows_no_order() -> None:
    latent, position = np.repeat(np.arange(50), 400), np.tile(np.arange(400) * 7, 50)
    scores = random_scores(latent, position, 3)
    assert np.histogram(scores, 10, (0, 1))[0] == pytest.approx(2000, abs=200)
    best = scores.reshape(50, 400).argmax(1)
    assert len(set(best.tolist())) > 30  # latents draw apart from each other
    assert not np.array_equal(scores, random_scores(latent, position, 4))
    shuffled = np.random.default_rng(0).permutation(len(latent))
    assert np.array_equal(random_scores(latent[shuffled], position[shuffled], 3), scores[shuffled])


def test_which_latents_are_shown(large: Stores) -> None:
    found = find(large, Readout(D + 3), count=8)
    strongest = [f.latent for f in found.features if f.group == "strongest"]
    sampled = [f for f in found.features if f.group == "sampled"]
    largest = large[1].rows(0, large[1].n_rows).amax(0)
    assert strongest == sorted(range(D), key=lambda j: (-largest[j], j))[:2]
    assert len(sampled) == 6 and all(f.fired for f in sampled)
    assert [f.density for f in sampled] == sorted((f.density for f in sampled), reverse=True)
    everything = find(large, count=100)
    assert len({f.latent for f in everything.features}) == len(everything.features) == everything.live


def test_rows_are_a_prefix(large: Stores) -> None:
    found = find(large, latents=[3], rows=5000, top=4)
    assert found.rows == 5000
    assert [e.position for e in found.features[0].top] == [p for _, p in brute_force(large, 3, 4, rows=5000)]
    for example in found.features[0].top:  # but the text around them is looked up in the whole store
        around = zip(example.tokens, example.activations, strict=True)
        assert all(value is not None for token, value in list(around)[1:] if token != BEGIN)


def test_rows_that_training_left_out_are_not_looked_at(small: Stores) -> None:
    """They are no firings, and around others they stand like tokens that never became rows."""
    tokens, store = small
    largest = float(np.quantile(store.norms(0, store.n_rows), 0.8))
    kept = {*store.positions(0, store.n_rows)[store.norms(0, store.n_rows) <= largest].tolist()}
    config = FeaturesConfig(latents=tuple(range(1, D)), top=6)
    found = described(Readout(), Dataset.of(store).kept_up_to((largest,)), tokens, config)
    assert found.rows == len(kept) < store.n_rows
    dense = Readout().encode(store.rows(0, store.n_rows)[torch.from_numpy(store.norms(0, store.n_rows) <= largest)])
    assert [f.fired for f in found.features] == dense.fired()[1:].tolist()
    for one in (one for feature in found.features for one in examples(feature)):
        first = one.position - one.peak
        assert [value is not None for value in one.activations] == [first + i in kept for i in range(len(one.tokens))]


def test_padding_is_not_text(tmp_path: Path) -> None:
    stores = build(tmp_path, 30, lengths=True)
    lengths = stores[0].lengths(0, 30)
    for feature in find(stores, latents=range(1, D), after=T).features:
        for example in examples(feature):
            context, place = divmod(example.position, T)
            assert place - example.peak + len(example.tokens) == lengths[context]


def test_same_input_same_records(small: Stores) -> None:
    first, second = find(small), find(small)
    dumped = json.dumps(first.model_dump(mode="json"), allow_nan=False)
    assert dumped == json.dumps(second.model_dump(mode="json"))
    assert Features.model_validate(json.loads(dumped)) == first
    assert first.bytes_of(3) == b"<3>"
    assert find(small, seed=1) != first


def test_a_trained_kind_of_dictionary(small: Stores) -> None:
    """The package's own TopK, which only ever shows what it keeps."""
    sae = create(parse({"arch": "topk", "d_sae": 16, "k": 3}), D)
    sae.train()
    found = find(small, sae, count=16)
    assert sae.training
    rows = small[1].rows(0, small[1].n_rows)
    fired = sae.encode(rows).fired()
    assert found.live == int((fired > 0).sum()) and all(f.fired == fired[f.latent] for f in found.features)


def test_inference_behaviour_for_the_duration(small: Stores) -> None:
    class Watching(nn.Module):
        d_sae = D

        def encode(self, x: Tensor) -> Latents:
            assert not self.training and not torch.is_grad_enabled()
            return Readout().encode(x)

    watching = Watching()
    find(small, watching, latents=[1])
    assert watching.training


def test_refusals(small: Stores, large: Stores) -> None:
    with pytest.raises(SaeError, match=r"latents = 12, -1: the dictionary has latents 0 to 11"):
        expect_latents([3, 12, -1], 12)
    with pytest.raises(SaeError, match=r"latents = 12: the dictionary has"):
        find(small, latents=[3, 12])
    with pytest.raises(SaeError, match="not the tokens"):
        find((small[0], large[1]))
    with pytest.raises(ValueError, match="2 tokens, 1 activations"):
        Example(position=0, document=0, value=1, peak=0, tokens=[1, 2], activations=[1.0])
