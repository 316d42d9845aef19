"""Stores of toy models: the model, its directions and every row's coefficients lie with the rows, whatever happens."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from support.command_line import done, sae
from support.small_stores import CHUNK, files, shrunk

from sae.cache import activations, catalogue
from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.upkeep.damage import inspect_damage, verify
from sae.configs import presets, resolve
from sae.pipeline.commands.cache_verify import mend
from sae.pipeline.harvest import keeping
from sae.pipeline.harvest.sources import source_of, toy
from sae.pipeline.harvest.sources.synthetic import HELD_OUT, SyntheticConfig
from sae.pipeline.harvest.sources.toy import ToyConfig, ToySource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent

SMALL = ToyConfig(
    features=6, hidden=3, probability=0.3, correlated_pairs=1, steps=20, batch=32, rows=1, validation_rows=1
)
TWO = SMALL.model_copy(update={"instances": 2, "probability": 0.5, "last_probability": 0.1, "codec": "int8"})


@pytest.fixture(autouse=True)
def small() -> Any:
    with shrunk() as patch:
        patch.setattr(toy, "BLOCK", CHUNK)
        yield patch


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def made(config: ToyConfig, root: Path, rows: int = 5 * CHUNK) -> dict[str, list[ActivationStore]]:
    source = ToySource.of_settings(config.model_copy(update={"rows": rows}), Origins(root), Silent())
    return harvest(source, root, Silent()).stores


@pytest.mark.parametrize("config", [SMALL, TWO], ids=["one", "two"])
def test_a_row_is_its_coefficients_through_the_weights(config: ToyConfig, tmp_path: Path) -> None:
    stores = made(config, tmp_path)
    assert [len(split) for split in stores.values()] == [config.instances] * 2
    for split, first in (("train", 0), ("validation", HELD_OUT)):
        for instance, store in enumerate(stores[split]):
            n = store.n_rows
            x, kept = store.coefficients(0, n), store.toy
            assert x is not None and kept is not None and store.truth is not None
            weight, bias = kept
            assert (x.shape, weight.shape, bias.shape) == ((n, 6), (6, 3), (6,))
            torch.testing.assert_close(store.rows(0, n), x @ weight, rtol=0, atol=1e-5 if config is SMALL else 0.1)
            assert torch.equal(x[:, 0] > 0, x[:, 1] > 0) and x.max() <= 1 and (x > 0).any(0).all()
            torch.testing.assert_close(store.truth, torch.nn.functional.normalize(weight, dim=1))
            positions = store.positions(0, n)
            assert sorted(positions) == list(range(first, first + n))
            group: Any = zarr.open_group(store.path, mode="r")
            np.testing.assert_array_equal(group["coefficient"][:], x)
            again = source_of(store, Origins(tmp_path))
            assert isinstance(again, ToySource)
            drawn = again._drawn(instance, first // CHUNK)
            assert torch.equal(drawn[int(positions[0]) % CHUNK], x[0]) or positions[0] - first >= CHUNK
    one, *other = stores["train"]
    assert all(not torch.equal(one.toy[0], store.toy[0]) for store in other)  # type: ignore[index]
    share = [float((store.coefficients(0, store.n_rows) > 0).double().mean()) for store in stores["train"]]  # type: ignore[operator]
    assert config.instances == 1 or share[0] > 2 * share[1]


@pytest.mark.parametrize("config", [SMALL, TWO], ids=["one", "two"])
def test_growing_takes_the_toy_that_is_there(
    config: ToyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [files(store.path) for store in made(config, tmp_path / "whole", 16 * CHUNK)["train"]]
    stores = made(config, tmp_path / "grown", 1)["train"]
    monkeypatch.setattr(toy, "trained", lambda *_: pytest.fail("trained again"))
    for rows in (3 * CHUNK, 16 * CHUNK):
        stores = made(config, tmp_path / "grown", rows)["train"]
    assert [files(store.path) for store in stores] == whole


def test_a_toy_is_the_same_on_any_number_of_threads(tmp_path: Path) -> None:
    alone = ToySource.of_settings(SMALL, Origins(tmp_path), Silent()).digests
    torch.set_num_threads(3)
    try:
        assert ToySource.of_settings(SMALL, Origins(tmp_path), Silent()).digests == alone
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_every_damaged_file_is_made_again(tmp_path: Path) -> None:
    """The weights, too: by the same training."""
    store = made(TWO, tmp_path, 2 * CHUNK)["train"][1]
    whole = files(store.path)
    for name in store.committed_files():
        (store.path / name).write_bytes(b"other")
        found = [inspect_damage(path) for path in catalogue.folders(tmp_path, "activations")]
        _, problems = mend(found, verify(found, lambda size: None), Origins(tmp_path), Silent())
        assert problems == [] and files(store.path) == whole, name


def test_a_toy_that_cannot_be_trained_again_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (store,) = made(SMALL, tmp_path)["train"]
    (store.path / "weight/c/0/0").unlink()
    other = ToySource.of_settings(SMALL.model_copy(update={"steps": 21}), Origins(tmp_path / "none"), Silent())
    monkeypatch.setattr(toy, "_trained", lambda *_: [other.toys[0]])
    with pytest.raises(SaeError, match="its toy is damaged, and the same training ended otherwise here"):
        source_of(store, Origins(tmp_path))


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_an_unfinished_window_is_taken_up_with_its_coefficients(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL.model_copy(update={"codec": codec})
    whole = [files(store.path) for store in made(config, tmp_path / "whole")["train"]]
    monkeypatch.setattr(keeping, "EVERY", 0.0)
    values, asked = ToySource._values, []

    def counted(self: ToySource, first: int, last: int, names: Any) -> Any:
        asked.append(first)
        if len(asked) in (1, 4):
            raise KeyboardInterrupt
        return values(self, first, last, names)

    monkeypatch.setattr(ToySource, "_values", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made(config, tmp_path / "cut")
    assert [files(store.path) for store in made(config, tmp_path / "cut")["train"]] == whole
    assert len(set(asked)) == len(asked) - 2, "no part is computed twice but for those that were cut"


def test_windows_of_many_coefficients_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "WINDOW_COEFFICIENTS", 2 * CHUNK * 10)
    largest = [ActivationStore.layout({"toy": True, "truth": truth}).largest for truth in (1, 5, 10, 1000)]
    assert largest == [4 * CHUNK, 4 * CHUNK, 2 * CHUNK, CHUNK] and ActivationStore.layout({}).largest == 4 * CHUNK


def test_the_command_and_what_it_tells(home: Path) -> None:
    small = "--set synthesize.steps=20 --set synthesize.batch=32 --set synthesize.validation_rows=1"
    told = done(f"synthesize toy --features 5 --hidden 2 --probability 0.025 --rows 10 {small} --json").json
    assert told.keys() >= {"stores", "key", "rows", "d", "loss", "feature_norms"} and "losses" not in told
    assert (told["rows"], told["d"], len(told["feature_norms"])) == (CHUNK, 2, 5)
    store = ActivationStore(home / "cache" / "activations" / told["key"])
    assert store.toy is not None
    assert told["feature_norms"] == pytest.approx(torch.linalg.vector_norm(store.toy[0], dim=1).tolist())
    assert 0 < told["loss"] < 0.05
    assert "nothing to do" in done(f"synthesize toy --probability 0.025 --rows 10 {small}").err
    several = done(
        f"synthesize toy --instances 3 --probability 1 --last-probability 0.05 --last-importance 0.01 "
        f"--correlation 0.5 --features 4 --anticorrelated-pairs 1 --schedule cosine --rows 10 {small} --json"
    )
    assert "two of an anti-correlated pair exceed 1 together" in several.err
    told = several.json
    assert len(told["losses"]) == 3 == len(told["feature_norms"]) and told["loss"] == pytest.approx(
        np.mean(told["losses"])
    )
    assert told["correlation"].keys() == {"target", "rank", "presence", "value"}
    assert [store["slug"] for store in told["stores"][:3]] == [f"toy-4in2-instance-{i}-float32" for i in range(3)]
    done(f"train --activations {store.key} --arch topk --k 1 --d-sae 5 --steps 3 --batch 8 --device cpu --name one")
    assert done("eval one --json --device cpu --set eval.dead_rows=0").json["true_to_learned"] > 0


def test_tables() -> None:
    """Broadcast as NumPy has it: a number, one for each feature, a table; and powers between two."""
    config = ToyConfig(features=3, instances=2, probability=(0.1, 0.2, 0.3))
    assert config.presence.probability.tolist() == [[0.1, 0.2, 0.3]] * 2
    config = ToyConfig(features=3, instances=2, probability=((0.1,), (0.2,)), importance=((1, 2, 3), (4, 5, 6)))
    assert config.presence.probability.tolist() == [[0.1] * 3, [0.2] * 3]
    assert config.training.importance.tolist() == [[1, 2, 3], [4, 5, 6]]
    config = ToyConfig(features=3, instances=3, probability=1.0, last_probability=0.01, last_importance=0.01)
    np.testing.assert_allclose(config.presence.probability[:, 0], [1, 0.1, 0.01])
    np.testing.assert_allclose(config.training.importance[2], [1, 0.1, 0.01])
    anti = ToyConfig(features=3, probability=0.8, anticorrelated_pairs=1)
    assert anti.clipped and anti.presence.probability.tolist() == [[0.5, 0.5, 0.8]]
    assert not ToyConfig(features=3, probability=0.5, anticorrelated_pairs=1).clipped


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("correlated_pairs=3", "synthesize: 3 pairs are of 6 features, and there are 5; take fewer"),
        ("correlation=-0.5", "synthesize: correlation -0.5: 5 features cannot all be so opposed; the least is -0.25"),
        ("correlation=1", "synthesize.correlation = 1: input should be less than 1"),
        ("probability=0", "synthesize.probability = 0: 0 is not a probability; give numbers above 0"),
        (
            "probability=[0.1,0.2]",
            "synthesize: probability: fits no table of 1 instances and 5 features; give a number",
        ),
        ("probability=[0.1,[0.2]]", "synthesize.probability"),
        ("importance=-1", "synthesize.importance = -1: -1 is not a weight; give numbers from 0 on"),
        ("last_probability=2", "synthesize.last_probability = 2: input should be less than or equal to 1"),
        ("probability=[0.1,0.1,1.5,0.1,0.1]", "1.5 is not a probability; give numbers above 0 and up to 1"),
        ("{importance: 0, last_importance: 2}", "last_importance = 2: from 0 there are no powers to it"),
        ("importance=[1,2,3,4,.inf]", "synthesize.importance"),
        ("schedule=half", "synthesize.schedule = 'half': input should be 'constant', 'linear' or 'cosine'"),
        ("hidden=0", "synthesize.hidden = 0: input should be greater than or equal to 1"),
        ("d=3", "synthesize.d: unknown key; there are"),
    ],
)
def test_mistakes(override: str, message: str) -> None:
    given = {"importance": 0.0, "last_importance": 2.0} if override.startswith("{") else None
    with pytest.raises(SaeError, match=re.escape(message)) as caught:
        resolve("synthesize", ToyConfig, overrides=[] if given else [f"synthesize.{override}"], given=given)
    assert "\n" not in str(caught.value)


def test_worlds_are_not_mixed_up(home: Path) -> None:
    for command, message in {
        "synthesize --preset toy_5in2": "synthesize.source = toy: these settings are of another world",
        "synthesize toys": "no such command 'toys'; did you mean 'toy'?",
        "synthesize --rows 5 toy": "got unexpected extra argument",
        "synthesize toy --preset synthetic": "preset synthetic: synthesize.d: unknown key",
        "synthesize toy --rows all": "--rows all: synthetic rows have no end; say how many, as 1M",
        "synthesize toy --probability 1.5": "--probability 1.5: 1.5 is not a probability; give numbers above 0",
        "synthesize toy --codec int4": "--codec int4: no such codec",
        "synthesize toy --features 0": "--features 0: input should be greater than or equal to 1",
        "synthesize rows": "missing argument 'FILE'",
        "synthesize rows none.npy": "--table none.npy: no such file",
    }.items():
        answer = sae(command)
        assert (answer.code, message in answer.complaint) == (2, True), (command, answer.err)


def test_the_presets_are_of_the_command_lines_they_stand_for() -> None:
    found = {
        name: resolve("synthesize", [SyntheticConfig, ToyConfig], preset=name) for name in presets() if "toy" in name
    }
    assert found.keys() == {"toy_5in2", "toy_pairs", "toy_correlation"}
    sizes = {name: (one.features, one.hidden) for name, one in found.items() if isinstance(one, ToyConfig)}
    assert sizes == {"toy_5in2": (5, 2), "toy_pairs": (100, 20), "toy_correlation": (100, 20)}
    pairs = found["toy_pairs"]
    assert isinstance(pairs, ToyConfig) and (pairs.correlated_pairs, pairs.anticorrelated_pairs) == (2, 1)
    assert json.loads(json.dumps(pairs.recipe()))["schedule"] == "cosine"
