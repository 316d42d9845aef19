"""Many dictionaries at once: every combination, the same batches, a folder each; compared in a table and a plot."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.small_stores import shrunk, write_activations

from sae.cache import activations
from sae.cache.activations import ActivationStore
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batches
from sae.cache.printable import printable
from sae.cache.runs import Run
from sae.cache.store.manifest import Windows
from sae.configs import resolve
from sae.pipeline.report.compare import as_csv, compare, front, over_seeds
from sae.pipeline.report.plots import absent, axes_of, kinds_of, pareto
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.train.stage import TrainConfig, open_run, train
from sae.pipeline.train.sweep import combinations, of_seeds, open_all, sweep

BASE = {"sae.d_sae": 24, "sae.k": 4, "batch": 64, "steps": 6, "log_every": 3, "initial_rows": 64}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActivationStore]:
    with shrunk() as patch:
        patch.setattr(activations, "CHUNK_ROWS", 64)
        patch.setattr(activations, "WINDOWS", Windows(64, 256))
        rows = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
        yield write_activations(tmp_path_factory.mktemp("cache"), rows, "float32", ended=True)


def configs(*axes: str, seeds: int | None = None) -> list[TrainConfig]:
    found = [resolve("train", TrainConfig, axes={**BASE, **one}) for one in combinations(axes)]
    return found if seeds is None else of_seeds(found, seeds)


@pytest.fixture(scope="module")
def runs(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Four finished runs: two values of k, two seeds."""
    found = open_all(configs("k=2,4", seeds=2), Dataset.of(store), tmp_path_factory.mktemp("runs"))
    sweep(found, Dataset.of(store), Silent(), device="cpu")
    return found


class TestCombinations:
    def test_every_value_meets_every_other(self) -> None:
        found = combinations(["k=16,32", "lr=1e-4,3e-4", "betas=[0.9, 0.99],[0.9, 0.999]"])
        assert len(found) == 8
        assert {"sae.k": 16, "lr": 3e-4, "betas": [0.9, 0.99]} in found

    @pytest.mark.parametrize("key", ["k", "arch.k", "sae.k", "train.sae.k"])
    def test_a_setting_of_the_architecture_may_be_written_in_several_ways(self, key: str) -> None:
        assert combinations([f"{key}=4"]) == [{"sae.k": 4}]

    def test_seeds_follow_the_first(self) -> None:
        first = [TrainConfig(seed=7, lr=lr) for lr in (1e-4, 3e-4)]
        assert [(one.lr, one.seed) for one in of_seeds(first, 2)] == [(1e-4, 7), (1e-4, 8), (3e-4, 7), (3e-4, 8)]

    @pytest.mark.parametrize("axis", ["k", "k=", "=3", "k=1,,2", "k=1,", "k=,1", "sae.=3", "", "k=[1", "k=1],[2"])
    def test_what_is_no_axis_is_refused(self, axis: str) -> None:
        with pytest.raises(SaeError, match=r"sweep = .*write it as"):
            combinations([axis])

    def test_what_is_there_twice_is_refused(self) -> None:
        with pytest.raises(SaeError, match="swept twice"):
            combinations(["k=1,2", "sae.k=3"])
        with pytest.raises(SaeError, match="the seed is swept already"):
            of_seeds([TrainConfig(seed=1), TrainConfig(seed=2)], 3)
        for axis in ("k=1,1", "lr=1e-3,0.001"):
            with pytest.raises(SaeError, match="a value stands there twice"):
                combinations([axis])

    def test_numbers_out_of_any_sense_are_refused(self) -> None:
        with pytest.raises(SaeError, match="that is 1,000,000,000,000 dictionaries; at most 10,000"):
            of_seeds([TrainConfig()], 10**12)
        with pytest.raises(SaeError, match="that is 10,201 dictionaries"):
            combinations([f"k={','.join(map(str, range(101)))}", f"d_sae={','.join(map(str, range(101)))}"])
        with pytest.raises(SaeError, match="do not fit into 64 bits"):
            of_seeds([TrainConfig(seed=2**63 - 1)], 2)


class TestSweep:
    def test_one_pass_serves_all_and_each_equals_a_solo_run(
        self, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[int] = []
        whole = Batches.__iter__
        monkeypatch.setattr(Batches, "__iter__", lambda self: (passes.append(1), whole(self))[1])
        runs = open_all(configs("k=2,4", "lr=1e-3,3e-3"), Dataset.of(store), tmp_path)
        sweep(runs, Dataset.of(store), Silent(), device="cpu")
        assert len(passes) == 1 and len(runs) == 4 and all(run.finished for run in runs)
        for config, run in zip(configs("k=2,4", "lr=1e-3,3e-3"), runs, strict=True):
            alone = open_run(config, Dataset.of(store), tmp_path / "alone", run.name, resume=False)
            train([alone], Dataset.of(store), Silent(), device="cpu")
            ours, its = run.load_weights()[0], alone.load_weights()[0]
            assert all(torch.equal(ours[name], its[name]) for name in its)

    def test_another_batch_is_another_pass(
        self, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[int] = []
        whole = Batches.__iter__
        monkeypatch.setattr(Batches, "__iter__", lambda self: (passes.append(self.batch), whole(self))[1])
        sweep(
            open_all(configs("batch=32,64", seeds=2), Dataset.of(store), tmp_path),
            Dataset.of(store),
            Silent(),
            device="cpu",
        )
        assert sorted(passes) == [32, 64]

    def test_a_repeated_sweep_trains_only_what_is_missing(
        self, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sweep(open_all(configs("k=2"), Dataset.of(store), tmp_path), Dataset.of(store), Silent(), device="cpu")
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        runs = open_all(configs("k=2,4"), Dataset.of(store), tmp_path)
        assert [run.finished for run in runs] == [True, False]
        sweep(runs, Dataset.of(store), Silent(), device="cpu")
        assert all(run.finished for run in runs)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        monkeypatch.setattr("sae.pipeline.train.sweep.train", lambda *_, **__: pytest.fail("nothing was left to train"))
        sweep(open_all(configs("k=2,4"), Dataset.of(store), tmp_path), Dataset.of(store), Silent(), device="cpu")

    def test_combinations_that_come_to_the_same_are_refused(self, store: ActivationStore, tmp_path: Path) -> None:
        with pytest.raises(SaeError, match="two of the combinations"):
            open_all([*configs("k=2"), *configs("k=2")], Dataset.of(store), tmp_path)


class TestCompare:
    def test_a_row_a_run_with_what_differs(self, runs: list[Run]) -> None:
        rows = compare(runs)
        assert [row["sae.k"] for row in rows] == [2, 2, 4, 4]
        assert [row["seed"] for row in rows] == [0, 1, 0, 1]
        assert "lr" not in rows[0] and rows[0]["sae.arch"] == "topk"
        parameters = 24 * 8 * 2 + 24 + 8
        for row, run in zip(rows, runs, strict=True):
            assert row["train_seconds_per_step"] > 0
            assert row["train_megabytes"] == pytest.approx(parameters * 4 * 4 / 1e6, rel=0.2)  # weights, grads, moments
            assert row["train_fvu"] == run.metrics()[-1]["fvu"] and row["fvu"] is None

    def test_a_setting_only_one_architecture_has_is_no_difference(self, store: ActivationStore, tmp_path: Path) -> None:
        runs = open_all(configs("arch=topk,batchtopk"), Dataset.of(store), tmp_path)
        sweep(runs, Dataset.of(store), Silent(), device="cpu")
        shown = [key for key in compare(runs)[0] if key.startswith("sae.")]
        assert shown == ["sae.arch"]

    def test_held_out_figures_are_those_of_eval(self, runs: list[Run]) -> None:
        judged = {"fvu": 0.25, "l0": 2.0, "dead_fraction": 0.0, "ce_clean": 3.0, "ce_spliced": 3.5,
                  "ce_recovered_zero": 0.9, "ce_recovered_mean": None}  # fmt: skip
        runs[0].write_json("eval/eval.json", judged)
        row = compare(runs)[0]
        assert (row["fvu"], row["ce_degradation"], row["ce_recovered_mean"]) == (0.25, 0.5, None)
        (runs[0].path / "eval" / "eval.json").unlink()

    def test_seeds_become_mean_and_deviation(self, runs: list[Run]) -> None:
        rows = compare(runs)
        merged = over_seeds(rows)
        assert [(row["sae.k"], row["seeds"]) for row in merged] == [(2, 2), (4, 2)]
        pair = [row["train_fvu"] for row in rows[:2]]
        assert merged[0]["train_fvu"] == pytest.approx(sum(pair) / 2)
        assert merged[0]["train_fvu_sd"] == pytest.approx(abs(pair[0] - pair[1]) / 2**0.5)
        assert merged[0]["fvu"] is None and merged[0]["fvu_sd"] is None

    def test_the_csv_reads_back(self, runs: list[Run]) -> None:
        rows = compare(runs)
        read = list(csv.DictReader(io.StringIO(as_csv(rows))))
        assert [row["run"] for row in read] == [run.name for run in runs]
        assert float(read[0]["train_fvu"]) == rows[0]["train_fvu"] and read[0]["fvu"] == ""

    def test_the_csv_holds_no_formulas(self) -> None:
        """Numbers stay what they are, also negative ones; a text that would be computed begins with an apostrophe."""
        formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "＝1+1", '=HYPERLINK("x","y")']
        steering = ["\t=1", "\r=1", "\n=1", "x\r=1", "\x1b[2J", "\ufeffx"]
        others = ["a=1", " plain", "'quoted", "", "topk", -1.5, 2, -3, True, None, [1, -2]]
        rows = [{"run": cell, "=setting": cell} for cell in [*formulas, *steering, *others]]
        header, *lines = csv.reader(io.StringIO(as_csv(rows), newline=""))
        assert header == ["run", "'=setting"]
        texts = ["'" + cell for cell in formulas] + [printable(cell) for cell in steering]
        assert lines == [[cell, cell] for cell in [*texts, *("" if c is None else str(c) for c in others)]]

    def test_names_are_no_formulas_of_a_plot(self, runs: list[Run], tmp_path: Path) -> None:
        rows = [{**row, "sae.arch": r"$\frac$", "run": r"\$x$_{$", "rows": None} for row in compare(runs)]
        pareto([*rows, {**rows[0], "train_l0": 0.0}], tmp_path / "front.png")
        assert (tmp_path / "front.png").stat().st_size > 1000

    @pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
    def test_the_plot_is_drawn(self, runs: list[Run], tmp_path: Path, ending: str) -> None:
        pareto(compare(runs), tmp_path / f"front.{ending}")
        assert (tmp_path / f"front.{ending}").stat().st_size > 1000

    def test_what_cannot_be_plotted_is_said(self, runs: list[Run], tmp_path: Path) -> None:
        with pytest.raises(SaeError, match=r"front.txt.*\.png"):
            pareto(compare(runs), tmp_path / "front.txt")
        (tmp_path / "file").touch()
        with pytest.raises(SaeError, match="cannot write here"):
            pareto(compare(runs), tmp_path / "file" / "front.png")
        nothing = [{**row, "train_l0": None} for row in compare(runs)]
        with pytest.raises(SaeError, match="no run has both"):
            pareto(nothing, tmp_path / "front.png")

    def test_unlike_amounts_are_marked_and_absent_runs_named(self, runs: list[Run], tmp_path: Path) -> None:
        base = [{**row, "l0": 2.0 + i, "fvu": 0.5 / (i + 1)} for i, row in enumerate(compare(runs))]
        rows = [{**row, "rows": 64 if i < 2 else 1000} for i, row in enumerate(base)]
        rows[3] |= {"rows": None, "fvu": None, "l0": None}
        texts = []
        for shown in (rows, [{**row, "rows": 64} for row in base]):
            pareto(shown, tmp_path / "front.svg")
            texts.append((tmp_path / "front.svg").read_text())
        assert "topk, on 64 rows" in texts[0] and "topk, on 1,000 rows" in texts[0]
        assert f"not judged: {runs[3].name}" in texts[0]
        assert "rows -->" not in texts[1].replace("held-out rows -->", "") and "not judged" not in texts[1]
        between = [{**rows[0], "activations": said} for said in ("1.mlp_out", "1.mlp_in -> 1.mlp_out")]
        assert kinds_of([*rows, *between]) == ["topk"] * (len(rows) + 1) + ["topk transcoder"]
        assert kinds_of(between[1:]) == ["topk"]
        zero, none = {**rows[0], "l0": 0.0}, {**rows[1], "ce_degradation": None}
        panels = [axes_of("fvu"), axes_of("ce_degradation")]
        said = f"L0 of 0: {runs[0].name}; no cross-entropy added, nats a token: {runs[1].name}"
        assert absent([zero, none], panels) == said
        assert absent([{**none, "bits": None}], [axes_of("fvu", "bits")]) == f"no bits a row: {runs[1].name}"

    def test_no_runs_is_said(self) -> None:
        with pytest.raises(NotFound, match="no runs"):
            compare([])


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (0.5, 6.0)]
    slow = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    assert front(points) == slow == [(0.5, 6.0), (1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    mirrored = [(x, -y) for x, y in points]
    assert front(mirrored, "high") == [(x, -y) for x, y in slow]
    assert front(points, None) == sorted(points)  # of a figure with no better end nothing is left out
