"""Studies: what they train, that they train it once, and that their figures are true."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from support.small_stores import activation_recipe, extend
from support.small_studies import BASE, D, Noted, lab_in, planted

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import EVALUATION, Run
from sae.pipeline.evaluate.stage import EvalConfig
from sae.pipeline.formats import trained
from sae.pipeline.report.plots import calm
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import (
    parse,
)
from sae.pipeline.saes.coherence import jl
from sae.pipeline.studies import results as figures
from sae.pipeline.studies.coefficients import Coefficients
from sae.pipeline.studies.lab import Lab, Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.study import Setup, of_equal_rows, variant
from sae.pipeline.studies.tables import Result
from sae.pipeline.train.resampling import (
    NoRevival,
    Reinitialise,
)
from sae.pipeline.train.stage import TrainConfig

JL_ALONE = Coefficients(l1=(), jl=(0.5,), hybrid_jl=())


def times(folder: Path) -> dict[Path, int]:
    """When each file of the runs was last written, locks left out."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.fixture(scope="module")
def ablation(store: ActivationStore, lab: Lab) -> Result:
    return Coefficients(l1=(0.01, 0.3), jl=(0.5,), hybrid_jl=(0.5,)).run(Setup(BASE, Dataset.of(store), lab))


class TestVariant:
    def test_the_common_settings_stay(self) -> None:
        changed = variant(BASE, "l1", coefficient=2.0)
        assert (changed.sae.arch, changed.sae.d_sae) == ("l1", 32)
        assert {**changed.model_dump(), "sae": None} == {**BASE.model_dump(), "sae": None}

    def test_an_architecture_keeps_its_own_settings_and_lends_them_to_no_other(self) -> None:
        base = BASE.model_copy(update={"sae": parse({"arch": "topk", "d_sae": 32, "k": 5, "aux_coefficient": 0.5})})
        assert variant(base, "topk").sae == base.sae
        assert variant(base, "batchtopk").sae == parse({"arch": "batchtopk", "d_sae": 32})

    def test_a_default_of_one_architecture_is_not_forced_on_another(self) -> None:
        assert variant(variant(BASE, "jumprelu"), "l1").sae.input_scale == "rms"

    def test_what_does_not_go_together_is_said_in_one_line(self) -> None:
        with pytest.raises(SaeError, match=r"train.sae: k: 99 latents per input, but d_sae: 32.*\(for arch topk\)"):
            variant(BASE, "topk", k=99)
        with pytest.raises(SaeError, match=r"train.sae.coefficient: .*greater than or equal to 0 \(for arch l1\)"):
            variant(BASE, "l1", coefficient=-1)
        reviving = BASE.model_copy(update={"revive": Reinitialise()})
        with pytest.raises(SaeError, match="needs an architecture with k"):
            variant(reviving, "l1")
        assert isinstance(BASE.revive, NoRevival)


class TestCoefficients:
    def test_every_paradigm_meets_its_grid(self, ablation: Result) -> None:
        told = [(row["paradigm"], row["l1_coefficient"], row["jl_coefficient"]) for row in ablation.runs]
        assert told == [
            ("l1", 0.01, None), ("l1", 0.3, None), ("jl", None, 0.5), ("hybrid", 0.01, 0.5), ("hybrid", 0.3, 0.5),
        ]  # fmt: skip
        assert len({row["run"] for row in ablation.runs}) == 5

    def test_the_settings_are_those_of_one_convention(self, ablation: Result, lab: Lab) -> None:
        for row in ablation.runs:
            sae = Run(lab.place.runs / row["run"]).config["train"]["sae"]
            assert sae["reduction"] == "mean_d"
            assert sae.get("coefficient") == row["l1_coefficient"] and sae.get("penalty") in (None, "per_token")
            assert sae.get("jl_coefficient") == row["jl_coefficient"]
            assert row["jl_coefficient"] is None or sae["jl_start"] == 5 * row["jl_coefficient"]

    def test_figures_are_those_of_the_rows_and_the_weights(
        self, ablation: Result, lab: Lab, store: ActivationStore
    ) -> None:
        held_out = ActivationStore(next(store.path.parent.glob("planted-1-validation*")))
        x = held_out.rows(0, held_out.n_rows)
        searched = torch.cat([x, store.rows(0, 128)])
        for row in ablation.rows:
            sae = trained.load_run(Run(lab.place.runs / row["run"]))
            fired = sae.encode(x).dense() != 0
            error = (sae(x) - x).square().sum().item()
            density = fired.double().mean(0)
            assert row["fvu"] == pytest.approx(error / (x - x.mean(0)).square().sum().item(), rel=1e-4)
            assert row["mse"] == pytest.approx(error / x.numel(), rel=1e-4)
            assert row["l0"] == pytest.approx(fired.sum(1).double().mean().item())
            assert row["sparsity"] == pytest.approx(1 - row["l0"] / 32)
            assert row["dead_fraction"] == pytest.approx(
                ((sae.encode(searched).dense() != 0).sum(0) == 0).double().mean().item()
            )
            assert row["dense_share"] == pytest.approx((density > 0.1).double().mean().item())
            assert row["rate_median"] == pytest.approx(density[density > 0].quantile(0.5).item())
            assert row["jl"] == pytest.approx(jl(sae.W_dec).item())
            assert row["ce_degradation"] is None

    def test_a_stronger_penalty_is_sparser_and_jl_alone_is_not_sparse(self, ablation: Result) -> None:
        l0 = {(row["paradigm"], row["l1_coefficient"]): row["l0"] for row in ablation.runs}
        assert l0["l1", 0.3] < l0["l1", 0.01] and l0["hybrid", 0.3] < l0["hybrid", 0.01]
        assert l0["jl", None] > 0.2 * 32


class TestRepeating:
    def test_nothing_is_trained_or_judged_again(
        self, ablation: Result, store: ActivationStore, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = times(lab.place.runs)
        monkeypatch.setattr("sae.pipeline.train.sweep.train", lambda *_, **__: pytest.fail("nothing was left to train"))
        monkeypatch.setattr(figures, "judge", lambda *_, **__: pytest.fail("nothing was left to judge"))
        again = Coefficients(l1=(0.01, 0.3), jl=(0.5,), hybrid_jl=(0.5,)).run(Setup(BASE, Dataset.of(store), lab))
        assert again.rows == ablation.rows
        assert times(lab.place.runs) == before

    def test_a_wider_grid_trains_what_is_new(self, ablation: Result, store: ActivationStore, lab: Lab) -> None:
        before = times(lab.place.runs)
        wider = Coefficients(l1=(0.01, 0.1, 0.3), jl=(), hybrid_jl=()).run(Setup(BASE, Dataset.of(store), lab))
        assert {path: times(lab.place.runs)[path] for path in before} == before
        assert len([path for path in times(lab.place.runs) if path.name == figures.STUDY.split("/")[1]]) == 6
        assert wider.runs[0] == ablation.runs[0] and wider.runs[2] == ablation.runs[1]

    def test_what_was_not_judged_is(self, ablation: Result, store: ActivationStore, lab: Lab) -> None:
        path = lab.place.runs / ablation.runs[2]["run"] / figures.STUDY
        kept = path.read_bytes()
        path.unlink()
        assert JL_ALONE.run(Setup(BASE, Dataset.of(store), lab)).runs == [ablation.runs[2]]
        assert path.read_bytes() == kept

    def test_figures_of_before_a_figure_was_added_are_found_again(
        self, ablation: Result, store: ActivationStore, lab: Lab
    ) -> None:
        run = Run(lab.place.runs / ablation.runs[2]["run"])
        path = run.path / figures.STUDY
        kept, figures_of = path.read_text(), run.read_json(figures.STUDY)
        run.write_json(figures.STUDY, {k: v for k, v in figures_of.items() if k not in ("rows", "jl")})
        assert JL_ALONE.run(Setup(BASE, Dataset.of(store), lab)).runs == [ablation.runs[2]]
        assert path.read_text() == kept
        path.write_text("{")
        with pytest.raises(DamagedStore, match=r"study.json: is not what was written"):
            JL_ALONE.run(Setup(BASE, Dataset.of(store), lab))
        path.write_text(kept)

    def test_what_was_judged_on_less_is_judged_again(self, store: ActivationStore, lab: Lab, tmp_path: Path) -> None:
        few = replace(lab, place=replace(lab.place, runs=tmp_path), eval_config=EvalConfig(rows=64, dead_rows=0))
        rows = [
            JL_ALONE.run(Setup(BASE, Dataset.of(store), one)).rows[0]
            for one in (few, replace(few, eval_config=EvalConfig(dead_rows=0)), few)
        ]
        assert [row["rows"] for row in rows] == [64, 256, 256]
        assert rows[0]["fvu"] != rows[1]["fvu"] == rows[2]["fvu"]

    def test_an_interrupted_study_continues_and_ends_the_same(
        self, ablation: Result, store: ActivationStore, cache: Path, tmp_path: Path
    ) -> None:
        class Impatient(Silent):
            steps = 0

            def advance(self, n: int, **fields: float | int | str) -> None:
                self.steps += n
                if self.steps == 13:
                    raise KeyboardInterrupt

        def study(lab: Lab) -> Result:
            return Coefficients(l1=(0.01, 0.3), jl=(0.5,), hybrid_jl=(0.5,)).run(Setup(BASE, Dataset.of(store), lab))

        with pytest.raises(KeyboardInterrupt):
            study(lab_in(cache, tmp_path, progress=Impatient()))
        runs = [Run(path.parent) for path in tmp_path.glob("*/config.json")]
        assert len(runs) == 5 and all(run.has_checkpoint and not run.finished for run in runs)
        watched = Noted()
        assert study(lab_in(cache, tmp_path, progress=watched)).rows == ablation.rows
        assert any("continuing at step 8" in line for line in watched.lines)


class TestLab:
    def test_without_held_out_rows_nothing_is_trained(self, cache: Path, tmp_path: Path) -> None:
        recipe = activation_recipe(D, "float32", site="mlp_out")
        with ActivationWriter(tmp_path / "cache", "alone", recipe) as writer:
            extend(writer, planted(128, seed=3), ended=True)
        with pytest.raises(NotFound, match="no held-out rows beside it"):
            lab_in(tmp_path / "cache", tmp_path / "runs").train([Trial({}, BASE, Dataset.of(writer.store))])
        assert not (tmp_path / "runs").exists()

    def test_without_tokens_there_is_no_cross_entropy_and_nothing_is_trained(
        self, store: ActivationStore, cache: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(NotFound, match="leave out cross-entropy with `cross_entropy = False`"):
            lab_in(cache, tmp_path / "runs", cross_entropy=True).train([Trial({}, BASE, Dataset.of(store))])
        assert not (tmp_path / "runs").exists()

    def test_trials_of_the_same_settings_share_a_run(self, ablation: Result, store: ActivationStore, lab: Lab) -> None:
        config = TrainConfig.model_validate(Run(lab.place.runs / ablation.runs[0]["run"]).config["train"])
        rows = lab.rows([Trial({"name": name}, config, Dataset.of(store)) for name in ("a", "b")])
        assert [row["run"] for row in rows] == [ablation.runs[0]["run"]] * 2
        assert [row["name"] for row in rows] == ["a", "b"]

    def test_what_eval_found_is_taken_up(self, store: ActivationStore, lab: Lab, ablation: Result) -> None:
        run = Run(lab.place.runs / ablation.runs[0]["run"])
        run.write_json(EVALUATION, {"ce_clean": 3.0, "ce_spliced": 3.25, "ce_recovered_zero": 0.5})
        assert figures.judged(run) == {
            "ce_degradation": 0.25, "ce_recovered_zero": 0.5, "ce_recovered_mean": None, "true_to_learned": None,
            "learned_to_true": None, "recovered": None, "hungarian": None, "duplicates": None, "chance": None,
            "coefficient_r": None, "detection_f1": None, "merged_pairs": None, "cross_talk": None,
            "jacobian_cosine": None, "fvu_stores": None, "tokens": None,
        }  # fmt: skip
        (run.path / EVALUATION).unlink()

    def test_an_evaluation_of_before_a_figure_was_there_is_not_damage(
        self, store: ActivationStore, lab: Lab, tmp_path: Path
    ) -> None:
        """What it lacks is computed anew, with everything else that goes with it."""
        alone = replace(lab, place=replace(lab.place, runs=tmp_path))
        fresh = JL_ALONE.run(Setup(BASE, Dataset.of(store), alone))
        run = Run(tmp_path / fresh.runs[0]["run"])
        (run.path / figures.STUDY).unlink()
        whole = {name: fresh.rows[0][name] for name in ("fvu", "l0", "dead_fraction", "rows")}
        for older in (
            whole | {"details": {"dead_rows": 384, "reconstruction": {}, "sparsity": {"l0": 1.0}}},
            whole | {"details": {}},
            {"rows": 256},
            {**dict.fromkeys(figures.of_rows()), "rows": 256},
            {},
        ):
            run.write_json(EVALUATION, older)
            assert JL_ALONE.run(Setup(BASE, Dataset.of(store), alone)).rows == fresh.rows
            (run.path / figures.STUDY).unlink()

    def test_the_length_is_in_the_settings(self, store: ActivationStore) -> None:
        """A store may grow: what is trained then must see as many rows as what was trained before."""
        open_ended = BASE.model_copy(update={"steps": None})
        assert of_equal_rows(open_ended, [store]).rows == 1024
        assert of_equal_rows(open_ended.model_copy(update={"rows": 5000}), [store]).rows == 5000
        assert of_equal_rows(BASE, [store]) is BASE


class TestResult:
    def test_the_files_agree(self, ablation: Result, tmp_path: Path) -> None:
        paths = ablation.write(tmp_path / "a" / "b")
        assert set(paths) == {"table", "results", "plot"} and all(Path(path).exists() for path in paths.values())
        read = list(csv.DictReader(Path(paths["table"]).read_text().splitlines()))
        found = json.loads(Path(paths["results"]).read_text())
        assert found["study"] == "coefficients" and found["runs"] == ablation.runs
        assert [row["run"] for row in read] == [row["run"] for row in found["runs"]]
        assert [float(row["fvu"]) for row in read] == [row["fvu"] for row in found["runs"]]
        assert read[0]["jl_coefficient"] == "" and Path(paths["plot"]).read_bytes()[:4] == b"\x89PNG"

    def test_seeds_are_averaged_in_the_table(self, store: ActivationStore, lab: Lab) -> None:
        result = Coefficients(l1=(0.01,), jl=(), hybrid_jl=()).run(Setup(BASE, Dataset.of(store), lab, seeds=2))
        assert [row["seed"] for row in result.runs] == [0, 1]
        (row,) = result.table
        pair = [one["fvu"] for one in result.runs]
        assert row["seeds"] == 2 and row["fvu"] == pytest.approx(sum(pair) / 2) and row["l1_coefficient"] == 0.01
        assert row["fvu_sd"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)


def test_a_panel_is_there_where_something_can_be_seen() -> None:
    """A line without marks takes two points: of a training of one logged step there is no curve."""
    assert not Panel("y", "x", {"a": [(1, 2.0)], "b": [(1, None), (2, 3.0)]}, marks=False).there
    assert Panel("y", "x", {"a": [(1, 2.0), (2, 2.0)]}, marks=False).there
    assert Panel("y", "x", {"a": [(1, 2.0)]}).there and not Panel("y", "x", {"a": [(1, None)]}).there


@pytest.mark.parametrize(("values", "low", "high"), [([1.0, 1.0001], 0.95, 1.05), ([1.0, 3.0], 0.9, 3.1)])
def test_noise_does_not_fill_an_axis(values: list[float], low: float, high: float) -> None:
    axis = Figure().subplots()
    axis.plot([0, 1], values)
    calm(axis)
    assert axis.get_ylim() == pytest.approx((low, high), abs=2e-3)
