"""Small trainings: rows made of planted features, their settings, and all that a run leaves."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from support.small_stores import activation_recipe, extend
from torch import Tensor

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.runs import WEIGHTS, Run
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import parse
from sae.pipeline.train.stage import TrainConfig

D, TRUE, ACTIVE, D_SAE = 16, 24, 3, 32  # width, true features, of which active in a row, latents


ROWS = 4096


COST = {"seconds": 0, "seconds_per_step": 0, "megabytes": 0}  # figures that are not of the dictionary


TOPK = {"arch": "topk", "d_sae": D_SAE, "k": 4, "dead_after": 800}


def true_features() -> Tensor:
    """Unit directions [TRUE, D]."""
    random = torch.Generator().manual_seed(11)
    return torch.nn.functional.normalize(torch.randn(TRUE, D, generator=random), dim=1)


def planted_rows(n: int, seed: int = 0) -> Tensor:
    """Rows [n, D], each of ACTIVE true features, away from the origin and much longer than 1."""
    random = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, TRUE, generator=random).topk(ACTIVE, dim=1).indices
    strength = torch.zeros(n, TRUE).scatter_(1, chosen, 1 + torch.rand(n, ACTIVE, generator=random))
    return 7 * (strength @ true_features()) + 5


def planted_store(
    root: Path, rows: Tensor | None = None, codec: str = "int8", seed: int = 0, *, ended: bool = True
) -> ActivationStore:
    rows = planted_rows(ROWS) if rows is None else rows
    recipe = {**activation_recipe(rows.shape[1], codec, seed=seed), "hook": "blocks.1.hook_mlp_out"}
    with ActivationWriter(root, "planted", recipe) as writer:
        extend(writer, rows, ended=ended)
        return writer.store


def settings(sae: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    given = {"lr": 3e-3, "decoder": None, "batch": 128, "steps": 40, "log_every": 4, "checkpoint_every": 10, **changes}
    return TrainConfig(sae=parse(TOPK if sae is None else sae), **given)


def outcome(run: Run) -> dict[str, Any]:
    """All that training leaves, bit for bit, but for the seconds it took."""
    found: dict[str, Any] = {name: (run.path / name).read_bytes() for name in ("config.json", "cfg.json", WEIGHTS)}
    tensors, state = run.load_checkpoint()
    found |= {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    metrics = [{name: value for name, value in entry.items() if name not in COST} for entry in run.metrics()]
    return {**found, "state": state, "metrics": metrics}


def different(runs: Sequence[Run], expected: Sequence[dict[str, Any]]) -> list[str]:
    """Names of what the runs left that is not as expected."""
    return [
        f"{i} {name}"
        for i, (run, other) in enumerate(zip(runs, expected, strict=True))
        for found in [outcome(run)]
        for name in {**found, **other}
        if found.get(name) != other.get(name)
    ]


class At(Silent):
    """Does something when a step has ended, and keeps what it was told."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.left, self.act = step, act
        self.lines: list[str] = []
        self.begun: list[tuple[int | None, int]] = []

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.begun.append((total, done))

    def advance(self, n: int, **fields: object) -> None:
        self.left -= n
        if self.left == 0:
            self.act()

    def note(self, line: str) -> None:
        self.lines.append(line)


def stop_at(step: int) -> At:
    return At(step, lambda: signal.raise_signal(signal.SIGINT))
