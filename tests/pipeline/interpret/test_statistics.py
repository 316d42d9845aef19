"""What is gathered about latents in a stream against brute force over all of it, and the file it is kept in."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_runs import planted_rows
from support.small_runs import settings as training
from support.small_stores import extend
from support.token_rows import D, Readout, Stores, T, build
from support.watching import watched
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sae.cache.activations import ActivationWriter
from sae.cache.disk.tensors import read_tensors, write_tensors
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import STATISTICS, Run
from sae.cache.store.codecs import codec, codec_recipe
from sae.pipeline.interpret import survey as surveying
from sae.pipeline.interpret import together as module
from sae.pipeline.interpret.contexts import chosen, with_text
from sae.pipeline.interpret.directions import lens, nearest
from sae.pipeline.interpret.examples import BINS, EDGES
from sae.pipeline.interpret.gather import StatisticsConfig, gather
from sae.pipeline.interpret.stage import statistics_of
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.interpret.survey import WINDOWS, Survey, boxes, survey
from sae.pipeline.interpret.together import Partners, Together
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Latents, placement
from sae.pipeline.train.stage import open_run, train


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return build(tmp_path_factory.mktemp("small"), 40)


class Mixed(Readout):
    """Latent j reads dimensions j and j + 1, so that latents fire together and on several tokens."""

    W_dec = torch.nn.functional.normalize(torch.eye(D) + 0.5 * torch.eye(D).roll(1, 1), dim=1)

    def encode(self, x: Tensor) -> Latents:
        return Latents.of_dense((x + x.roll(-1, 1) - 1).relu())


def gathered(stores: Stores, sae: Any, **settings: Any) -> Statistics:
    tokens, store = stores
    return gather(sae, Dataset.of(store), tokens, StatisticsConfig(**settings), Silent())


def partners_by_counting(active: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latent, Jaccard index and phi of each latent's partners, from which latents are active: bool [rows, d_sae]."""
    m = active.shape[1]
    latent, jaccard, phi = np.full((m, n), -1), np.zeros((m, n)), np.zeros((m, n))
    centred = active - active.mean(0)
    with np.errstate(all="ignore"):
        correlation = centred.T @ centred / np.sqrt(np.outer(*[np.square(centred).sum(0)] * 2))
    for j in range(m):
        both = {i: int((active[:, i] & active[:, j]).sum()) for i in range(m) if i != j}
        found = [(-both[i] / int((active[:, i] | active[:, j]).sum()), i) for i in both if both[i]]
        for rank, (index, i) in enumerate(sorted(found)[:n]):
            latent[j, rank], jaccard[j, rank], phi[j, rank] = i, -index, correlation[i, j]
    return latent, jaccard, phi


def expect_partners(found: Partners, active: np.ndarray) -> None:
    latent, jaccard, phi = partners_by_counting(active, found.latent.shape[1])
    assert np.array_equal(found.latent, latent)
    assert found.jaccard == pytest.approx(jaccard, rel=1e-6)
    assert found.phi == pytest.approx(phi, rel=1e-5, abs=1e-7, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4), st.sampled_from((0.02, 0.3, 0.9)))
def test_a_stream_of_codes_equals_brute_force(seed: int, batches: int, n: int, share: float) -> None:
    random = np.random.default_rng(seed)
    rows, m = int(random.integers(1, 90)), int(random.integers(1, 7))
    values = (random.random((rows, m)) < share) * random.integers(-6, 7, (rows, m)).astype(np.float32)
    position, document = random.permutation(1000)[:rows], random.integers(0, 5, rows)
    seen = Survey(m, rows=rows, top=n, sample=max(4, n), seed=seed)
    for part in np.array_split(np.arange(rows), batches):
        seen.add(Latents.of_dense(torch.from_numpy(values[part])), part, position[part], document[part])
    active = values != 0
    edges = np.searchsorted(np.arange(rows) * WINDOWS // rows, np.arange(WINDOWS + 1))
    for window in range(WINDOWS):
        inside = active[edges[window] : edges[window + 1]]
        assert seen.window_rows[window] == len(inside)
        assert np.array_equal(seen.windows[window], inside.sum(0))
    assert seen.total == pytest.approx(np.abs(values).sum(0))
    assert np.array_equal(seen.histogram.sum(1), active.sum(0))
    for j in range(m):
        firings = [(-abs(float(values[i, j])), int(position[i]), int(document[i])) for i in active[:, j].nonzero()[0]]
        best = [one for i, one in enumerate(sorted(firings)) if one[2] not in {o[2] for o in sorted(firings)[:i]}]
        assert [(-abs(v), p, d) for v, p, d in seen.top.of(j)] == best[:n]
        assert {p for _, p, _ in seen.sample.of(j)} <= {p for _, p, _ in firings}
        assert len(seen.sample.of(j)) == min(max(4, n), len(firings))
    expect_partners(seen.together.partners(n), active)


def test_a_sample_of_rows_is_the_same_in_any_order_and_tells_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many rows for memory: what is left is a uniform share of them, and its figures are near the whole's."""
    monkeypatch.setattr(module, "MOST", np.array([1 << 20, 6000, 1 << 29]))
    random = np.random.default_rng(0)
    active = random.random((4000, 6)) < np.array([0.5, 0.5, 0.2, 0.1, 0.05, 0.3])
    active[:, 1] = active[:, 0] & (random.random(4000) < 0.8)
    found = []
    for order in (np.arange(4000), random.permutation(4000)):
        together = Together(6, seed=3)
        for part in np.array_split(order, 9):
            rows, latents = torch.from_numpy(active[part]).nonzero(as_tuple=True)
            together.add(rows, latents, part)
        found.append(together.partners(3))
    first, other = found
    assert all(np.array_equal(a, b) for a, b in zip(first[:4], other[:4], strict=True))
    assert first.seen == 4000 and 1000 < first.rows < 3000
    latent, jaccard, _ = partners_by_counting(active, 3)
    assert first.latent[0, 0] == latent[0, 0] == 1
    error = (jaccard[0, 0] * (1 - jaccard[0, 0]) / first.union[0, 0]) ** 0.5
    assert 0 < abs(first.jaccard[0, 0] - jaccard[0, 0]) < 4 * error


def test_many_blocks_of_pairs_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    active = np.random.default_rng(1).random((200, 11)) < 0.3
    together = Together(11, seed=0)
    row, latent = torch.from_numpy(active).nonzero(as_tuple=True)
    together.add(row, latent, np.arange(200))
    monkeypatch.setattr(module, "BLOCK", 40)
    expect_partners(together.partners(4), active)


def test_all_latents_of_a_store(small: Stores) -> None:
    tokens, store = small
    found = gathered(small, Mixed(), rows="all", before=2, after=1, sample=512, weaker=1, top=4)
    with torch.no_grad():
        values = Mixed().encode(store.rows(0, store.n_rows)).dense().numpy()
    text = tokens.contexts(0, tokens.n_contexts).reshape(-1)
    positions = store.positions(0, store.n_rows)
    row_of = {int(position): row for row, position in enumerate(positions)}
    assert np.array_equal(found.fired, (values > 0).sum(0)) and found.rows == store.n_rows
    assert np.array_equal(found.max, values.max(0))
    assert found.mean == pytest.approx(values.sum(0) / np.maximum((values > 0).sum(0), 1))
    expect_partners(found.partners, values > 0)
    for latent in range(D):
        feature = found.feature(latent)
        common = Counter(text[positions[values[:, latent] > 0]].tolist())
        assert {one.token: one.count for one in feature.frequent} == dict(
            sorted(common.items(), key=lambda item: (-item[1], item[0]))[:6]
        )
        shown = [*feature.top, *(one for band in feature.bands for one in band.examples)]
        assert len({one.document for one in shown}) == len(shown)
        for one in shown:
            first = one.position - one.peak
            assert one.tokens == text[first : first + len(one.tokens)].tolist() and one.position // T == first // T
            for place, value in enumerate(one.activations, first):
                row = row_of.get(place)
                assert value is None if row is None else value == pytest.approx(float(values[row, latent]), rel=1e-5)
    assert found.table()["token"][3] == found.feature(3).frequent[0].token
    assert len(found.stability()) == WINDOWS - 1 and all(-1 <= one.pearson <= 1 for one in found.stability())


OF_THE_HOST = {"codecs.py lift_fresh", "activations.py _local_scalar_dense", "contexts.py lift_fresh"}
"""What asks for numbers that are on the CPU, whatever computes."""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("sparse", [False, True])
def test_a_card_counts_what_the_host_counts(small: Stores, sparse: bool) -> None:
    """To the number, where a dictionary only looks: sums of magnitudes are the only thing that is rounded."""
    tokens, store = small
    here, there = (
        gather(Readout(sparse=sparse), Dataset.of(store), tokens, StatisticsConfig(), Silent(), device=device)
        for device in ("cpu", "cuda")
    )
    assert there.total == pytest.approx(here.total, rel=1e-12)
    for name in ("windows", "window_rows", "max", "histogram", "contexts", "frequent", "partners"):
        np.testing.assert_equal(getattr(there, name), getattr(here, name), err_msg=name)


@pytest.mark.parametrize("sae", [Mixed(), Readout(sparse=True)], ids=["dense", "sparse"])
def test_a_device_that_runs_ahead_is_waited_for_when_enough_is_held(
    small: Stores, monkeypatch: pytest.MonkeyPatch, sae: Readout
) -> None:
    """And not from batch to batch; what is found is what the host finds."""
    tokens, store = small
    expected, dataset = gathered(small, sae, rows="all", before=2, after=1), Dataset.of(store)
    monkeypatch.setattr(placement, "HOSTS", set())
    monkeypatch.setattr(surveying, "BATCH_ROWS", 64)
    monkeypatch.setattr(surveying, "HELD", 5 * 64 * D * 4)
    settle, added, settled = Survey.settle, Survey.add, []
    batches: list[int] = []

    def settling(seen: Survey) -> None:
        settled.append(len(batches))
        with _disable_current_modes():
            settle(seen)

    def adding(seen: Survey, *args: Any) -> None:
        batches.append(len(args[1]))
        added(seen, *args)

    monkeypatch.setattr(Survey, "settle", settling)
    monkeypatch.setattr(Survey, "add", adding)
    seen = Survey(D, rows=store.n_rows, top=8, sample=64, seed=0)
    cpu = torch.device("cpu")
    reading = watched(lambda: survey(sae, dataset, tokens, store.n_rows, seen, Silent(), cpu))
    assert sum(batches) == store.n_rows and settled == [*range(5, len(batches) + 1, 5), len(batches)]
    assert not {*reading.asked} - OF_THE_HOST, reading.asked
    assert np.array_equal(seen.windows, expected.windows) and np.array_equal(seen.histogram, expected.histogram)
    assert seen.total == pytest.approx(expected.total)
    shown = chosen(seen, 2)
    looking = watched(lambda: with_text(shown, sae, dataset, tokens, (2, 1), Silent(), cpu))
    assert not {*looking.asked} - OF_THE_HOST, looking.asked
    found = with_text(shown, sae, dataset, tokens, (2, 1), Silent(), cpu)
    assert all(np.array_equal(*pair, equal_nan=True) for pair in zip(found, expected.contexts, strict=True))
    partners = seen.together.partners(8)
    assert np.array_equal(partners.latent, expected.partners.latent)
    assert np.array_equal(partners.union, expected.partners.union) and partners.rows == expected.partners.rows


def test_bins_begin_at_numbers_that_are_fixed() -> None:
    """At each edge, just below it, just above it, and beyond all of them."""
    edges = np.array(EDGES, np.float32)
    beside = [np.nextafter(edges, np.float32(to)) for to in (0, np.inf)]
    values = np.concatenate([edges, *beside, np.array([1e-45, 1e-38, 3e38, np.inf], np.float32)])
    expected = np.searchsorted(edges[1:-1], values, side="right")
    assert np.array_equal(boxes(torch.from_numpy(values).view(torch.int32).long()), expected)
    assert {*expected.tolist()} == {*range(BINS)}


def test_directions_and_the_tokens_they_make_likelier() -> None:
    random = torch.Generator().manual_seed(0)
    directions, unembedding = torch.randn(9, 5, generator=random), torch.randn(20, 5, generator=random)
    cosines = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=2).fill_diagonal_(-9)
    found = nearest(directions, 3)
    assert np.array_equal(found.latent, cosines.topk(3).indices.numpy())
    assert found.cosine == pytest.approx(cosines.topk(3).values.numpy(), abs=1e-6)
    assert nearest(directions[:2], 3).latent.tolist() == [[1, -1, -1], [0, -1, -1]]
    read = lens(directions, unembedding, 4)
    logits = directions @ unembedding.T
    assert np.array_equal(read.up, logits.topk(4).indices) and np.array_equal(read.down, (-logits).topk(4).indices)
    assert read.down_weight == pytest.approx(logits.topk(4, largest=False).values.numpy(), abs=1e-6)


def same(one: Statistics, other: Statistics) -> bool:
    """Whether all arrays are equal, and everything else."""

    def parts(found: Statistics) -> dict[str, Any]:
        return {name: part for name, part in vars(found).items() if name not in ("rows", "fired")}

    return repr(parts(one)) == repr(parts(other)) and np.array_equal(one.contexts.tokens, other.contexts.tokens)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    root = tmp_path_factory.mktemp("planted")
    recipe = {"source": {"source": "synthetic"}, "split": "train", "d": 16, "codec": codec_recipe(codec("float32"))}
    with ActivationWriter(root, "planted", recipe) as writer:
        extend(writer, planted_rows(1024), ended=True)
    dataset = Dataset.of(writer.store)
    run = open_run(training(steps=4, log_every=2, checkpoint_every=4), dataset, root / "runs", "one", resume=False)
    train([run], dataset, Silent())
    return run, root


def test_a_run_is_gathered_once(run: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the folder holds is read, unless it is of other settings; rows without text have no contexts."""
    asked = StatisticsConfig(rows=500, top=2)
    first = statistics_of(*run, Silent(), config=asked)
    assert first.rows == 500 and not first.vocabulary and not first.contexts.tokens.size and first.of["begin"] is None
    assert first.feature(int(first.fired.argmax())).top[0].tokens == []
    written = (run[0].path / STATISTICS).read_bytes()

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("gathered again")

    with monkeypatch.context() as patch:
        patch.setattr("sae.pipeline.interpret.stage.gather", refused)
        for config in (asked, None):
            assert same(statistics_of(*run, Silent(), config=config), first)
        with pytest.raises(AssertionError, match="again"):
            statistics_of(*run, Silent(), config=StatisticsConfig(rows=501, top=2))
    assert (run[0].path / STATISTICS).read_bytes() == written
    assert statistics_of(*run, Silent(), config=StatisticsConfig(rows=501, top=2)).rows == 501
    assert not run[0].check()


def test_statistics_survive_the_file(small: Stores, run: tuple[Run, Path]) -> None:
    made = gathered(small, Mixed(), before=3, after=2).said_of({"dictionary": "x"})
    made = replace(made.with_lens(lens(Mixed.W_dec, torch.eye(D), 3)), nearest=nearest(Mixed.W_dec, 3))
    made.write(run[0])
    back = Statistics.read(run[0])
    assert back is not None and back.feature(4) == made.feature(4) and same(back, made)
    assert back.feature(4).promoted and back.feature(4).nearest and back.text(3) == b"<3>"
    with pytest.raises(SaeError, match="latents 0 to 11"):
        back.feature(D)


def _short(tensors: dict[str, Tensor]) -> None:
    tensors["total"] = tensors["total"][:-1]


def _gone(tensors: dict[str, Tensor]) -> None:
    del tensors["contexts.peak"]


def _beyond(tensors: dict[str, Tensor]) -> None:
    tensors["partners.latent"][0] = D


def _backwards(tensors: dict[str, Tensor]) -> None:
    tensors["contexts.start"] = tensors["contexts.start"].flip(0)


@pytest.mark.parametrize("change", [_short, _gone, _beyond, _backwards])
def test_what_does_not_fit_together_is_damage(small: Stores, run: tuple[Run, Path], change: Any) -> None:
    """A file with a right checksum and a wrong content, which nobody but a stranger writes."""
    gathered(small, Mixed(), before=3, after=2).write(run[0])
    tensors, header = read_tensors(run[0].path / STATISTICS)
    change(tensors)
    write_tensors(run[0].path, STATISTICS, tensors, {"of": header["of"]})
    with pytest.raises(DamagedStore, match=r"statistics.*remove it"):
        Statistics.read(run[0])
    write_tensors(run[0].path, STATISTICS, tensors, {"of": json.dumps([])})
    with pytest.raises(DamagedStore, match=r"statistics.*remove it"):
        statistics_of(*run, Silent())


def test_a_part_without_rows_has_no_rate(small: Stores) -> None:
    made = gathered(small, Mixed(), rows=3)
    assert made.rates.shape == (3, D) and len(made.stability()) == 2
    assert replace(made).feature(1).rates == [float(f"{rate:.6g}") for rate in made.rates[:, 1]]
