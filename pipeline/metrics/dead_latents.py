"""Which latents never fire: in none of the held-out rows, and in none of the training rows that are searched.

Papers and libraries call different things dead, over different windows. Beside the figure, `details` has each by its name,
with the rows that it was found in: rows are shuffled, so the last T of a training and the first T here are alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.saes import Codes

BATCHES = (5, 50, 400)  # windows of batches in which a latent is to fire once
MANY = 10_000_000  # and of rows
LOW, ULTRA_LOW, DENSE = 1e-3, 1e-6, 0.1  # rates
NEVER = 1 << 40


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
        self.counts = torch.zeros(d_sae, dtype=torch.int64)
        self._first = torch.full((d_sae,), NEVER)  # the batch in which each fired first
        self._upto: list[int] = []  # rows seen when each batch had been
        self._held_out = 0  # batches of held-out rows, which are the first

    @classmethod
    def of(cls, subject: Subject) -> DeadLatents:
        return cls(subject.coder.width)

    @property
    def rows(self) -> int:
        return self._upto[-1] if self._upto else 0

    def update(self, batch: Encoded) -> None:
        assert batch.codes is not None
        self.search(batch.codes)
        self._held_out = len(self._upto)

    def search(self, codes: Codes) -> None:
        counts = codes.fired()
        self.counts, self._first = self.counts.to(counts.device), self._first.to(counts.device)
        self._first.masked_fill_((self.counts == 0) & (counts > 0), len(self._upto))
        self.counts += counts
        self._upto.append(self.rows + codes.batch)

    def result(self) -> dict[str, Value]:
        return {"dead_fraction": 1 - (self.counts > 0).double().mean().item(), "dead_rows": self.rows}

    def details(self) -> dict[str, Any]:
        """Every definition, the rows it was applied to, and the latents it is true of; None with fewer rows than it takes."""
        whole = len(self._upto)
        rates, first = self.counts.cpu() / max(1, self.rows), self._first.cpu()
        by_rate = {
            f"rate below {LOW:g}": (rates < LOW, 1 / LOW), f"rate below {ULTRA_LOW:g}": (rates < ULTRA_LOW, 1 / ULTRA_LOW),
            f"rate above {DENSE:g}": (rates > DENSE, 1 / DENSE),
        }  # fmt: skip
        windows = {"no held-out row": self._held_out, "no row": whole} | {
            f"no row of {n} batches": n if n <= whole else None for n in BATCHES
        }
        enough = [i + 1 for i, rows in enumerate(self._upto) if rows >= MANY]
        windows[f"no row of {MANY:,}"] = enough[0] if enough else None
        found = {
            name: None if batches is None else self._found(first >= batches, self._upto[batches - 1] if batches else 0)
            for name, batches in windows.items()
        }  # fmt: skip
        found |= {
            name: self._found(true, self.rows) if self.rows >= least else None
            for name, (true, least) in by_rate.items()
        }
        return {"dead_rows": self.rows, "dead_by_definition": found}

    def latents(self) -> dict[str, Tensor]:
        return {"fired": self.counts > 0}

    def _found(self, true: Tensor, rows: int) -> dict[str, float]:
        return {"rows": rows, "latents": int(true.sum()), "share": true.double().mean().item()}
