"""Activation functions side by side: every variant, one L0 on request, the box."""

import json
from pathlib import Path

import pytest
from support.small_studies import BASE, LONGER

from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.studies.activations import KINDS, Activations, apart, box, losses
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.study import Setup
from sae.pipeline.studies.tables import Result

SPARSE = LONGER.model_copy(update={"sae": LONGER.sae.model_copy(update={"k": 2})})


@pytest.fixture(scope="module")
def result(store: ActivationStore, lab: Lab) -> Result:
    """The activation functions as they come."""
    return Activations().run(Setup(BASE, Dataset.of(store), lab))


@pytest.fixture(scope="module")
def matched(store: ActivationStore, lab: Lab) -> Result:
    """The activation functions at one L0, of which the rows have more."""
    return Activations(match_l0=True).run(Setup(SPARSE, Dataset.of(store), lab))


class TestActivations:
    def test_every_variant_on_the_same_batches(self, result: Result, lab: Lab) -> None:
        assert [row["activation"] for row in result.runs] == list(KINDS)
        trainings = [Run(lab.place.runs / row["run"]).config["train"] for row in result.runs]
        assert [one["sae"]["arch"] for one in trainings] == ["l1", "shifted_relu", "jumprelu", "topk", "batchtopk"]
        assert [one["sae"].get("k") for one in trainings] == [None, None, None, 4, 4]
        assert all({**one, "sae": None} == {**trainings[0], "sae": None} for one in trainings)
        topk = result.runs[3]
        assert topk["l0"] <= 4 and topk["sparsity"] >= 1 - 4 / 32

    def test_different_l0s_are_said(self, result: Result) -> None:
        (note,) = result.notes
        assert note.startswith("L0 differs, from ") and "`match_l0`" in note
        assert apart([{"activation": "a", "l0": 10.0}, {"activation": "b", "l0": 12.0}]) == []
        assert len(apart([{"activation": "a", "l0": 10.0}, {"activation": "b", "l0": 12.1}])) == 1
        assert len(apart([{"activation": "a", "l0": 0.0}, {"activation": "b", "l0": 12.1}])) == 1

    def test_matching_brings_the_l0s_together(self, matched: Result) -> None:
        assert matched.extra["k"] == 2 and matched.extra["matched_l0"]
        penalised = matched.runs[:3]
        unmatched = [row["activation"] for row in penalised if abs(row["l0"] - 2) > 0.4]
        assert set(unmatched) <= {"jumprelu"}, "whose thresholds move slowly"
        l0s = [row["l0"] for row in matched.runs]
        assert any("trained for longer" in note for note in matched.notes) == (max(l0s) > 1.2 * min(l0s))

    def test_matching_again_only_reads(
        self, matched: Result, store: ActivationStore, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sae.pipeline.train.sweep.train", lambda *_, **__: pytest.fail("nothing was left to train"))
        again = Activations(match_l0=True).run(Setup(SPARSE, Dataset.of(store), lab))
        assert again.rows == matched.rows

    def test_the_plot_and_the_json_hold_every_variant(self, result: Result, tmp_path: Path) -> None:
        found = json.loads(Path(result.write(tmp_path)["results"]).read_text())
        assert list(found["history"]) == list(KINDS)
        assert found["history"]["topk"] == [entry for entry in found["history"]["topk"] if entry > 0]
        assert (tmp_path / "plot.png").stat().st_size > 1000

    def test_the_box_shows_every_variant(self, result: Result) -> None:
        for plain in (False, True):
            lines = box(result, plain=plain)
            assert len({len(line) for line in lines}) == 1
            for name, row in zip(KINDS, result.runs, strict=True):
                (line,) = [line for line in lines if line.split()[1:2] == [name]]
                assert f"{100 * row['sparsity']:.2f} %" in line and f"{row['mse']:.4g}" in line
        assert "\n".join(box(result, plain=True)).isascii()


def test_the_box_to_the_letter() -> None:
    columns = ("mse", "fvu", "l0", "sparsity", "dead_fraction")
    values = {"relu": (0.12345, 0.25, 71.0, 0.2787, 0.0), "topk": (12.0, None, 5.0, 0.9805, 0.5)}
    rows = [{"run": n, "activation": n, "seed": 0, **dict(zip(columns, v, strict=True))} for n, v in values.items()]
    extra = {"history": {"relu": [3.0, 2.0, 1.0], "topk": [1.0]}}
    result = Result("activations", ("activation",), columns, rows, lambda rows, path: None, extra=extra)
    assert box(result) == [
        "┌─────────────────────────────────────────────────────────────────────────────┐",
        "│ activation  loss (mse)     FVU    L0  sparsity     dead  loss over training │",
        "│ relu            0.1235  0.2500  71.0   27.87 %   0.00 %  █▅▁                │",
        "│ topk                12       -   5.0   98.05 %  50.00 %  ▁                  │",
        "└─────────────────────────────────────────────────────────────────────────────┘",
    ]
    assert box(result, plain=True)[0].strip("+-") == ""
    assert box(result, plain=True)[2].endswith("%  #+_                |")


def test_a_long_history_is_thinned_and_ends_with_the_end() -> None:
    class Logged:
        def metrics(self) -> list[dict[str, float]]:
            return [{"loss": float(i)} for i in range(1, 101)]

    found = losses(Logged())  # type: ignore[arg-type]
    assert len(found) == 24 and found[-1] == 100 and found == sorted(found)
