"""A decomposed MLP with the components alone that are active for a row, as what metrics judge."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.pipeline.decompose.components import Mask
from sae.pipeline.decompose.losses import Decomposition
from sae.pipeline.decompose.subjects import LocalMLP
from sae.pipeline.saes import Coder
from sae.pipeline.saes.molt import Gates


class ActiveMLP(Coder):
    """x -> what the MLP gives with its active components fully on and all others off.

    Its codes are 1 for a component that is active and 0 for another, those of one matrix after those of another. The
    model of the subject must not be the one it is spliced into: each row is a pass through a layer of it.
    """

    numbers: Tensor

    def __init__(self, decomposition: Decomposition, subject: LocalMLP, threshold: float) -> None:
        super().__init__()
        self.decomposition, self.subject, self.threshold = decomposition, subject, threshold
        self.d_in, self.d_out = subject.dataset.d_in, subject.dataset.d_out
        self._counts = {name: part.count for name, part in decomposition.parts.items()}
        each = [torch.full((part.count,), float(sum(part.weight.shape))) for part in decomposition.parts.values()]
        self.register_buffer("numbers", torch.cat(each), persistent=False)

    @property
    def width(self) -> int:
        return len(self.numbers)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Gates:
        importances = self.decomposition.importances(self.subject.read(x))
        return Gates(torch.cat([(importances[name] > self.threshold).float() for name in self._counts], dim=1), x)

    @torch.no_grad()
    def decode(self, codes: Gates) -> Tensor:
        masks = codes.values.split([*self._counts.values()], dim=1)
        each = {name: Mask(mask) for name, mask in zip(self._counts, masks, strict=True)}
        return self.subject.predict(codes.x, self.decomposition.products(each))

    def active_parameters(self, codes: Gates) -> Tensor:
        """[B]: the numbers of the components that are on, of what they read by and what they write with."""
        return (codes.values != 0).float() @ self.numbers.to(codes.values.device)
