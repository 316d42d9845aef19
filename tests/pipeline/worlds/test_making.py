"""What is known of how a store's rows were made, and what an evaluation makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import done
from support.harvesting import synthesize
from support.small_stores import CHUNK, shrunk, write_activations

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import key as store_key
from sae.cache.errors import DamagedStore
from sae.cache.runs import WEIGHTS
from sae.cache.store.head import head_bytes
from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
from sae.pipeline.harvest.sources.toy import ToyConfig, ToySource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.worlds.features import GroundTruth, Groups, Independent
from sae.pipeline.worlds.making import making_of

GROUPS = SyntheticConfig(d=12, features=31, presence=Groups(groups=4, active=3, decay=0.8), rows=1, validation_rows=1)
IID = GROUPS.model_copy(update={"presence": Independent(probability=0.15), "noise": 0.1, "codec": "float32"})
TOY = ToyConfig(
    features=6,
    hidden=4,
    probability=0.3,
    correlated_pairs=1,
    anticorrelated_pairs=1,
    steps=300,
    batch=64,
    lr=1e-2,
    rows=1,
    validation_rows=1,
)


@pytest.fixture(autouse=True)
def small() -> Any:
    with shrunk():
        yield


@pytest.mark.parametrize("config", [GROUPS, IID], ids=["groups", "iid"])
def test_coefficients_are_drawn_again(config: SyntheticConfig, tmp_path: Path) -> None:
    """Those of any rows, in stored order: they give the rows back."""
    for store in synthesize(config.model_copy(update={"rows": 5 * CHUNK}), tmp_path, Silent()).values():
        made = making_of(store)
        assert made is not None and made.coefficients is not None and made.pairs == ()
        truth = GroundTruth(config)
        assert torch.equal(made.effect, truth.features)
        n = store.n_rows
        every = made.coefficients(0, n)
        assert every is not None
        expected = torch.cat([truth.draw(int(sample), 1)[1].dense(31) for sample in store.positions(0, n)])
        assert torch.equal(every, expected)
        part = made.coefficients(n // 3, n // 2)
        assert part is not None and torch.equal(part, every[n // 3 : n // 2])


def test_a_toys_lie_in_its_store(tmp_path: Path) -> None:
    source = ToySource.of_settings(TOY, Origins(tmp_path), Silent())
    (store,) = harvest(source, tmp_path, Silent()).stores["train"]
    made = making_of(store)
    assert made is not None and made.coefficients is not None and made.pairs == ((0, 1), (2, 3))
    found, stored = made.coefficients(3, 9), store.coefficients(3, 9)
    assert found is not None and stored is not None and torch.equal(found, stored)
    torch.testing.assert_close(found @ made.effect, store.rows(3, 9), atol=1e-5, rtol=0)


def test_of_others_nothing_is_known(tmp_path: Path) -> None:
    assert making_of(write_activations(tmp_path, torch.randn(40, 6))) is None


def test_a_recipe_that_is_no_worlds(tmp_path: Path) -> None:
    store = synthesize(GROUPS, tmp_path, Silent())["train"]
    for changed in ({"generator": 2}, {"presence": {"mode": "groups", "groups": 0}}, {"d": "x"}):
        recipe = json.loads(json.dumps(store.recipe))
        recipe["source"] |= changed
        folder = store.path.with_name(store_key(store.slug, recipe))
        store.path.rename(folder)
        (folder / "recipe.json").write_bytes(head_bytes("activations", store.slug, recipe))
        store = ActivationStore(folder)
        with pytest.raises(DamagedStore, match="is not of a world of this version"):
            making_of(store)


def test_an_evaluation_tells_of_coefficients_and_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary that is the toy's own finds all; a second without one of a pair's features merges nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    source = ToySource.of_settings(TOY, Origins(tmp_path / "cache"), Silent())
    (store,) = harvest(source, tmp_path / "cache", Silent()).stores["train"]
    done(f"train --activations {store.key} --arch l1 --d-sae 6 --steps 2 --batch 8 --device cpu --name one")
    found = done("eval one --json --device cpu --set eval.dead_rows=0").json
    pairs = ("merged_pairs", "merged_pairs_chance", "cross_talk", "cross_talk_chance", "alike_pairs")
    told = ("coefficient_r", "coefficient_r_chance", "coefficient_auroc", "coefficient_auroc_chance")
    assert all(isinstance(found[name], float) for name in (*told, *pairs)) and "duplicates_chance" in found
    assert found["details"]["coefficients"] == {"rows": CHUNK, "features": 6}
    assert [pair["members"] for pair in found["details"]["pairs"]] == [[0, 1], [2, 3]]
    assert (tmp_path / "runs" / "one" / WEIGHTS).exists()
    shown = done("eval one --device cpu").out
    assert "AUROC of presence" in shown or "coefficient_auroc" in shown
    columns = done("compare --json").json["runs"][0]
    assert columns["coefficient_r"] == found["coefficient_r"] and "coefficient_auroc" not in columns
    page = done(
        "synthesize --rows 1 --d 8 --features 16 --groups 4 --active 2 --set synthesize.validation_rows=1 --json"
    ).json
    done(f"train --activations {page['key']} --k 2 --d-sae 16 --steps 2 --batch 8 --device cpu --name two")
    other = done("eval two --json --device cpu --set eval.dead_rows=0").json
    assert isinstance(other["coefficient_r"], float) and "merged_pairs" not in other
