"""Dictionaries of contexts of several lengths, each judged on all."""

from pathlib import Path

import pytest
from support.harvesting import harvest
from support.small_models import made_up, save_model, small_stages, token_store
from support.small_studies import BASE, lab_in

from sae.cache.activations import ActivationStore
from sae.cache.errors import NotFound
from sae.cache.loader.dataset import Dataset
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.studies.contexts import Contexts
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.study import Setup


@pytest.mark.slow
def test_each_length_is_judged_on_each_and_by_position(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    with small_stages():
        model = save_model("gpt2", tmp_path / "model")
        stores = []
        for length in (8, 16):
            tokens = [
                token_store(root, made_up(n * 16 // length, seed=n, length=length), split=split)
                for n, split in ((60, "train"), (20, "validation"))
            ]
            config = HarvestConfig(model=str(model), layer=(1,), site=("mlp_out",), codec="float32")
            stores.append(harvest(config, tokens, root, Silent()).stores["train"][0])
        lab = lab_in(root, tmp_path / "runs")
        lab = Lab(lab.place, lab.eval_config, cross_entropy=True)
        study = Contexts()
        result = study.run(Setup(BASE, Dataset.of(stores[0]), lab, seeds=1))
        cells = [(row["trained"], row["judged"], row["seed"]) for row in result.runs]
        assert cells == [(8, 8, 0), (8, 16, 0), (16, 8, 1000), (16, 16, 1000)]
        for row in result.runs:
            assert row["fvu"] > 0 and row["ce_degradation"] is not None
            assert (row["mmcs_own"] is None) == (row["trained"] == row["judged"])
        by = result.as_json()["by_position"]
        assert {one["from"] for one in by if one["judged"] == 16} == {1, 2, 4, 8}
        assert {one["from"] for one in by if one["judged"] == 8} == {1, 2, 4}
        own = [row for row in result.runs if row["trained"] == row["judged"] == 8]
        direct = lab.rows(study.trials(Setup(BASE, Dataset.of(stores[0]), lab))[0].seeded(1))
        assert [row["fvu"] for row in own] == pytest.approx([row["fvu"] for row in direct])
        again = study.run(Setup(BASE, Dataset.of(stores[1]), lab, seeds=1))
        assert again.runs == result.runs and again.extra == result.extra  # kept, whichever store is named
        files = result.write(tmp_path / "out")
        assert all(Path(path).stat().st_size > 500 for path in files.values())
        with pytest.raises(NotFound, match="lengths = 32: no store of the documents of"):
            Contexts(lengths=(8, 32)).run(Setup(BASE, Dataset.of(stores[0]), lab))


def test_stores_that_are_of_no_lengths(store: ActivationStore, lab: Lab) -> None:
    with pytest.raises(NotFound, match=r"lengths = 8: two are compared at least; .*tokenize\(context=\.\.\.\)"):
        Contexts().run(Setup(BASE, Dataset.of(store), lab))
    with pytest.raises(NotFound, match=r"lengths = 16,64: no store of .* these lengths"):
        Contexts(lengths=(8, 16, 64)).run(Setup(BASE, Dataset.of(store), lab))
