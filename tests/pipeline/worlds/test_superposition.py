"""Toy models of superposition: who is in a sample with whom, how a toy is trained, and that five make a pentagon."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from sae.pipeline.worlds.superposition import Presence, Toy, Training, achieved, losses, samples, trained

N = 60_000


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def drawn(presence: Presence, n: int = N, seed: int = 0) -> Tensor:
    """Samples [I, n, G]."""
    return samples(presence, n, [torch.Generator().manual_seed(seed + i) for i in range(len(presence.probability))])


def close(share: float, expected: float, n: int = N) -> bool:
    """Whether a share of n draws is what it should be, to five standard deviations."""
    return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / n) + 1e-9


def test_every_feature_has_its_own_probability_in_every_instance() -> None:
    p = table([0.1, 0.3, 0.9, 1.0], [0.02, 0.5, 0.2, 0.7])
    x = drawn(Presence(p))
    for share, expected in zip((x > 0).double().mean(1).flatten(), p.flatten(), strict=True):
        assert close(share.item(), expected.item())
    strengths = x[0, :, 2][x[0, :, 2] > 0]
    assert strengths.mean().item() == pytest.approx(0.5, abs=0.01) and strengths.std().item() == pytest.approx(
        1 / math.sqrt(12), abs=0.01
    )
    there = (x[1] > 0).double()
    assert close((there[:, 1] * there[:, 2]).mean().item(), 0.1), "independent"


def test_pairs() -> None:
    """Correlated: both or none. Anti-correlated: never both. Each member as often as it should be; magnitudes apart."""
    x = drawn(Presence(table([0.2, 0.2, 0.1, 0.3, 0.25, 0.25, 0.2]), correlated=2, anticorrelated=1))[0]
    there = x > 0
    assert torch.equal(there[:, 0], there[:, 1]) and close(there[:, 0].double().mean().item(), 0.2)
    assert not (there[:, 2] & ~there[:, 3]).any(), "the rarer one comes with the other alone"
    assert close(there[:, 3].double().mean().item(), 0.3) and close(there[:, 2].double().mean().item(), 0.1)
    assert not (there[:, 4] & there[:, 5]).any()
    assert all(close(there[:, i].double().mean().item(), 0.25) for i in (4, 5))
    assert close((there[:, 4] & there[:, 6]).double().mean().item(), 0.05), "of another pair or none: independent"
    both = x[there[:, 0]][:, :2]
    assert abs(torch.corrcoef(both.T)[0, 1].item()) < 0.05
    assert Presence(table([0.1] * 7), 2, 1).pairs == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize("rho", [0.5, -0.2, 0.9])
def test_the_copula_has_the_correlation_that_is_wanted(rho: float) -> None:
    presence = Presence(table([0.1, 0.3, 0.5, 0.2]), correlation=rho)
    normal = torch.randn(N, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden = presence.copula(normal)
    expected = torch.full((4, 4), rho, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(torch.corrcoef(hidden.T), expected, atol=0.02, rtol=0)
    # by Cholesky's factor, the slow way, the same distribution
    factor = torch.linalg.cholesky(expected)
    torch.testing.assert_close(torch.cov(hidden.T), factor @ factor.T, atol=0.03, rtol=0)
    x = drawn(presence)[0]
    there = (x > 0).double()
    for share, p in zip(there.mean(0).tolist(), presence.probability[0].tolist(), strict=True):
        assert close(share, p), "marginals stay"
    found = achieved(presence, "seed")
    assert found["target"] == rho and abs(found["rank"] - rho) < 0.05
    ranks = spearmanr(hidden[:, 0], hidden[:, 1]).statistic
    assert found["rank"] == pytest.approx(ranks, abs=0.02)
    phi = np.corrcoef(there.T.numpy())[np.triu_indices(4, 1)].mean()
    assert found["presence"] == pytest.approx(phi, abs=0.02) and phi * rho > 0
    assert found["value"] == pytest.approx(np.corrcoef(x.T.numpy())[np.triu_indices(4, 1)].mean(), abs=0.02)


def test_the_rates() -> None:
    importance = table([1.0])
    for schedule, last in (("constant", 1.0), ("linear", 0.1), ("cosine", 0.0)):
        rates = [Training(importance, 1, 10, schedule=schedule).rate(step) for step in range(10)]  # type: ignore[arg-type]
        assert rates[0] == 1 and rates[-1] == pytest.approx(last, abs=1e-12)
        assert all(a >= b for a, b in pairwise(rates))
        assert Training(importance, 1, 1, schedule=schedule).rate(0) == 1  # type: ignore[arg-type]
    assert Training(importance, 1, 11, schedule="cosine").rate(5) == pytest.approx(math.cos(math.pi / 4))


def test_instances_know_nothing_of_each_other() -> None:
    p, importance = table([0.3] * 4, [0.05] * 4), table([1.0, 0.9, 0.8, 0.7], [1.0] * 4)
    told: list[int] = []
    both = trained(Presence(p), Training(importance, 2, 30, 64), ["a", "b"], told.append)
    assert sum(told) == 30
    for i, seed in enumerate(("a", "b")):
        alone = trained(Presence(p[i : i + 1]), Training(importance[i : i + 1], 2, 30, 64), [seed], told.append)
        torch.testing.assert_close(both.weight[i], alone.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.bias[i], alone.bias[0], rtol=1e-4, atol=1e-5)


def test_the_loss_is_what_it_says() -> None:
    """Against the sums written out, sample by sample."""
    toy = Toy(torch.randn(2, 3, 2), torch.randn(2, 3))
    x = drawn(Presence(table([0.5] * 3, [0.9] * 3)), 20)
    for i in range(2):
        for sample, given in zip(toy(x)[i], x[i], strict=True):
            h = sum(given[j] * toy.weight[i, j] for j in range(3))
            back = [max(0.0, float(toy.weight[i, j] @ h + toy.bias[i, j])) for j in range(3)]
            assert sample.tolist() == pytest.approx(back, abs=1e-5)
    nothing = Toy(torch.zeros(1, 2, 1), torch.zeros(1, 2))
    (found,) = losses(nothing, Presence(table([0.5, 0.5])), table([1.0, 3.0]), ["a"])
    assert found == pytest.approx((1 + 3) / 2 * 0.5 / 3, rel=0.02), "E x^2 = p / 3"


def test_importance_decides_who_is_left_out() -> None:
    """Dense features do not share dimensions: the two that matter most have one each."""
    importance = table([0.01, 1.0, 0.01, 1.0])
    toy = trained(Presence(table([1.0] * 4)), Training(importance, 2, 800, 128, lr=1e-2), ["a"], lambda steps: None)
    norms = torch.linalg.vector_norm(toy.weight[0], dim=1)
    assert norms[1] > 0.9 and norms[3] > 0.9 and norms[0] < 0.1 and norms[2] < 0.1
    assert toy.truth(0).any(1).tolist() == [norm > 0.1 * norms.max() for norm in norms]
    torch.testing.assert_close(toy.truth(0)[1], toy.weight[0, 1] / norms[1])


def test_five_features_in_two_dimensions_are_a_pentagon() -> None:
    """Sparse ones; trained faster than by default, to the same end."""
    presence, importance = Presence(table([0.025] * 5)), table([1.0] * 5)
    training = Training(importance, 2, 1500, 1024, lr=1e-2, schedule="cosine")
    toy = trained(presence, training, ["toy"], lambda steps: None)
    (loss,) = losses(toy, presence, importance, ["toy"])
    assert loss < 2e-3
    norms = torch.linalg.vector_norm(toy.weight[0], dim=1)
    assert (norms / norms.mean() - 1).abs().max() < 0.1
    angles = torch.atan2(toy.weight[0, :, 1], toy.weight[0, :, 0]).sort().values
    apart = torch.cat([angles.diff(), angles[:1] + 2 * math.pi - angles[-1:]])
    assert (apart - 2 * math.pi / 5).abs().max() < 0.1
