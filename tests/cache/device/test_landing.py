"""Tensors on their way to a device. What comes back is tested with who sends it (`test_window_buffer`)."""

import pytest
import torch
from torch import Tensor

from sae.cache.device.landing import moved


def test_what_shares_memory_with_itself_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory has the strides of what it is made of, and torch refuses to fill what lies twice in one place."""

    def pinned(x: Tensor) -> Tensor:
        size = 1 + sum(stride * (n - 1) for n, stride in zip(x.shape, x.stride(), strict=True))
        memory = torch.UntypedStorage(size * x.itemsize)
        return torch.empty(0, dtype=x.dtype).set_(memory, 0, x.shape, x.stride()).copy_(x)

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", lambda x, *_, **__: x)
    table = torch.arange(12.0).view(3, 4)
    for x in (table[1].expand(5, 4), table[:, :-1], table.T, table[:0], table):
        assert torch.equal(moved(x, torch.device("cuda")), x)
