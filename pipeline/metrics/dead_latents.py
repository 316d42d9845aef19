"""Which latents never fire: in none of the held-out rows, and in none of the training rows that are searched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.saes import Codes


@register
class DeadLatents(Metric):
    """How many latents fire in no row, held-out or searched."""

    name = "dead_latents"
    needs = ("codes", "training")
    figures = (
        Figure("dead_fraction", "dead latents", "latents that fired in no row looked at", "low", share=True),
        Figure("dead_rows", "rows searched for dead latents", "rows looked at, held-out and of training", amount=True),
    )  # fmt: skip

    def __init__(self, d_sae: int) -> None:
        self.rows, self.fired = 0, torch.zeros(d_sae, dtype=torch.bool)

    @classmethod
    def of(cls, subject: Subject) -> DeadLatents:
        return cls(subject.coder.width)

    def update(self, batch: Encoded) -> None:
        assert batch.codes is not None
        self.search(batch.codes)

    def search(self, codes: Codes) -> None:
        self.fired |= (codes.fired() > 0).cpu()
        self.rows += codes.batch

    def result(self) -> dict[str, Value]:
        return {"dead_fraction": 1 - self.fired.double().mean().item(), "dead_rows": self.rows}

    def details(self) -> dict[str, Any]:
        return {"dead_rows": self.rows}

    def latents(self) -> dict[str, Tensor]:
        return {"fired": self.fired}
