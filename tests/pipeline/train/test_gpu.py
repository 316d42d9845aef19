"""What is promised on a card, where there is one: nothing waits, and equal runs end with the same bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes_kit import DICTIONARIES, Planted, small
from support.small_runs import different, outcome, planted_store, settings, stop_at

from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.cache.runs import Run
from sae.pipeline.parallel.ranks import SingleRank
from sae.pipeline.runtime.interrupts import Interrupted
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Clock, uncounted
from sae.pipeline.train.coupled import CoupledTrainers
from sae.pipeline.train.stage import open_run, train
from sae.pipeline.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
CASES: list[dict[str, Any]] = [{"arch": arch} for arch in DICTIONARIES]


@pytest.mark.parametrize("few", [uncounted.FEW, 1.0])  # up to which latents are taken entry by entry
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equal_runs_and_one_that_was_stopped_end_with_the_same_bytes(
    tmp_path: Path, case: dict[str, Any], precision: str, few: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncounted, "FEW", few)
    dataset = Dataset.of(planted_store(tmp_path))
    config = settings(small(case, dead_after=800).model_dump(), precision=precision)

    def go(name: str, progress: Silent, *, resume: bool = False) -> Run:
        run = open_run(config, dataset, tmp_path, name, resume=resume)
        train([run], dataset, progress, device="cuda")
        return run

    first = outcome(go("first", Silent()))
    assert different([go("second", Silent())], [first]) == []
    with pytest.raises(Interrupted):
        go("third", stop_at(23))
    assert different([go("third", Silent(), resume=True)], [first]) == []


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_driver_sees_no_wait_in_a_step(tmp_path: Path, case: dict[str, Any], kernels: str) -> None:
    dataset, device = Dataset.of(planted_store(tmp_path, Planted()(256))), torch.device("cuda")
    config = settings(small(case, dead_after=800).model_dump(), kernels=kernels, log_every=1000)
    run = open_run(config, dataset, tmp_path, "it", resume=False)
    group = CoupledTrainers([Trainer.begin(run, config, dataset, device)], None)
    x = Planted()(128).to(device)
    for step in range(12):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first logs, and kernels are compiled
        try:
            group.step(Batch(x, x), Clock(step, 1000, 128), SingleRank())
        finally:
            torch.cuda.set_sync_debug_mode("default")
