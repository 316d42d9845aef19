"""Agreement of dictionaries against slow obvious twins, closed cases, and published baselines."""

import pytest
import torch
from torch import Tensor

from sae.pipeline.metrics.recovery import Recovery
from sae.pipeline.metrics.similarity import best, chance, hungarian, mean_cosine, mmcs, symmetric_mmcs


def some(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_mmcs_is_the_mean_of_the_largest_cosines() -> None:
    a, b = some(7, 5), some(11, 5, 1)
    slow = sum(max(cosine(x, y) for y in b) for x in a) / len(a)
    assert mmcs(a, b).item() == pytest.approx(slow, abs=1e-12)
    both = (slow + sum(max(cosine(x, y) for x in a) for y in b) / len(b)) / 2
    assert symmetric_mmcs(a, b).item() == pytest.approx(both, abs=1e-12)


def test_blocks_do_not_change_the_match(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = some(50, 8), some(30, 8, 1)
    whole = best(a, b)
    monkeypatch.setattr("sae.pipeline.metrics.similarity.BLOCK", 64)
    assert torch.equal(best(a, b), whole)


def test_a_permuted_rescaled_copy_agrees_fully() -> None:
    a = some(20, 6)
    b = a[torch.randperm(20, generator=torch.Generator().manual_seed(2))] * torch.rand(20, 1, dtype=torch.float64).add(
        1
    )
    assert symmetric_mmcs(a, b).item() == pytest.approx(1)
    assert mean_cosine(a, b, hungarian(a, b)).item() == pytest.approx(1)


def test_one_to_one_is_at_most_each_ones_best() -> None:
    a, b = some(12, 4), some(12, 4, 1)
    assert mean_cosine(a, b, hungarian(a, b)).item() <= mmcs(a, b).item() + 1e-12
    rows, columns = hungarian(a, b)
    assert sorted(rows.tolist()) == sorted(columns.tolist()) == list(range(12))


def test_the_gradient_reaches_both_and_is_that_of_the_maximum() -> None:
    a, b = some(5, 3).requires_grad_(), some(6, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(symmetric_mmcs, (a, b))
    one, two = torch.autograd.grad(mmcs(a, b), (a, b))
    assert one.abs().sum() > 0 and two.abs().sum() > 0


def test_rows_of_zeros_have_no_say() -> None:
    a, b = some(5, 3), some(6, 3, 1)
    with_zeros = torch.cat([a, a.new_zeros(4, 3)])
    assert mmcs(with_zeros, b).item() == pytest.approx(mmcs(a, b).item())
    assert mmcs(b, with_zeros).item() == pytest.approx(mmcs(b, a).item())
    assert mmcs(torch.zeros(3, 3), torch.zeros(2, 3)).item() == 0


def test_chance_is_the_known_baseline() -> None:
    assert chance(512, 512, 256) == pytest.approx(0.189, abs=0.005)
    assert chance(100, 160, 20) == pytest.approx(0.56, abs=0.02)


def test_recovery_of_a_planted_dictionary() -> None:
    truth = some(40, 30)
    learned = torch.cat([truth[torch.arange(39, 9, -1)], truth[:1] * 3, truth[:1], some(8, 30, 1)])  # 31 true, 1 twice
    scores = Recovery(learned, truth).result()
    assert scores["recovered"] == pytest.approx(31 / 40)
    assert scores["duplicates"] >= 1
    assert scores["chance"] < 0.6 < scores["true_to_learned"] < 1
    assert Recovery(truth, truth).result()["hungarian"] == pytest.approx(1)
    assert Recovery(truth, truth).result()["duplicates"] == 0
