"""Weights & Biases: one run there for every run folder, under its name.

Where it goes, and whether it is sent at all, is said in W&B's own way (`wandb login`, WANDB_PROJECT, WANDB_ENTITY,
WANDB_MODE=offline). A resumed run goes on in the same W&B run; lines that were sent before are not sent again.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.runs import Run

from .base import Logger

PROJECT = "sae"  # where WANDB_PROJECT says no other
MOST_ROWS = 200_000  # latents in a table, at most as many as W&B shows


class Writer(Logger):
    """Configuration, curves, histograms, a table of latents, and checkpoints and the dictionary as artifacts."""

    needs: ClassVar[str] = "wandb"

    def __init__(self, run: Run, step: int, known: dict[str, Any]) -> None:
        import wandb

        known.setdefault("id", secrets.token_hex(4))
        super().__init__(run, step, known)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), id=known["id"], name=run.name, dir=str(run.path),
                resume="allow", config=dict(run.config), reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except (wandb.errors.Error, OSError) as error:
            raise SaeError(
                f"log = wandb: {_line(error)}; `wandb login`, or WANDB_MODE=offline and `wandb sync` afterwards"
            ) from error

    def figures(self, step: int, figures: Mapping[str, float | None]) -> None:
        if step <= self.known.get("step", 0):
            return
        self._run.log({name: value for name, value in figures.items() if value is not None}, step=step)
        self.known["step"] = step

    def checkpoint(self, step: int, path: Path, tensors: Mapping[str, Tensor]) -> None:
        import wandb

        if step >= self.known.get("step", 0):
            # in float64, since 64 bins between two neighbouring float32 are more than there are numbers
            values = {name: values.double().cpu().numpy() for name, values in tensors.items()}
            self._run.log({f"weights/{name}": wandb.Histogram(value) for name, value in values.items()}, step=step)
        self._artifact("checkpoint", [path])

    def finished(self, files: Iterable[Path], latents: Mapping[str, Tensor]) -> None:
        import wandb

        columns = [values[:MOST_ROWS].tolist() for values in latents.values()]
        rows = [[latent, *values] for latent, values in enumerate(zip(*columns, strict=True))]
        self._run.log({"latents": wandb.Table(columns=["latent", *latents], data=rows)})
        self._artifact("dictionary", files)

    def close(self) -> None:
        self._run.finish()

    def _artifact(self, kind: str, files: Iterable[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self.run.name[:100]}-{kind}", type=kind)
        for path in files:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
