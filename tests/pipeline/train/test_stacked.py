"""Dictionaries of one shape that take their steps as one: each ends as it would alone.

The CPU takes the place of a device that is given work ahead of time; by kernels: tests/pipeline/saes/test_kernels.py.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes_kit import one_thread
from support.small_runs import TOPK, different, outcome, planted_rows, planted_store, settings, stop_at
from support.watching import watched

from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.cache.runs import Run
from sae.pipeline.parallel.ranks import SingleRank
from sae.pipeline.runtime.interrupts import Interrupted
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import Clock, encoder, placement
from sae.pipeline.train import stacked
from sae.pipeline.train.coupled import CoupledTrainers, grouped
from sae.pipeline.train.resampling import Resample
from sae.pipeline.train.stacked import Stack, in_turns, taken
from sae.pipeline.train.stage import TrainConfig, open_run, train
from sae.pipeline.train.trainer import Diverged, Trainer

single = pytest.fixture(autouse=True, scope="module")(one_thread)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU as a device that runs ahead; the sizes of the stacks that are made."""
    found: list[int] = []

    class Counted(Stack):
        def __init__(self, members: Sequence[Trainer]) -> None:
            super().__init__(members)
            found.append(len(members))

    monkeypatch.setattr(placement, "HOSTS", set())
    monkeypatch.setattr(stacked, "Stack", Counted)
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.of(planted_store(tmp_path_factory.mktemp("cache"), planted_rows(512)))


def config(sae: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    given = {"steps": 14, "batch": 32, "checkpoint_every": 5}
    return settings({**TOPK, "d_sae": 96, "k": 2, "dead_after": 40, **(sae or {})}, **{**given, **changes})


DIFFERENT: dict[str, list[TrainConfig]] = {
    "rates, k and clipping": [
        config(),
        config(seed=1, lr=1e-3, clip=None, log_every=3),
        config({"k": 1, "k_start": 5, "k_anneal": 0.5}, clip=0.01, warmup=0.5, betas=(0.5, 0.9), snapshots=3),
    ],
    "revived": [config(accumulate=2, seed=seed, revive=Resample(every=7, rows=64)) for seed in range(2)],
    "in bfloat16": [config({"aux_share": "variance"}, precision="bfloat16", seed=seed) for seed in range(2)],
}


FIRST, *REST = DIFFERENT


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_each_ends_as_it_does_alone(name: str, dataset: Dataset, tmp_path: Path, made: list[int]) -> None:
    """To the byte, with dead latents, beside others that cannot be in the stack; also if it was stopped in between."""
    other = settings({"arch": "l1", "d_sae": 8}, steps=14, batch=32, checkpoint_every=5)
    configs = [*DIFFERENT[name], other]

    def go(prefix: str, which: Sequence[int], progress: Silent, *, resume: bool = False) -> list[Run]:
        runs = [open_run(configs[i], dataset, tmp_path, f"{prefix}{i}", resume=resume) for i in which]
        train(runs, dataset, progress, device="cpu")
        return runs

    everything = range(len(configs))
    alone = [outcome(go("alone", [i], Silent())[0]) for i in everything]
    assert made == [] and any(entry["dead"] > 0 for entry in alone[0]["metrics"])
    assert different(go("together", everything, Silent()), alone) == []
    with pytest.raises(Interrupted):
        go("stopped", everything, stop_at(8))
    go("stopped", everything[:1], Silent(), resume=True)  # is finished before the others
    assert different(go("stopped", everything, Silent(), resume=True), alone) == []
    stack = len(configs) - 1
    assert made == [stack, stack, stack - 1] if stack > 2 else [stack, stack]


def test_one_that_diverges_leaves_the_others(dataset: Dataset, tmp_path: Path, made: list[int]) -> None:
    configs = [config(), config(seed=1, lr=1e30, warmup=0.0), config(seed=2)]
    runs = [open_run(one, dataset, tmp_path, f"it{i}", resume=False) for i, one in enumerate(configs)]
    with pytest.raises(Diverged, match="it1"):
        train(runs, dataset, Silent(), device="cpu")
    alone = [open_run(configs[i], dataset, tmp_path, f"alone{i}", resume=False) for i in (0, 2)]
    for run in alone:
        train([run], dataset, Silent(), device="cpu")
    assert different([runs[0], runs[2]], [outcome(run) for run in alone]) == []
    assert made == [3, 2] and [run.finished for run in runs] == [True, False, True]


def members(configs: Sequence[TrainConfig], dataset: Dataset, root: Path) -> list[CoupledTrainers]:
    runs = [open_run(one, dataset, root, f"of {len(configs)}: {i}", resume=False) for i, one in enumerate(configs)]
    device = torch.device("cpu")
    return grouped([Trainer.begin(run, one, dataset, device) for run, one in zip(runs, configs, strict=True)])


def test_a_stack_asks_for_few_operations_and_waits_for_none(dataset: Dataset, tmp_path: Path) -> None:
    x = planted_rows(32)
    launched = {}
    for count in (1, 8):
        configs = [config({"k": 2 + seed % 2}, seed=seed, log_every=1000) for seed in range(count)]
        ((_, turn),) = in_turns(members(configs, dataset, tmp_path), len(x))
        step = functools.partial(taken, turn, Batch(x, x), ranks=SingleRank())
        found = [watched(functools.partial(step, Clock(number, 1000, 32))) for number in range(2)]
        assert found[0].waited and not found[1].waited
        launched[count] = found[1].launched.total()
    assert launched[8] < 5 * launched[1]


def test_who_is_in_one_stack(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [
        config(), config(seed=1), config({"d_sae": 16}), config({"aux_k": 3}), config(precision="bfloat16"),
        config({"input_scale": "per_token"}), config({"input_scale": "per_token"}, seed=1),
        config({"decoder_norm": "free"}), config({"decoder_norm": "free"}, seed=1), config(seed=2),
        config(accumulate=2),
    ]  # fmt: skip
    groups = members(configs, dataset, tmp_path)
    sizes = [len(some) for some, _ in in_turns(groups, 32)]
    assert sizes == [3, 1, 1, 1, 1, 1, 1, 1, 1]
    monkeypatch.setattr(encoder, "KERNEL_BLOCK_ELEMENTS", 2 * 32 * 96)
    assert [len(some) for some, _ in in_turns(groups, 32)][:2] == [2, 1], "as many as a scan holds"
    monkeypatch.setattr(placement, "HOSTS", {"cpu"})
    assert all(len(some) == 1 for some, _ in in_turns(groups, 32))
