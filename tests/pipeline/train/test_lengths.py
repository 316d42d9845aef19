"""Lengths in steps: a training that ends before one says so; one that could not be what was asked is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_stores import write_activations

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import ARCHITECTURES
from sae.pipeline.saes.config import IN_STEPS
from sae.pipeline.train.alignment import AlignConfig
from sae.pipeline.train.resampling import Reinitialise, Resample
from sae.pipeline.train.stage import TrainConfig, open_run, train

ROWS = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("tag", ARCHITECTURES)
def test_lengths_are_known_as_such(tag: str) -> None:
    """So that a training which ends before one of them can say so."""
    for kind in (ARCHITECTURES[tag].config_type, Resample, Reinitialise, AlignConfig):
        for name, field in kind.model_fields.items():
            says = re.search(r"^steps (over which|.*below 1, a share of the training($|;))", field.description or "")
            assert bool(says) == (IN_STEPS in field.metadata), name


def test_a_training_that_ends_before_a_length_says_so(tmp_path: Path) -> None:
    store = write_activations(tmp_path, ROWS, ended=True)

    folders: list[Run] = []

    def noted(sae: dict[str, Any], **changes: Any) -> list[str]:
        config = TrainConfig.model_validate({"sae": {"d_sae": 16, **sae}, "batch": 32, "steps": 3, **changes})
        notes = Notes()
        run = open_run(config, Dataset.of(store), tmp_path / "runs", f"{len(folders)}", resume=False)
        folders.append(run)
        train([run], Dataset.of(store), notes, device="cpu")
        return [line.partition(":")[0] for line in notes.lines if "never due, within the 3 steps" in line]

    assert noted({"arch": "jl"}) == ["train.sae.jl_warmup = 2000 (jl)"]
    assert noted({"arch": "topk", "k": 2, "k_start": 4, "k_anneal": 4}) == ["train.sae.k_anneal = 4 (topk)"]
    for revive, lines in (
        ({"every": 8}, ["train.revive.every = 8"]),
        ({"every": 3}, ["train.revive.every = 3"]),  # until four fifths
        ({"every": 1, "rewarm": 4}, ["train.revive.rewarm = 4"]),
        ({"every": 2}, []),
    ):
        sae = {"arch": "l1", "warmup": 3, "target_l0": None}
        assert noted(sae, revive={"kind": "resample", "rows": 64, **revive}) == lines
    assert noted({"arch": "vsae_iso", "kl_warmup": 4}) == ["train.sae.kl_warmup = 4 (vsae_iso)"]
    assert not noted({"arch": "topk", "k": 2, "k_anneal": 4})  # from k to k
    assert not noted({"arch": "vsae_iso", "kl_warmup": 4, "kl_coefficient": 0, "warmup": 4})  # of weights that are 0


@pytest.mark.parametrize("arch", ["hybrid", "l1", "vsae_iso", "molt"])
def test_a_target_that_nothing_would_be_steered_to_is_refused(tmp_path: Path, arch: str) -> None:
    store = write_activations(tmp_path, ROWS, ended=True)
    sae = {"arch": arch, "target_l0": 4, "coefficient": 0.1, "warmup": 30}
    config = TrainConfig.model_validate({"sae": sae, "batch": 32, "steps": 30})
    with pytest.raises(SaeError, match=r"^train\.sae\.warmup: 30 leaves none of 30 steps to steer L0"):
        open_run(config, Dataset.of(store), tmp_path / "runs", None, resume=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sae", "missed"),
    [
        ({"arch": "l1", "target_l0": 1.5}, True),
        ({"arch": "jumprelu", "penalty": "l0_target", "theta_init": 0.01, "target_l0": 1.5}, True),
        ({"arch": "l1", "target_l0": 8.5}, False),
        ({"arch": "l1"}, False),
    ],
)
def test_a_target_that_was_not_come_to_is_told_of(tmp_path: Path, sae: dict[str, Any], missed: bool) -> None:
    """Two steps leave half of 16 latents active; a constant coefficient has no target."""
    store = write_activations(tmp_path, ROWS, ended=True)
    given = {"d_sae": 16, "coefficient": 0.01, **sae}
    config = TrainConfig.model_validate({"sae": given, "batch": 128, "steps": 2, "lr": 1e-5})
    notes = Notes()
    train([open_run(config, Dataset.of(store), tmp_path / "runs", "it", resume=False)], Dataset.of(store), notes)
    line = r"it: L0 is [0-9.]+ at the end, not near train\.sae\.target_l0 = 1\.5; train longer, or say"
    assert any(re.match(line, one) for one in notes.lines) == missed


def test_a_target_of_latents_that_are_never_off_is_refused(tmp_path: Path) -> None:
    store = write_activations(tmp_path, ROWS, ended=True)
    sae = {"arch": "vsae_iso", "target_l0": 4, "mean": "identity"}
    config = TrainConfig.model_validate({"sae": sae, "batch": 32})
    with pytest.raises(SaeError, match=r"^train\.sae\.target_l0: 4 of latents that are never 0, as mean: identity"):
        open_run(config, Dataset.of(store), tmp_path / "runs", None, resume=False)


def test_the_length_is_that_on_the_rows_trained_on(tmp_path: Path) -> None:
    """64 of 256 rows are two steps, not eight."""
    store = write_activations(tmp_path, ROWS, ended=True)
    sae = {"arch": "l1", "target_l0": 4, "warmup": 2}
    config = TrainConfig.model_validate({"sae": sae, "batch": 32, "rows": "all", "store_rows": 64})
    with pytest.raises(SaeError, match="warmup: 2 leaves none of 2 steps"):
        open_run(config, Dataset.of(store), tmp_path / "runs", None, resume=False)
