"""Gates computed block by block, with gradients of their own, against an MLP a component written out."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from sae.pipeline.decompose import gates
from sae.pipeline.decompose.gates import ScalarGates


def made(components: int, rows: int, hidden: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(components, rows), *3 * [(components, hidden)]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def written_out(h: Tensor, w: Tensor, b: Tensor, o: Tensor) -> Tensor:
    return (gelu(h[..., None] * w[:, None] + b[:, None]) * o[:, None]).sum(-1)


@pytest.mark.parametrize("block", [1, 40, 1 << 18])  # a component at a time, two of seven, all
def test_blocks_are_what_is_written_out(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "CACHED", block)
    ours, twin = made(7, 5, 4), made(7, 5, 4)
    found, expected = ScalarGates.apply(*ours), written_out(*twin)
    torch.testing.assert_close(found, expected)
    towards = torch.linspace(-1, 1, 35, dtype=torch.float64).view(7, 5)
    (found * towards).sum().backward()
    (expected * towards).sum().backward()
    for one, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_without_rows() -> None:
    assert ScalarGates.apply(*made(3, 0, 4)).shape == (3, 0)
