"""What pulling dictionaries together buys, on rows whose true features are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.harvesting import synthesize
from support.small_studies import BASE
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.formats import trained
from sae.pipeline.harvest.sources.synthetic import Groups, SyntheticConfig
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.studies.alignment import SeedAlignment, correlation, nearest, panels
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.plots import fitted
from sae.pipeline.studies.study import Setup

PLANTED = SyntheticConfig(
    d=12, features=24, presence=Groups(groups=4, active=3), rows=1024, validation_rows=256, codec="float32"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    root = tmp_path_factory.mktemp("cache")
    synthesize(PLANTED, root, Silent())
    return root


@pytest.fixture(scope="module")
def store(cache: Path) -> ActivationStore:
    (found,) = [store for path in cache.glob("activations/*") if (store := ActivationStore(path)).split == "train"]
    return found


def test_a_group_for_every_weight(store: ActivationStore, lab: Lab, tmp_path: Path) -> None:
    base = BASE.model_copy(update={"steps": 200, "checkpoint_every": 100})
    result = SeedAlignment(by=("dec", "x_hat"), weights=(0.0, 2.0)).run(Setup(base, Dataset.of(store), lab, seeds=2))
    assert [(row["by"], row["weight"], row["seed"]) for row in result.runs] == [
        ("dec", 0, 0), ("dec", 0, 1), ("dec", 2, 0), ("dec", 2, 1), ("x_hat", 2, 0), ("x_hat", 2, 1),
    ]  # fmt: skip
    free, pulled = result.table[0], result.table[1]
    assert pulled["agreement"] > free["agreement"] + 0.03 and free["agreement_chance"] == pulled["agreement_chance"]
    for row in result.runs:
        trained_with = Run(lab.place.runs / row["run"]).metrics()[-1]
        assert row["agreement"] == pytest.approx(trained_with["agreement"], rel=1e-4)
        assert row["true_to_learned"] == pytest.approx(trained_with["recovery"], rel=1e-4)
    result.write(tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 1000

    before = {path: path.stat().st_mtime_ns for path in lab.place.runs.rglob("*.*")}
    again = SeedAlignment(by=("dec", "x_hat"), weights=(0.0, 2.0)).run(Setup(base, Dataset.of(store), lab, seeds=2))
    assert again.runs == result.runs
    assert {path: path.stat().st_mtime_ns for path in lab.place.runs.rglob("*.*")} == before


def test_latents_agree_on_what_is_true(store: ActivationStore, lab: Lab) -> None:
    base = BASE.model_copy(update={"steps": 200, "checkpoint_every": 100})
    result = SeedAlignment(weights=(0.0,)).run(Setup(base, Dataset.of(store), lab, seeds=3))
    truth = store.truth
    assert truth is not None
    tables = [trained.load_run(Run(lab.place.runs / row["run"])).W_dec.detach() for row in result.runs]

    def closest(a: Tensor, others: Tensor) -> list[float]:
        return [max(float(torch.cosine_similarity(x, y, dim=0)) for y in others) for x in a]

    agreed, true = closest(tables[0], torch.cat(tables[1:])), closest(tables[0], truth)
    (kept,) = result.extra["latents"]
    assert kept["agreement"] == pytest.approx(agreed, rel=1e-4) and kept["truth"] == pytest.approx(true, rel=1e-4)
    r = torch.corrcoef(torch.tensor([agreed, true]))[0, 1].item()
    assert result.runs[0]["agreement_truth_r"] == pytest.approx(r, rel=1e-3) and r > 0
    assert kept["r"] == result.runs[0]["agreement_truth_r"]
    scatter = panels(result.table, result.extra["latents"])[-1]
    assert scatter.scattered and [*scatter.curves] == [f"dec, weight 0: r = {kept['r']:.2f}"]
    (points,) = scatter.curves.values()
    assert [*points] == list(zip(kept["agreement"], kept["truth"], strict=True)) and len(points) == BASE.sae.d_sae


def test_the_line_through_a_scatter() -> None:
    points = [(0.1, 0.3), (0.2, 0.2), (0.9, 0.8), (0.5, 0.7)]
    slope, start = np.polyfit([x for x, _ in points], [y for _, y in points], 1)
    assert fitted(points) == [(x, pytest.approx(start + slope * x)) for x in (0.1, 0.9)]
    assert fitted([(0.5, 0.1), (0.5, 0.2)]) == [] == fitted([])


def test_correlation_and_nearest() -> None:
    a = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(a, -3 * a + 1) == pytest.approx(-1) and correlation(a, torch.ones(3)) is None
    assert nearest(torch.eye(2), torch.tensor([[2.0, 0.0], [-1.0, 0.0]])).tolist() == pytest.approx([1, 0])
