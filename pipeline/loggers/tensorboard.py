"""TensorBoard: event files in the run folder, so `tensorboard --logdir runs` shows every run under its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sae.cache.runs import Run

from .base import Logger


class Writer(Logger):
    """Scalars and histograms. Of a resumed run, what came after its checkpoint is purged and written again."""

    needs: ClassVar[str] = "tensorboard"

    def __init__(self, run: Run, step: int, known: dict[str, Any]) -> None:
        super().__init__(run, step, known)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path), purge_step=step + 1 if step else None)

    def figures(self, step: int, figures: Mapping[str, float | None]) -> None:
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def checkpoint(self, step: int, path: Path, tensors: Mapping[str, Tensor]) -> None:
        for name, values in tensors.items():
            self._writer.add_histogram(name, values.float().cpu().numpy(), step)

    def finished(self, files: Iterable[Path], latents: Mapping[str, Tensor]) -> None:
        self._writer.add_text("dictionary", "\n".join(f"- `{path}`" for path in files))

    def close(self) -> None:
        self._writer.close()
