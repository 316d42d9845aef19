"""Decoders that learn faster, and one dictionary a layer."""

from pathlib import Path

import pytest
import torch
from support.small_stores import activation_recipe, extend
from support.small_studies import BASE, D, lab_in, planted

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.formats import trained
from sae.pipeline.metrics.similarity import symmetric_mmcs
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.layers import Layers
from sae.pipeline.studies.rates import Rates, decoupled
from sae.pipeline.studies.study import Setup
from sae.pipeline.train.stage import TrainConfig


class TestRates:
    def test_the_rates_are_those_asked_for(self) -> None:
        base = BASE.model_copy(update={"warmup": 0.1, "lr": 1e-3})
        constant, falling = decoupled(base, 4, "none"), decoupled(base, 4, "cosine")
        assert constant.rates_at(50, 100) == pytest.approx((1e-3, 4e-3))
        assert constant.rates_at(99, 100) == pytest.approx((1e-3, 4e-3))
        assert falling.rates_at(9, 100) == pytest.approx((1e-3, 4e-3))
        assert falling.rates_at(55, 100) == pytest.approx((0.5e-3, 4e-3))
        assert falling.rates_at(99, 100)[0] < 1e-6 and falling.rates_at(99, 100)[1] == pytest.approx(4e-3)
        TrainConfig.model_validate(falling.model_dump())

    def test_a_run_for_every_ratio_and_decay(self, store: ActivationStore, lab: Lab, tmp_path: Path) -> None:
        result = Rates(ratios=(1, 8)).run(Setup(BASE, Dataset.of(store), lab))
        assert [(row["ratio"], row["encoder_decay"]) for row in result.runs] == [
            (1, "none"), (8, "none"), (1, "cosine"), (8, "cosine"),
        ]  # fmt: skip
        for row in result.runs:
            run = Run(lab.place.runs / row["run"])
            last = run.metrics()[-1]
            assert last["lr_decoder"] == pytest.approx(row["ratio"] * BASE.lr)
            assert (last["lr"] < 0.1 * BASE.lr) == (row["encoder_decay"] == "cosine")
            sae = trained.load_run(run)
            cosines = torch.cosine_similarity(sae.W_enc.T, sae.W_dec)
            assert row["encoder_decoder_cosine"] == pytest.approx(cosines.mean().item())
        result.write(tmp_path)
        assert (tmp_path / "plot.png").stat().st_size > 1000


class TestLayers:
    def test_a_run_a_layer_at_equal_rows(self, store: ActivationStore, lab: Lab, tmp_path: Path) -> None:
        base = BASE.model_copy(update={"steps": None})
        result = Layers(layers=(0, 1, 3), site="resid_post").run(Setup(base, Dataset.of(store), lab))
        assert [row["layer"] for row in result.runs] == [0, 1, 3]
        seen = [Run(lab.place.runs / row["run"]).config["train"]["rows"] for row in result.runs]
        assert seen == [960] * 3, "as many as the smallest store has"
        assert result.runs[1]["norm"] == pytest.approx(store.rows(0, 1024).norm(dim=1).mean().item(), rel=0.01)
        assert [row["mmcs_previous"] is None for row in result.runs] == [True, False, True]
        assert result.runs[1]["mmcs_previous"] > result.runs[1]["mmcs_chance"] > 0.3
        assert result.runs[0]["fvu"] != result.runs[2]["fvu"]
        result.write(tmp_path)
        assert (tmp_path / "plot.png").stat().st_size > 1000

    def test_neighbours_are_compared_seed_by_seed(self, store: ActivationStore, lab: Lab) -> None:
        result = Layers(layers=(0, 1), site="resid_post").run(Setup(BASE, Dataset.of(store), lab, seeds=2))
        assert [row["seed"] for row in result.runs] == [0, 1, 1000, 1001], "layers do not start alike"
        decoders = [trained.load_run(Run(lab.place.runs / row["run"])).W_dec for row in result.runs]
        for low, high in ((0, 2), (1, 3)):
            expected = symmetric_mmcs(decoders[high], decoders[low]).item()
            assert result.runs[high]["mmcs_previous"] == pytest.approx(expected)
        assert [(row["layer"], row["seeds"]) for row in result.table] == [(0, 2), (1, 2)]
        assert result.table[0]["mmcs_previous"] is None and result.table[1]["mmcs_previous_sd"] is not None

    def test_missing_layers_are_named_with_the_command(self, store: ActivationStore, lab: Lab) -> None:
        with pytest.raises(NotFound) as error:
            Layers(layers=(0, 2, 5), site="resid_post").run(Setup(BASE, Dataset.of(store), lab))
        assert "layers = 2,5: no resid_post of these" in str(error.value)
        assert "`harvest(model=synthetic, layer=2,5, site=resid_post, codec=float32)`" in str(error.value)
        with pytest.raises(SaeError, match="site = nowhere: the sites are resid_pre"):
            Layers(layers=(0,), site="nowhere").run(Setup(BASE, Dataset.of(store), lab))

    def test_stores_of_other_tokens_do_not_count(self, store: ActivationStore, cache: Path, tmp_path: Path) -> None:
        recipe = {**activation_recipe(D, "float32", site="resid_post", seed=9), "layer": 2}
        with ActivationWriter(cache, "other", recipe) as writer:
            extend(writer, planted(128, seed=3), ended=True)
        with pytest.raises(NotFound, match="layers = 2: no resid_post of this"):
            Layers(layers=(1, 2), site="resid_post").run(Setup(BASE, Dataset.of(store), lab_in(cache, tmp_path)))
