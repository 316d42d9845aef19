"""Features with parents, rarities and correlations: each property by itself, and figures of the published generator."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from sae.cache.errors import SaeError
from sae.pipeline.harvest.sources.synthetic import SyntheticConfig
from sae.pipeline.worlds.features import GroundTruth
from sae.pipeline.worlds.hierarchy import Hierarchy, probabilities

N = 16_384
FOREST = Hierarchy(roots=4, branching=3, depth=2, rank=3)
WORLD = SyntheticConfig(d=32, features=60, presence=FOREST, bias=0.5, apart=9)
TREES = 4 * (1 + 3 + 9)


def dense(config: SyntheticConfig, n: int = N) -> np.ndarray:
    return GroundTruth(config).made(0, n).dense(config.features).numpy()


def test_a_child_is_there_with_its_parent_and_without_its_siblings() -> None:
    made = dense(WORLD)
    there = made > 0
    for first in range(4, TREES, 3):
        parent, siblings = (first - 4) // 3, there[:, first : first + 3]
        assert not siblings[~there[:, parent]].any() and siblings.sum(1).max() == 1
        assert siblings.any(0).all(), "every child is there at times"


def test_a_child_is_as_strong_as_its_parent() -> None:
    """In proportion to its parent's coefficient over that feature's mean; a root, or one of no tree, as itself."""
    plain = WORLD.model_copy(update={"presence": FOREST.model_copy(update={"deviation": 0.0})})
    made, mean = dense(plain), np.linspace(5, 4, 60)
    np.testing.assert_allclose(made.max(0), mean, rtol=1e-5)
    made, slopes = dense(WORLD), []
    for child in range(4, 4 + 12):
        both = made[:, child] > 0
        if both.sum() > 200:
            slopes.append(np.polyfit(made[both, (child - 4) // 3] / mean[(child - 4) // 3], made[both, child], 1))
    assert np.median(slopes, axis=0) == pytest.approx([mean[4:16].mean(), 0], abs=1.0)


def test_rarities_are_those_meant() -> None:
    """Exactly where there is no tree; in trees only about, as the source's rule is, and never above a certainty."""
    free = WORLD.model_copy(update={"presence": Hierarchy(roots=0, rank=3, most=0.3, least=0.01)})
    meant, drawn = probabilities(Hierarchy(roots=0, rank=3, most=0.3, least=0.01), 60)
    np.testing.assert_array_equal(meant, drawn)
    assert (meant[0], meant[-1]) == (0.3, pytest.approx(0.01)) and (np.diff(meant) < 0).all()
    np.testing.assert_allclose((dense(free) > 0).mean(0), meant, atol=5 * 0.5 / np.sqrt(N))
    meant, drawn = probabilities(FOREST, 60)
    assert (drawn <= 1).all() and (drawn[4:TREES] > meant[4:TREES]).all()
    one = Hierarchy(roots=1, branching=2, depth=1, most=0.4, least=0.1)
    p = probabilities(one, 3)
    assert p[1].tolist() == pytest.approx([0.4, *(p[0][i] / 0.4 * (1 + p[0][3 - i] / 0.4) for i in (1, 2))])


def test_two_features_share_their_causes() -> None:
    """How often both are there is what a Gaussian of that correlation says: a twin that knows nothing of our draws."""
    close = Hierarchy(roots=0, rank=1, correlation=0.8, most=0.3, least=0.29)
    world = WORLD.model_copy(update={"presence": close, "features": 6})
    truth = GroundTruth(world)
    made = truth.made(0, N).dense(6).numpy() > 0
    forest = truth._drawn.args[0]  # type: ignore[attr-defined]
    np.testing.assert_allclose((forest.factor**2).sum(1) + forest.own**2, 1)
    for i, j in ((0, 1), (2, 5), (3, 4)):
        r = float(forest.factor[i] @ forest.factor[j])
        expected = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([-forest.threshold[i], -forest.threshold[j]])
        assert (made[:, i] & made[:, j]).mean() == pytest.approx(expected, abs=0.02)
    assert norm.sf(forest.threshold[0]) == pytest.approx(0.3)


def test_any_range_is_the_same_and_rows_are_the_sums_they_say() -> None:
    truth = GroundTruth(WORLD)
    rows, made = truth.draw(0, 9000)
    again, _ = truth.draw(4090, 20)
    assert torch.equal(rows[4090:4110], again)
    torch.testing.assert_close(rows, made.dense(60) @ truth.features + truth.bias, rtol=0, atol=1e-4)
    assert float(truth.bias.norm()) == pytest.approx(0.5)


def test_features_are_turned_away_from_each_other() -> None:
    def squares(apart: int) -> float:
        features = GroundTruth(WORLD.model_copy(update={"apart": apart})).features
        torch.testing.assert_close(features.norm(dim=1), torch.ones(60), rtol=0, atol=1e-5)
        return float((features @ features.T).square().sum())

    least = 60**2 / 32  # of a tight frame, below which none can be
    assert least < squares(9) < squares(1) < squares(0) and squares(100) == pytest.approx(least, rel=1e-3)


def test_the_figures_of_the_published_generator() -> None:
    """SAELens 6.54's SyntheticModel of these settings, 16,384 samples: rates and mean coefficients by level, and L0."""
    world = SyntheticConfig(d=256, features=2048, presence=Hierarchy(roots=16, depth=3))
    made = dense(world)
    assert (made > 0).sum(1).mean() == pytest.approx(10.83, rel=0.03)
    levels = {
        (0, 16): (0.1608, 4.999),
        (16, 80): (0.0387, 4.977),
        (80, 336): (0.00968, 4.908),
        (336, 1360): (0.00228, 4.650),
    }
    for (low, high), (rate, mean) in levels.items():
        part = made[:, low:high]
        assert (part > 0).mean() == pytest.approx(rate, rel=0.05), (low, high)
        assert part[part > 0].mean() == pytest.approx(mean, rel=0.02), (low, high)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(SaeError, match="4 trees of 2 levels, 3 children each, are 52 features, of 50"):
        SyntheticConfig(features=50, presence=FOREST)
    with pytest.raises(SaeError, match=r"least 0\.5 is above most 0\.4"):
        Hierarchy(least=0.5)
    assert "bias" not in SyntheticConfig().recipe() and "apart" not in SyntheticConfig().recipe()
