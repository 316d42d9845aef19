"""A decomposed MLP with the components alone that are active for a row, as what metrics judge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae.pipeline.decompose.components import Mask
from sae.pipeline.decompose.losses import Decomposition
from sae.pipeline.decompose.subjects import LocalMLP
from sae.pipeline.saes import Predictor


class Active(NamedTuple):
    """How many components are active in a row, and how many numbers those have, means over rows."""

    l0: float
    parameters: float


class ActiveMLP(Predictor):
    """x -> what the MLP gives with its active components fully on and all others off.

    The model of the subject must not be the one it is spliced into: each row is a pass through a layer of it.
    """

    def __init__(self, decomposition: Decomposition, subject: LocalMLP, threshold: float) -> None:
        super().__init__()
        self.decomposition, self.subject, self.threshold = decomposition, subject, threshold
        self.d_in, self.d_out = subject.dataset.d_in, subject.dataset.d_out
        self._rows = 0
        self._active: dict[str, float] = dict.fromkeys(decomposition.parts, 0.0)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        importances = self.decomposition.importances(self.subject.read(x))
        on = {name: (g > self.threshold).float() for name, g in importances.items()}
        self._rows += len(x)
        for name, one in on.items():
            self._active[name] += one.sum().item()
        return self.subject.predict(x, self.decomposition.products({name: Mask(one) for name, one in on.items()}))

    def active(self) -> Active:
        """What was active in the rows seen so far."""
        counts = {name: count / max(1, self._rows) for name, count in self._active.items()}
        numbers = {name: sum(part.weight.shape) for name, part in self.decomposition.parts.items()}
        return Active(sum(counts.values()), sum(count * numbers[name] for name, count in counts.items()))
