"""One MLP taken apart in several ways, at equal parameters."""

from pathlib import Path

import pytest
from support.command_line import sae
from support.harvesting import harvest
from support.small_models import WIDTH, made_up, save_model, small_stages, token_store
from support.small_studies import BASE, lab_in

from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.mlp import Mlp
from sae.pipeline.studies.study import Setup


@pytest.mark.slow
def test_each_method_has_its_place_on_the_same_axes(tmp_path: Path) -> None:
    root, d = tmp_path / "cache", WIDTH
    boot = LanguageModel.boot
    with small_stages() as patch:
        patch.setattr(LanguageModel, "boot", lambda name, **options: boot(name, **{**options, "device": "cpu"}))  # anew
        model = save_model("gpt2", tmp_path / "model")
        splits = {"train": 60, "validation": 20}
        tokens = [token_store(root, made_up(n, seed=n), split=split) for split, n in splits.items()]
        config = HarvestConfig(model=str(model), layer=(1,), site=("mlp_in", "mlp_out"), codec="float32")
        stores = harvest(config, tokens, root, Silent()).stores["train"]
        lab = lab_in(root, tmp_path / "runs")
        lab = Lab(lab.place, lab.eval_config, cross_entropy=True)
        study = Mlp(ks=(2, 8), importances=(1e-4,))
        result = study.run(Setup(BASE, Dataset.of(stores[1]), lab, sae={"d_sae": 110}))
        table = {(row["method"], row["k"]): row for row in result.runs}
        assert [*table] == [
            ("transcoder", 2), ("transcoder", 8), ("sae", 2), ("sae", 8), ("molt", 2), ("molt", 8), ("spd", None),
        ]  # fmt: skip
        for (method, k), row in table.items():
            assert row["parameters"] == pytest.approx(110 * 2 * d, rel=0.2) and row["parameters"] <= 110 * 2 * d
            assert row["fvu"] > 0 and row["ce_degradation"] is not None and row["bits"] is not None
            assert method in ("spd", "molt") or row["active_parameters"] == pytest.approx(k * 2 * d, rel=0.01)
        assert table["molt", 2]["jacobian_cosine"] is not None
        assert 0 < table["molt", 2]["active_parameters"] <= table["molt", 2]["parameters"]
        spd = table["spd", None]
        assert 0 < spd["active_parameters"] <= spd["parameters"] and spd["l0"] > 0
        assert spd["jacobian_cosine"] is not None and table["sae", 2]["jacobian_cosine"] is None
        again = study.run(Setup(BASE, Dataset.of(stores[0]), lab, sae={"d_sae": 110}))
        assert again.runs == result.runs  # from what was kept, whichever of the two stores is named
        files = result.write(tmp_path / "out")
        assert all(Path(path).stat().st_size > 100 for path in files.values())


def test_rows_of_no_mlp_are_refused(store: ActivationStore, cache: Path, tmp_path: Path) -> None:
    answer = sae(
        "study mlp --no-ce", "--cache", cache, "--runs", tmp_path, "--activations", store.key, "--out", tmp_path / "o"
    )
    assert answer.code == 2 and "no store of it beside" in answer.complaint
