"""Two dictionaries against each other, by the definitions: cosines, correlations, the best of each, one to one."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.nn.functional import normalize

from sae.pipeline.matching.pairs import Firing, by_direction, by_firing
from sae.pipeline.metrics.similarity import chance


def directions(m: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed))


def test_a_shuffled_copy_is_found_whole_and_half_a_copy_in_half() -> None:
    a = directions(40, 16, 0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    whole = by_direction(a, 3 * a[order], one_to_one=True)
    for key in ("mmcs", "hungarian", "mmcs_ab", "mmcs_ba", "distinct_ab", "above_09_ab", "above_07_hungarian"):
        assert whole.figures[key] == pytest.approx(1), key
    assert whole.pairs is not None and torch.equal(order[whole.pairs[1]], whole.pairs[0])
    half = by_direction(a, torch.cat([a[:20], a[:20], directions(20, 16, 5)]), one_to_one=True)
    assert half.figures["above_09_ab"] == 0.5 and half.figures["above_09_ba"] == pytest.approx(40 / 60)
    assert half.figures["distinct_ba"] < 0.67, "copies share their best match"
    assert half.likeness is not None and len(half.likeness) == 40 and half.figures["above_09_hungarian"] == 0.5


def test_cosines_by_brute_force_beside_chance() -> None:
    a, b = directions(5, 4, 2), directions(7, 4, 3)
    table = normalize(a, dim=1) @ normalize(b, dim=1).T
    found = by_direction(a, b, one_to_one=True)
    figures = found.figures
    assert figures["mmcs_ab"] == pytest.approx(table.amax(1).mean().item(), rel=1e-5)
    assert figures["mmcs_ba"] == pytest.approx(table.amax(0).mean().item(), rel=1e-5)
    assert figures["mmcs"] == pytest.approx((table.amax(1).mean().item() + table.amax(0).mean().item()) / 2, rel=1e-5)
    most = max(table[range(5), list(order)].sum().item() for order in permutations(range(7), 5))
    assert figures["hungarian"] == pytest.approx(most / 5, rel=1e-5)
    assert figures["above_07_ab"] == pytest.approx((table.amax(1) > 0.7).double().mean().item())
    wide = by_direction(directions(300, 8, 4), directions(200, 8, 5), one_to_one=False)
    assert wide.figures["mmcs_ab_chance"] == pytest.approx(chance(300, 200, 8), abs=0.02)
    assert wide.figures["mmcs_ab"] == pytest.approx(wide.figures["mmcs_ab_chance"], abs=0.02), "random is chance"
    assert wide.figures["hungarian"] is wide.figures["above_09_hungarian"] is wide.pairs is None


def test_correlations_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    f = (random.random((60, 6)) < 0.4) * random.random((60, 6))
    g = np.column_stack([f[:, 3] * 2 + 1, f[:, 0], -f[:, 1], random.random((60, 2)), np.zeros(60), np.full(60, 5.0)])
    f[:, 5] = 0
    a, b = (Firing(sparse.csr_matrix(table)) for table in (f, g))
    assert a.alive.tolist() == [True] * 5 + [False] and b.alive.tolist() == [True] * 5 + [False] * 2
    expected = np.zeros((6, 7))
    expected[:5, :5] = np.corrcoef(f[:, :5].T, g[:, :5].T)[:5, 5:]
    np.testing.assert_allclose(a.correlations(b, slice(None)), expected, atol=1e-9)
    for block in (1 << 24, 14):  # all at once, and two latents at a time
        monkeypatch.setattr("sae.pipeline.matching.pairs.BLOCK", block)
        found = by_firing(a, b, one_to_one=True)
        np.testing.assert_allclose(found.ab, expected.max(1), atol=1e-9)
        np.testing.assert_allclose(found.ba, expected.max(0), atol=1e-9)
        assert found.figures["correlation_ab"] == pytest.approx(expected[:5].max(1).mean())
        assert found.pairs is not None and found.likeness is not None
        pairs = dict(zip(*(one.tolist() for one in found.pairs), strict=True))
        assert pairs[3] == 0 and pairs[0] == 1 and found.likeness[0] == pytest.approx(1)
        np.testing.assert_allclose(a.of_pairs(b, found.pairs), found.likeness, atol=1e-9)
    shifted = np.corrcoef(f[:, :5].T, np.roll(g[:, :5], -30, axis=0).T)[:5, 5:]
    assert found.figures["correlation_ab_chance"] == pytest.approx(np.maximum(shifted, 0).max(1).mean(), abs=1e-9)
