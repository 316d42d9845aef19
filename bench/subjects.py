"""Dictionaries in training, at the sizes a bench asks for: stores of planted rows, and members of a training on them.

A bench times `pipeline.train.coupled.CoupledTrainers.step`, which is what `sae train` does with a batch, so that
nothing of a real step is left out.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import torch
from support.small_stores import write_activations

from bench.planted import planted_rows
from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.pipeline import saes
from sae.pipeline.parallel.ranks import SingleRank
from sae.pipeline.saes.jl import JLConfig
from sae.pipeline.saes.jumprelu import JumpReLUConfig
from sae.pipeline.train.coupled import CoupledTrainers
from sae.pipeline.train.stacked import in_turns, taken
from sae.pipeline.train.stage import TrainConfig, open_run
from sae.pipeline.train.trainer import Trainer

STEPS = 10**9  # of a training that is only just beginning
DEAD_AFTER = 1_000_000  # rows: of so long a training no share would end


def planted_store(
    root: Path, rows: int, width: int, codec: str = "int8", seed: int = 0, **recipe: Any
) -> ActivationStore:
    """A store of planted rows on disk. One of another site is aligned with it."""
    return write_activations(root, planted_rows(rows, width, seed), codec, ended=True, **recipe)


def settings(sae: dict[str, Any], **train: Any) -> TrainConfig:
    """Settings of a training, whose learning rate hardly changes what is timed, and which logs nothing by itself."""
    return TrainConfig.model_validate(
        {"lr": 1e-6, "log_every": STEPS} | train | {"sae": {"dead_after": DEAD_AFTER} | sae}
    )


def member(config: TrainConfig, store: ActivationStore, runs: Path, name: str, device: str = "cpu") -> Trainer:
    """A dictionary at its first step, with a run folder of that name."""
    run = open_run(config, Dataset.of(store), runs, name, resume=False)
    return Trainer.begin(run, config, Dataset.of(store), torch.device(device))


def take_step(member: Trainer, x: torch.Tensor) -> None:
    """One training step of a dictionary by itself on a batch [batch, d]."""
    CoupledTrainers([member], None).step(Batch(x, x), saes.Clock(member.done, STEPS, len(x)), SingleRank())


def together(members: Sequence[Trainer], rows: int) -> Callable[[torch.Tensor], None]:
    """A training step of each of some dictionaries on a batch [rows, d], taken as one where they can be."""
    turns = in_turns([CoupledTrainers([member], None) for member in members], rows)

    def step(x: torch.Tensor) -> None:
        for groups, turn in turns:
            taken(turn, Batch(x, x), saes.Clock(groups[0].done, STEPS, len(x)), SingleRank())

    return step


def learns_its_sparsity(config: saes.Config) -> bool:
    """Whether how many latents are active changes in training, from many to few."""
    return not hasattr(config, "k") and not isinstance(config, JLConfig)


@torch.no_grad()
def make_sparse(sae: saes.SAE, sample: torch.Tensor, share: float) -> None:
    """Set biases, or thresholds, at which that share of the latents is active on a sample [n, d_in], and say so."""
    p = next(sae._preactivations(sample * sae.scale, sae.weights()).blocks())[1]
    sae.firing_rate.fill_(share)
    bound = p.flatten().kthvalue(int((1 - share) * p.numel())).values
    if isinstance(sae.config, JumpReLUConfig):
        sae.get_parameter("threshold").fill_(bound)
    else:
        sae.b_enc.fill_(-bound)


@torch.no_grad()
def kill_latents(sae: saes.SAE, count: int) -> None:
    """The first latents do not fire any more, and count as dead."""
    sae.b_enc[:count] = -3.0
    sae.rows_since_fired[:count] = 10**12
