"""The registry of metrics: read as text or imported it is the same, and a metric is known everywhere by being there."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.command_line import done, sae

from sae.cache.runs import EVALUATION, Run
from sae.pipeline.evaluate.judging import Evaluation
from sae.pipeline.metrics.figures import Figure, available, completed, declared, figures
from sae.pipeline.metrics.metric import METRICS, Encoded, Metric, Places, Subject, metrics_of, register
from sae.pipeline.report.compare import compare, outdated
from sae.pipeline.report.scores import scores_html
from sae.pipeline.saes import create, parse

MAKE = "synthesize --rows 20k --d 16 --features 24 --groups 3 --active 2 --set synthesize.validation_rows=100"
TRAIN = "train --d-sae 24 --k 2 --steps 8 --batch 256"


class Worst(Metric):
    """The row that is reconstructed worst. It says more."""

    name = "worst"
    needs = ("rows",)
    figures = (Figure("worst_row", "worst row", "largest squared error of a row", "low"),)

    def __init__(self) -> None:
        self.worst = 0.0

    def update(self, batch: Encoded) -> None:
        self.worst = max(self.worst, (batch.y - batch.y_hat).square().sum(1).max().item())

    def result(self) -> dict[str, float]:
        return {"worst_row": self.worst}


@pytest.fixture
def worst() -> Iterator[None]:
    """A metric written in a test, known while the test runs."""
    register(Worst)
    yield
    del METRICS["worst"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of synthetic rows, which take no language model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    done(MAKE)
    return tmp_path


def test_the_text_of_the_metrics_says_what_importing_them_does() -> None:
    program = (
        "import sys; from sae.pipeline.metrics.figures import declared, available\n"
        "before = declared(); assert 'torch' not in sys.modules\n"
        "from sae.pipeline.metrics.metric import METRICS, Subject, metrics_of\n"
        "from sae.pipeline.saes import create, parse\n"
        "sae = create(parse({'arch': 'topk', 'd_sae': 8, 'k': 2}), 4)\n"
        "metrics_of(Subject(sae), available(model=False, truth=False))\n"
        "assert before == declared() and len(before) == len(METRICS) > 5, (before, declared())\n"
        "assert all(one.help for one in before)"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


def test_every_figure_is_told_once_and_by_the_metric_that_declares_it() -> None:
    sae = create(parse({"arch": "topk", "d_sae": 12, "k": 3}), 6)
    every = figures()
    assert len({one.key for one in every}) == len(every)
    assert all(one.title and one.meaning and one.key.isidentifier() for one in every)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    codes = sae.encode(x)
    losses = {name: (torch.rand(4, 5) + i, torch.rand(4, 5)) for i, name in enumerate(("sae", "zero", "mean"), 3)}
    truth = torch.randn(9, 6)
    places = Places(*torch.zeros(2, 4, 5, dtype=torch.int64))
    needs = available(model=True, truth=True, coefficients=True, pairs=True, mlp=True, stores=True, text=True)
    metrics = metrics_of(Subject(sae, truth, 2 * truth, ((0, 1),), torch.tanh, ("0.mlp_out",)), needs)
    assert [one.name for one in metrics] == [one.name for one in declared()]
    for metric in metrics:
        metric.update(Encoded(x, x, codes, sae.decode(codes)))
        metric.compare(Encoded(x, x, codes, sae.decode(codes)), torch.rand(40, 9))
        metric.search(codes)
        metric.splice(torch.rand(4, 5), losses, torch.ones(4, 5, dtype=torch.bool), places)
        assert [*metric.result()] == [one.key for one in metric.figures], metric.name


def test_what_a_metric_needs_decides_whether_it_is_made() -> None:
    subject = Subject(create(parse({"arch": "topk", "d_sae": 8, "k": 2}), 4))
    told = {one.name for one in metrics_of(subject, available(model=False, truth=False))}
    untold = {"downstream", "jacobian", "recovery", "coefficients", "detection", "pairs", "stores", "breakdown"}
    assert told == {one.name for one in declared()} - untold
    assert [one.name for one in metrics_of(subject, ["rows"])] == ["reconstruction", "row_error"]


def test_reconstruction_is_judged_against_the_target() -> None:
    """A transcoder's reconstruction has nothing to do with its input."""
    subject = Subject(create(parse({"arch": "topk", "d_sae": 8, "k": 2}), 3, 5))
    x, y = torch.randn(20, 3), torch.randn(20, 5)
    codes = subject.sae.encode(x)
    metric, _ = metrics_of(subject, ["rows"])
    metric.update(Encoded(x, y, codes, y))
    assert metric.result()["fvu"] == 0


def test_figures_are_nobody_elses() -> None:
    class Again(Worst):
        name = "again"
        figures = (Figure("fvu", "FVU", "the same once more"),)

    with pytest.raises(ValueError, match="metric again: another has fvu, too"):
        register(Again)
    assert "again" not in METRICS


def test_a_metric_tells_what_it_declares_and_nothing_else() -> None:
    class Silent(Worst):
        figures = (*Worst.figures, Figure("best_row", "best row", "smallest squared error of a row", "low"))

    assert Evaluation.of([Worst()]).as_json() == {"worst_row": 0.0, "details": {}}
    with pytest.raises(AssertionError, match=r"metric worst: tells \['worst_row'\]"):
        Evaluation.of([Silent()])


def test_a_metric_of_a_file_of_its_own_is_seen_everywhere(home: Path, worst: None) -> None:
    """In `eval.json` and its table, compare's columns, CSV and plot, the report, a study's table, and `sae list`."""
    done(f"{TRAIN} --name one")
    judged = done("eval one --json").json
    assert judged["worst_row"] > 0 and Run(home / "runs/one").read_json(EVALUATION) == judged
    table = done("eval one").out
    assert "worst_row" in table and "largest squared error of a row" in " ".join(table.split())
    (row,) = done("compare one --json --csv all.csv --y worst_row,fvu --plot front.svg").json["runs"]
    assert row["worst_row"] == judged["worst_row"] and row["kept_worst_row"] is None
    assert float(next(csv.DictReader((home / "all.csv").read_text().splitlines()))["worst_row"]) == judged["worst_row"]
    assert "worst row, held-out rows" in (home / "front.svg").read_text()
    assert "worst_row" in done("compare one").out
    assert '<th scope="row">worst row</th>' in scores_html(judged, 24, None)
    study = done("study coefficients --l1 0.1 --jl 1 --hybrid-jl 1 --d-sae 8 --steps 2 --out study --json").json
    assert study["runs"][0]["worst_row"] > 0 and "worst_row" in (home / "study/table.csv").read_text()
    assert {"name": "worst", "help": "The row that is reconstructed worst"} in done("list --json").json["metrics"]


def test_what_no_figure_is_cannot_be_drawn(home: Path) -> None:
    done(f"{TRAIN} --name one")
    for wrong in ("lustre", "train_fvu", "rows", "l0"):
        assert (
            f"--y {wrong}: the figures are fvu, row_error, bits, active_parameters, dead_fraction,"
            in sae(f"compare --y {wrong}").complaint
        )
    assert "--y fvu,chance: no run has both L0 and chance or fvu" in sae("compare --y fvu,chance").complaint
    assert "--y fvu: no run has both bits a row and fvu" in sae("compare --x bits --y fvu").complaint
    assert "--y bits: the figures are fvu, row_error, active" in sae("compare --x bits --y bits").complaint
    for wrong in ("fvu", "lo"):
        assert sae(f"compare --x '{wrong}'").complaint.endswith("are set against l0, active_parameters, bits")
    assert sae("compare --y fvu,fvu").complaint == "--y fvu,fvu: fvu is there twice"


# Evaluations of before a figure was there


def test_what_follows_from_other_figures_is_derived() -> None:
    old = {"ce_clean": 3.0, "ce_spliced": 3.25, "details": {"dead_rows": 7}, "kept": {"ce_clean": 2.0, "ce_spliced": 2}}
    found = completed(old)
    assert (found["ce_degradation"], found["dead_rows"], found["kept"]["ce_degradation"]) == (0.25, 7, 0)
    assert "ce_degradation" not in old and completed({"ce_degradation": 1.0, **old})["ce_degradation"] == 1.0
    assert completed({}) == {}
    for wrong in (None, "many", [3], 0.5, True):
        assert "dead_rows" not in completed({"details": {"dead_rows": wrong}})


def test_what_an_evaluation_lacks_is_said_and_found_again(home: Path) -> None:
    """By every command: no exit code of damage, a line that says so, and a new evaluation that has it."""
    done(f"{TRAIN} --name one")
    whole = done("eval one --json").json
    run = Run(home / "runs/one")
    for gone in ("fvu", "l0", "dead_fraction", "rows", "details", "mse"):
        run.write_json(EVALUATION, {name: value for name, value in whole.items() if name != gone})
        assert compare([run])[0].get(gone) is None
        table = done("compare one")
        assert (f"judged before there was {gone}: one; `sae eval RUN` adds it" in table.err) == (
            gone in ("fvu", "l0", "dead_fraction")
        )
        assert scores_html(run.evaluation() or {}, 24, None)
        assert done("eval one --json").json == whole == run.read_json(EVALUATION)
        assert outdated([run]) == []
