"""A whole training step, optimiser and bookkeeping included, on a device that runs ahead."""

from pathlib import Path

import pytest
import torch
from support.saes_kit import Planted
from support.small_stores import write_activations
from support.watching import watched

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.pipeline.parallel.ranks import SingleRank
from sae.pipeline.saes import Clock, kernels, placement
from sae.pipeline.train.coupled import CoupledTrainers
from sae.pipeline.train.stage import TrainConfig, open_run, run_name
from sae.pipeline.train.trainer import Trainer, products

SETTINGS = {"sae": {"arch": "topk", "k": 2, "d_sae": 16}, "batch": 32, "steps": 100, "log_every": 3}


def test_a_step_waits_where_metrics_are_logged_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "HOSTS", set())
    dataset, config = Dataset.of(write_activations(tmp_path, Planted()(64))), TrainConfig.model_validate(SETTINGS)
    device = torch.device("cpu")
    member = Trainer.begin(open_run(config, dataset, tmp_path, "it", resume=False), config, dataset, device)
    group, x = CoupledTrainers([member], None), Planted()(32)

    def step() -> None:
        group.step(Batch(x, x), Clock(member.done, 100, 32), SingleRank())

    assert [bool(watched(step).waited) for _ in range(6)] == [True, False, True, False, False, True]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_tf32_is_of_cards_that_have_it(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take it for float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    dataset = Dataset.of(write_activations(tmp_path, Planted()(64)))
    config = TrainConfig.model_validate({**SETTINGS, "precision": "tf32"})
    run = open_run(config, dataset, tmp_path, "it", resume=False)
    with pytest.raises(SaeError, match=rf"^train\.precision = tf32: is of .* 8\.0 on, and this trains on {device};"):
        Trainer.begin(run, config, dataset, torch.device(device))


def test_kernels_are_a_setting_that_names_of_before_do_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(kernels, "_there", True)
    usual, plain = (TrainConfig.model_validate({**SETTINGS, "kernels": way}) for way in ("auto", "plain"))
    for config in (usual, plain):
        with products(config, torch.device("cpu")):
            assert kernels.usable(torch.zeros(3)) == (config is usual)
    dataset = Dataset.of(write_activations(tmp_path, Planted()(64)))
    assert run_name(usual, dataset) != run_name(plain, dataset)
