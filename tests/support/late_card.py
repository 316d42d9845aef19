"""A device that runs ahead, for tests where there is none."""

import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sae.cache import window_buffer
from sae.cache.device.landing import Copies, Landing


class Card:
    """A device whose copies hold nothing of use until they are waited for, and come while `going` is set."""

    def __init__(self) -> None:
        self.going = threading.Event()
        self.going.set()
        self.sent = 0
        self.landing = Landing(self._copied)

    def _copied(self, tensors: Sequence[Tensor]) -> Copies:
        self.sent += 1
        kept = [tensor.clone() for tensor in tensors]
        copies = [torch.full_like(tensor, 77) for tensor in tensors]

        def wait() -> None:
            assert self.going.wait(60)
            for copy, values in zip(copies, kept, strict=True):
                copy.copy_(values)

        return copies, wait


def rows_come_late(patch: pytest.MonkeyPatch, values: int) -> Card:
    """From here on what the CPU computes is stored as a card's rows are, in slices of so many values."""
    card = Card()
    patch.setattr(window_buffer, "landing", lambda device: card.landing)
    patch.setattr(window_buffer, "SLICE", {"cpu": values})
    return card
