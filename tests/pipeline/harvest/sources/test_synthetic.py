"""Rows of known features: what they are made of, that any range is the same, and the whole way of such a store."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import typer.main
import zarr
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import done, sae
from support.harvesting import synthesize
from support.killing import killed_after
from support.saes_kit import one_thread
from support.small_stores import CHUNK, few, files, shrunk

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Loader
from sae.cache.runs import Run
from sae.cache.store.manifest import MANIFEST
from sae.cache.upkeep.damage import inspect_damage, verify
from sae.configs import resolve
from sae.pipeline.commands.app import app
from sae.pipeline.commands.bars import Bars
from sae.pipeline.commands.cache_verify import mend
from sae.pipeline.harvest.sources import synthetic
from sae.pipeline.harvest.sources.synthetic import (
    HELD_OUT,
    GroundTruth,
    Groups,
    Independent,
    SyntheticConfig,
    SyntheticSource,
)
from sae.pipeline.metrics.recovery import Recovery
from sae.pipeline.metrics.similarity import chance
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import create
from sae.pipeline.saes.topk import TopKConfig
from sae.pipeline.worlds import features

SMALL = SyntheticConfig(d=12, features=31, presence=Groups(groups=4, active=3, decay=0.8), rows=1, validation_rows=1)
IID = SMALL.model_copy(update={"presence": Independent(probability=0.15)})
NOISY = SMALL.model_copy(update={"noise": 0.5})
RARE = SMALL.model_copy(update={"presence": Independent(probability=1e-4)})
N = 20_000


def grown(config: SyntheticConfig, root: Path, rows: int = 5 * CHUNK) -> dict[str, ActivationStore]:
    return synthesize(config.model_copy(update={"rows": rows}), root, Silent())


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, IID, RARE], ids=["groups", "iid", "rare"])
def test_rows_are_the_sums_they_say(config: SyntheticConfig) -> None:
    truth = GroundTruth(config)
    rows, made = truth.draw(0, N)
    dense = made.dense(31)
    torch.testing.assert_close(rows, dense @ truth.features, rtol=0, atol=1e-5)
    assert int((dense > 0).sum()) == len(made.value) and made.value.min() > 0 and made.value.max() <= 1
    assert np.mean(made.value) == pytest.approx(0.5, abs=5 / np.sqrt(12 * len(made.value)))
    torch.testing.assert_close(torch.linalg.vector_norm(truth.features, dim=1), torch.ones(31))


def test_a_row_has_distinct_members_of_one_group() -> None:
    """And every feature is used, also where the groups cannot be equal."""
    _, made = GroundTruth(SMALL).draw(0, N)
    members = made.feature.reshape(N, 3)
    group_of = np.repeat(np.arange(4), [8, 8, 8, 7])
    assert (group_of[members] == group_of[members[:, :1]]).all()
    assert all(len(set(row)) == 3 for row in members.tolist())
    assert set(members.flat) == set(range(31))
    picked = np.bincount(group_of[members[:, 0]], minlength=4) / N
    np.testing.assert_allclose(picked, 1 / 4, atol=5 * np.sqrt(3 / 16 / N))


def test_members_are_picked_by_their_rank() -> None:
    """The share of rows a member is in is that of drawing one after the other, without putting back."""
    weights = 0.8 ** np.arange(8)
    expected = np.zeros(8)
    for order in itertools.permutations(range(8), 3):
        left, probability = weights.sum(), 1.0
        for member in order:
            probability *= weights[member] / left
            left -= weights[member]
        expected[list(order)] += probability
    _, made = GroundTruth(SMALL).draw(0, 60_000)
    first = made.feature[made.feature < 8]
    rows = len(first) / 3
    found = np.bincount(first, minlength=8) / rows
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / rows))
    assert (np.diff(expected) < 0).all() and (np.diff(found) < 0).all()


def test_independent_features() -> None:
    """Every feature by itself: the shares of rows, and those of pairs, are those of coins."""
    _, made = GroundTruth(IID).draw(0, N)
    there = (made.dense(31) > 0).double()
    p = 0.15
    assert len(made.value) / N == pytest.approx(31 * p, abs=5 * np.sqrt(31 * p * (1 - p) / N))
    both = there.T @ there / N
    off = both[~torch.eye(31, dtype=torch.bool)]
    np.testing.assert_allclose(both.diagonal(), p, atol=5 * np.sqrt(p * (1 - p) / N))
    np.testing.assert_allclose(off, p * p, atol=5 * np.sqrt(p * p / N))


def test_noise_is_added_to_every_value() -> None:
    clean, made = GroundTruth(SMALL).draw(100, N)
    noisy, same = GroundTruth(NOISY).draw(100, N)
    assert np.array_equal(made.feature, same.feature) and np.array_equal(made.value, same.value)
    noise = noisy - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    assert abs(noise.mean().item()) < 5 * 0.5 / np.sqrt(noise.numel())
    kurtosis = (noise.double() ** 4).mean() / (noise.double() ** 2).mean() ** 2
    assert kurtosis.item() == pytest.approx(3, abs=0.1)  # a normal distribution's
    assert torch.corrcoef(noise.T).fill_diagonal_(0).abs().max() < 0.05


@pytest.mark.parametrize("config", [SMALL, IID, RARE, NOISY], ids=["groups", "iid", "rare", "noise"])
def test_any_range_is_the_same(config: SyntheticConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK", 64)
    truth = GroundTruth(config)
    every, made = truth.draw(0, 1000)

    @few
    @given(st.integers(0, 999), st.integers(1, 1000))
    def check(first: int, count: int) -> None:
        stop = min(first + count, 1000)
        rows, part = truth.draw(first, stop - first)
        assert torch.equal(rows, every[first:stop])
        assert all(np.array_equal(a, b) for a, b in zip(part, made.part(first, stop), strict=True))

    check()


def test_the_same_on_any_number_of_threads() -> None:
    truth = GroundTruth(SyntheticConfig())
    alone = truth.draw(0, 5000)[0]
    torch.set_num_threads(3)
    try:
        assert torch.equal(truth.draw(0, 5000)[0], alone)
    finally:
        torch.set_num_threads(1)


def test_blocks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sample takes many random numbers, fewer are drawn at once."""
    largest = 0
    uniform = features.uniform

    def watched(bits: np.random.PCG64, n: int) -> np.ndarray:
        nonlocal largest
        largest = max(largest, n)
        return uniform(bits, n)

    monkeypatch.setattr(features, "BLOCK_KEYS", 1 << 12)
    wide = GroundTruth(SyntheticConfig(d=2, features=1000, presence=Groups(groups=1, active=2)))
    monkeypatch.setattr(features, "uniform", watched)
    rows, made = wide.draw(50, 100)
    assert rows.shape == (100, 2) and len(made.value) == 200
    assert 1000 < largest <= 1 << 12


def test_what_the_seed_decides() -> None:
    one, other = GroundTruth(SMALL), GroundTruth(SMALL.model_copy(update={"seed": 1}))
    assert torch.equal(one.features, GroundTruth(SMALL).features)
    assert torch.equal(one.draw(7, 9)[0], GroundTruth(SMALL).draw(7, 9)[0])
    assert not torch.equal(one.features, other.features)
    assert torch.equal(one.features, GroundTruth(IID).features), "one truth, sampled in several ways"
    cosines = (one.features @ other.features.T).flatten()
    assert abs(cosines.mean().item()) < 5 / np.sqrt(12 * len(cosines))
    assert cosines.square().mean().item() == pytest.approx(1 / 12, rel=0.2)


def test_these_samples_for_ever() -> None:
    """Stores are named by their settings, so these must not come to mean other rows (or `GENERATOR` is raised)."""
    assert synthetic.GENERATOR == 1
    rows, made = GroundTruth(SMALL).draw(5000, 2)
    assert made.feature.tolist() == [17, 16, 18, 21, 20, 18]
    np.testing.assert_allclose(made.value[:3], [0.465731, 0.526911, 0.683965], atol=1e-6)
    np.testing.assert_allclose(rows[1, :4], [-0.269537, -0.250326, -0.194336, -0.101883], atol=1e-5)
    _, made = GroundTruth(IID).draw(HELD_OUT, 3)
    assert made.feature.tolist() == [3, 4, 7, 26, 11, 14, 22, 24, 27, 9, 25, 26]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("presence.active=50", "synthesize: active 50: the smallest of 12 groups of 512 features has 42; take fewer"),
        ("presence.groups=600", "synthesize: active 32: the smallest of 600 groups of 512 features has 0; take fewer"),
        ("presence.decay=0", "synthesize.presence.decay = 0: input should be greater than 0"),
        ("presence.groups=0", "synthesize.presence.groups = 0: input should be greater than or equal to 1"),
        ("presence.probability=0.1", "synthesize.presence.probability: mode groups has no probability; it is of iid"),
        ("presence={mode: iid, active: 3}", "synthesize.presence.active: mode iid has no active; it is of groups"),
        ("presence={mode: iid, probability: 1}", "synthesize.presence.probability = 1: input should be less than 1"),
        ("presence.mode=other", "synthesize.presence.mode = other: unknown mode; there are groups, iid"),
        ("noise=-1", "synthesize.noise = -1: input should be greater than or equal to 0"),
        ("noise=.nan", "synthesize.noise = nan: input should be"),
        ("d=0", "synthesize.d = 0: input should be greater than or equal to 1"),
        ("rows=0", "synthesize.rows = 0: input should be greater than or equal to 1"),
        ("feature=3", "synthesize.feature: unknown key; did you mean 'features'?"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(SaeError, match=re.escape(message)) as caught:
        resolve("synthesize", SyntheticConfig, overrides=[f"synthesize.{override}"])
    assert "\n" not in str(caught.value)


def test_a_source_of_another_version(tmp_path: Path) -> None:
    stored = SimpleNamespace(
        recipe={"source": {"source": "synthetic", **SMALL.recipe(), "generator": 2}}, split="train"
    )
    with pytest.raises(SaeError, match="source synthetic 2: unknown to this version"):
        SyntheticSource.of_store(cast(ActivationStore, stored), Origins(tmp_path))


def test_the_truth_of_a_recipe() -> None:
    stored = SimpleNamespace(
        recipe=json.loads(json.dumps({"source": {"source": "synthetic", **NOISY.recipe()}})), split="validation"
    )
    source = SyntheticSource.of_store(cast(ActivationStore, stored), Origins(Path()))
    assert source.streams[0].truth is not None and source.config.noise == NOISY.noise
    assert torch.equal(source.streams[0].truth, GroundTruth(SMALL).features)
    used = {"groups": SMALL, "iid": IID}
    for mode, config in used.items():  # settings of the other mode are no part of what names a store
        assert config.recipe()["presence"].keys() - {"mode"} == (
            {"groups", "active", "decay"} if mode == "groups" else {"probability"}
        )


# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    with shrunk() as patch:
        yield patch


def test_a_store(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    stores = grown(SMALL.model_copy(update={"codec": "float32"}), tmp_path)
    for split, first in (("train", 0), ("validation", HELD_OUT)):
        store = stores[split]
        assert (store.split, store.d, store.closed) == (split, 12, False)
        assert store.n_rows == (8 * CHUNK if split == "train" else CHUNK), "whole windows"
        samples = store.positions(0, store.n_rows)
        assert sorted(samples) == list(range(first, first + store.n_rows))
        assert not np.array_equal(samples, np.sort(samples)), "permuted in each window"
        truth = GroundTruth(SMALL)
        expected = torch.cat([truth.draw(int(sample), 1)[0] for sample in samples])
        assert torch.equal(store.rows(0, store.n_rows), expected)
        assert store.truth is not None and torch.equal(store.truth, truth.features)
    assert catalogue.sibling_of(tmp_path, stores["train"], "validation") is not None
    group: Any = zarr.open_group(stores["train"].path, mode="r")
    np.testing.assert_array_equal(group["truth"][:], truth.features)
    with Loader(stores["train"], 16, epochs=1) as loader:
        assert sum(len(x) for x in loader) == 8 * CHUNK


@pytest.mark.parametrize("codec", ["int8", "bfloat16"])
def test_growing_changes_nothing(tmp_path: Path, small: pytest.MonkeyPatch, codec: str) -> None:
    config = SMALL.model_copy(update={"codec": codec})
    whole = files(grown(config, tmp_path / "whole", 16 * CHUNK)["train"].path)
    for rows in (1, 3 * CHUNK, 2 * CHUNK, 16 * CHUNK):
        store = grown(config, tmp_path / "grown", rows)["train"]
    assert files(store.path) == whole
    assert store.complete and store.n_rows == 16 * CHUNK


def test_killed_and_continued(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    """At any change on the disk: the next call ends with the same bytes."""

    whole = {split: files(store.path) for split, store in grown(SMALL, tmp_path / "whole").items()}
    for stop in itertools.count(0, 11):
        root = tmp_path / str(stop)
        with killed_after(stop) as killed:
            grown(SMALL, root)
        if not killed:
            break
        stores = grown(SMALL, root)
        assert {split: files(store.path) for split, store in stores.items()} == whole, stop
        shutil.rmtree(root)
    assert stop > 50


def test_every_damaged_file_is_made_again(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    store = grown(SMALL, tmp_path)["train"]
    whole = files(store.path)

    def mended() -> None:
        found = [inspect_damage(path) for path in catalogue.folders(tmp_path, "activations")]
        findings = verify(found, lambda size: None)
        assert findings or any(one.lines for one in found)
        _, problems = mend(found, findings, Origins(tmp_path), Silent())
        assert problems == []
        assert files(store.path) == whole

    for name in (*store.committed_files(), "truth/zarr.json"):
        (store.path / name).unlink()
        mended()
    for name in store.committed_files():
        (store.path / name).write_bytes(b"other")
    mended()
    lines = (store.path / MANIFEST).read_bytes().splitlines(keepends=True)
    for number in range(len(lines)):
        (store.path / MANIFEST).write_bytes(b"".join([*lines[:number], b"{}\n", *lines[number + 1 :]]))
        with pytest.raises(DamagedStore):
            ActivationStore(store.path)
        mended()


# --- the whole way ----------------------------------------------------------------------------------------------------

MAKE = "synthesize --rows 20k --d 16 --features 24 --groups 3 --active 2 --set synthesize.validation_rows=100"
TRAIN = "train --d-sae 24 --k 2 --steps 60 --batch 256 --set train.checkpoint_every=25"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_from_synthesis_to_comparison(home: Path) -> None:
    made = done(MAKE, "--json").json["stores"]
    assert [(one["rows"], one["width"]) for one in made] == [(32_768, 16), (16_384, 16)]
    again = done(MAKE)
    assert "nothing to do: the rows asked for were there already" in again.err
    assert "train: 20,000 rows wanted, 32,768 are made: whole windows" in again.err
    done(f"{TRAIN} --name first")
    done(f"{TRAIN.replace(' --k 2', '')} --sweep k=2,3")
    judged = done("eval first --json").json
    names = ["true_to_learned", "learned_to_true", "recovered", "hungarian", "duplicates", "chance"]
    assert set(names) <= judged.keys() and not any(name.startswith(("ce_", "kl", "tokens")) for name in judged)
    assert judged["chance"] == chance(24, 24, 16) < judged["true_to_learned"] <= 1
    assert judged["rows"] == 16_384 and judged == Run(home / "runs/first").read_json("eval/eval.json")
    table = done("eval first").out
    assert all(re.search(rf"^{name} ", table, re.MULTILINE) for name in ("fvu", "l0", *names))
    assert "ce_clean" not in table
    rows = done("compare --json").json["runs"]
    assert len(rows) == 3
    assert {row["true_to_learned"] for row in rows} == {judged["true_to_learned"], None}
    assert "true_to_learned" in done("compare first").out
    assert "first" in done("list").out


def test_a_dictionary_that_is_the_truth_recovers_it(home: Path) -> None:
    """In an order of its own, with one direction twice: all is recovered, and the duplicate is counted."""
    done(MAKE)
    done(f"{TRAIN} --name planted --d-sae 25 --steps 1")
    run = Run(home / "runs/planted")
    tensors, config = run.load_weights()
    (store,) = [s for s in catalogue.stores(home / "cache") if isinstance(s, ActivationStore) and s.split == "train"]
    assert store.truth is not None
    truth = store.truth[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    run.save_weights({**tensors, "W_dec": torch.cat([truth, truth[:1]])}, config)
    found = done("eval planted --json").json
    for name in ("true_to_learned", "learned_to_true", "recovered", "hungarian"):
        assert found[name] == pytest.approx(1, abs=1e-5), name
    assert found["duplicates"] == 1
    assert Recovery(truth, truth).result()["duplicates"] == 0


def test_training_resumes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint before the step it was killed at, to the same bits."""
    steps = itertools.count(1)

    def cut_short(bars: Bars, n: int, **fields: float | int | str) -> None:
        if next(steps) == 40:
            raise KeyboardInterrupt

    done(MAKE)
    done(f"{TRAIN} --name whole")
    with monkeypatch.context() as patch:
        patch.setattr(Bars, "advance", cut_short)
        assert sae(f"{TRAIN} --name cut").code == 130
    assert not Run(home / "runs/cut").finished
    done("train --resume --name cut")
    whole, cut = (Run(home / "runs" / name).load_weights()[0] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    metadata = json.loads((home / "runs/whole/cfg.json").read_text())["metadata"]
    assert metadata["dataset_path"] == "synthetic" and "model_name" not in metadata


def test_looking_after_the_store(home: Path) -> None:
    key = done(MAKE, "--json").json["stores"][0]["key"]
    assert key in done("cache ls").out
    described = done(f"cache inspect {key} --json").json
    assert described["recipe"]["source"]["presence"]["active"] == 2
    assert "truth" in described["arrays"]
    assert done(f"cache du {key} --json").json["stores"][0]["arrays"]["truth"]["bytes"] == 24 * 16 * 4
    store = catalogue.any_store(home / "cache", key)
    whole = files(store.path)
    (store.path / "truth/c/0/0").write_bytes(b"")
    (store.path / "rows/c/1/0").unlink()
    assert sae("cache verify").code == 3
    done("cache verify --repair")
    assert files(store.path) == whole
    done(f"cache export {key} out.zarr --order token --rows 100")
    exported: Any = zarr.open_group(home / "out.zarr", mode="r")
    np.testing.assert_array_equal(exported["position"][:], np.arange(100))
    (home / "runs").mkdir()
    assert done("cache gc --json").json["garbage"] == []
    done(f"cache rm {key} --yes")
    assert not store.path.exists()


def test_what_needs_a_language_model_says_so(home: Path) -> None:
    key = done(MAKE, "--json").json["stores"][0]["key"]
    done(f"{TRAIN} --name one")
    for command, message in {
        "report": f"one: a report shows text, and the rows of {key} come from none; see `sae eval`",
        "eval --model gpt2": f"--model gpt2: the rows of {key} come from no language model; leave it out",
        f"cache inspect {key} --shuffle-quality": f"--shuffle-quality: the rows of {key} come from no documents",
        f"cache export {key} x.zarr --with-tokens": f"--with-tokens: the rows of {key} come from no tokens; leave it",
        "synthesize --rows all": "--rows all: synthetic rows have no end; say how many, as 1M",
        "synthesize --probability 0.1": "--probability 0.1: mode groups has no probability; it is of iid",
        "synthesize --mode no": "--mode no: unknown mode; there are groups, iid",
        "synthesize --codec int4": "--codec int4: no such codec",
    }.items():
        answer = sae(command)
        assert (answer.code, message in answer.err) == (2, True), (command, answer.err)


def test_the_defaults_that_the_help_states() -> None:
    defaults = SyntheticConfig().model_dump() | Independent().model_dump() | Groups().model_dump()
    commands: Any = typer.main.get_command(app)
    stated = {
        param.name: re.search(r"Default: (\S+)\.(?: Write|$)", param.help)
        for param in commands.commands["synthesize"].commands["features"].params
        if param.name in defaults
    }
    assert stated.keys() == {
        "rows",
        "d",
        "features",
        "mode",
        "groups",
        "active",
        "probability",
        "noise",
        "seed",
        "codec",
    }
    for name, found in stated.items():
        assert found is not None, name
        value = defaults[name]
        text = found[1].replace("1M", "1000000")
        assert (text if isinstance(value, str) else float(text)) == value, name


alone = pytest.fixture(one_thread)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("presence", [Independent(), Groups(active=8)], ids=["iid", "groups"])
def test_topk_finds_the_truth(presence: Groups | Independent, tmp_path: Path) -> None:
    """512 features in 256 dimensions, 8 in a row, 700 steps of a dictionary of 512."""
    from sae.pipeline.train.stage import TrainConfig, open_run, train

    settings = SyntheticConfig(presence=presence, rows=262_144, validation_rows=1)
    store = synthesize(settings, tmp_path, Silent())["train"]
    config = TrainConfig(sae=TopKConfig(d_sae=512, k=8), lr=3e-3, batch=512, steps=700)
    run = open_run(config, Dataset.of(store), tmp_path / "runs", None, resume=False)
    train([run], Dataset.of(store), Silent())
    assert store.truth is not None
    found = Recovery(run.load_weights()[0]["W_dec"], store.truth).result()
    assert found["chance"] == chance(512, 512, 256) == pytest.approx(0.19, abs=0.01)
    assert found["true_to_learned"] >= 0.9
    assert found["recovered"] > 0.75
    untrained = create(TopKConfig(d_sae=512, k=8), 256, seed=0)
    unlearned = Recovery(untrained.W_dec.detach(), store.truth).result()
    assert unlearned["true_to_learned"] == pytest.approx(found["chance"], abs=0.02)
