"""Sparse autoencoders against variational ones on a toy with pairs."""

import json
from pathlib import Path

import pytest
from support.small_studies import BASE

from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.harvest.sources.toy import ToyConfig, ToySource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.study import Setup
from sae.pipeline.studies.tables import Result
from sae.pipeline.studies.variational import SAEsAndVariational, differences

TOY = ToyConfig(
    features=12, hidden=8, probability=0.1, correlated_pairs=1, anticorrelated_pairs=2, steps=60, batch=128,
    rows=512, validation_rows=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    root = tmp_path_factory.mktemp("toy")
    return harvest(ToySource.of_settings(TOY, Origins(root), Silent()), root, Silent()).stores["train"][0]


@pytest.fixture(scope="module")
def toy_lab(toy: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    from support.small_studies import lab_in

    return lab_in(toy.path.parents[1], tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def result(toy: ActivationStore, toy_lab: Lab) -> Result:
    return SAEsAndVariational(ks=(2,), kl=(0.5,)).run(Setup(BASE, Dataset.of(toy), toy_lab, seeds=2))


def test_every_kind_at_every_l0_and_those_without_a_head(result: Result, toy_lab: Lab) -> None:
    kinds = [(row["dictionary"], row["k"], row["kl"]) for row in result.runs[::2]]
    heads = [(f"vsae_{prior}", *more) for prior in ("iso", "mix", "multi") for more in ((2, 0.01), (None, 0.5))]
    assert kinds == [("topk", 2, None), ("l1", 2, None), *heads] and len(result.runs) == 16
    configs = {row["dictionary"]: Run(toy_lab.place.runs / row["run"]).config["train"]["sae"] for row in result.runs}
    assert configs["l1"]["target_l0"] == 2 and configs["topk"]["k"] == 2
    pairs = configs["vsae_mix"]["correlated_pairs"], configs["vsae_mix"]["anticorrelated_pairs"]
    assert pairs == (1, 2), "as the toy has"
    for row in result.runs:
        assert row["l0"] <= 2 or row["k"] is None or row["dictionary"] == "l1"
        assert all(row[name] is not None for name in ("fvu", "true_to_learned", "merged_pairs", "merged_pairs_chance"))


def test_its_files_and_what_it_says(result: Result, tmp_path: Path) -> None:
    found = json.loads(Path(result.write(tmp_path)["results"]).read_text())
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert len(found["table"]) == 8 and {row["seeds"] for row in found["table"]} == {2}
    assert [note.partition(",")[0] for note in found["notes"]] == [
        f"{kind} against topk" for kind in ("l1", "vsae_iso", "vsae_mix", "vsae_multi")
    ]


def test_a_difference_is_one_beyond_the_spread_of_seeds() -> None:
    def rows(kind: str, *fvus: float) -> list[dict[str, object]]:
        more = {"true_to_learned": 0.9, "merged_pairs": None}
        return [{"dictionary": kind, "k": 4, "fvu": fvu, **more} for fvu in fvus]

    assert differences([*rows("topk", 0.1, 0.2), *rows("l1", 0.2, 0.3)]) == [
        "l1 against topk, k 4: FVU, held-out rows no difference; true features found no difference"
    ]
    (note,) = differences([*rows("topk", 0.1, 0.12), *rows("vsae_iso", 0.4, 0.42)])
    assert "FVU, held-out rows +0.3;" in note
    assert differences([*rows("topk", 0.1), *rows("l1", 0.5)]) == [], "one seed has no spread"
    assert differences(rows("vsae_mix", 0.1, 0.2)) == []
