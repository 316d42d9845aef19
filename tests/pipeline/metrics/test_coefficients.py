"""Latents against the truth: how well they tell of coefficients, and what becomes of features in pairs. Planted."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from sae.pipeline.metrics import coefficients as module
from sae.pipeline.metrics.coefficients import Coefficients, auroc, correlations
from sae.pipeline.metrics.metric import Encoded
from sae.pipeline.metrics.pairs import Pairs
from sae.pipeline.metrics.recovery import Recovery
from sae.pipeline.metrics.similarity import random_directions
from sae.pipeline.saes import Latents, create, parse

D, G, N = 24, 10, 3000


def planted(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Orthogonal features [G, D], and coefficients [N, G]."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.linalg.qr(torch.randn(D, D, generator=random))[0][:G]
    there = torch.rand(N, G, generator=random) < 0.2
    return truth, torch.where(there, torch.rand(N, G, generator=random), 0.0)


def shown(metric: Coefficients, x: Tensor, codes: Tensor, true: Tensor, step: int = 700) -> dict[str, Any]:
    for low in range(0, len(x), step):
        part = slice(low, low + step)
        latents = Latents.of_dense(codes[part])
        metric.compare(Encoded(x[part], x[part], latents, x[part]), true[part])
    return dict(metric.result())


def test_auroc_is_that_of_mann_and_whitney() -> None:
    random = np.random.default_rng(0)
    values = torch.from_numpy(random.integers(0, 5, (200, 4)).astype(np.float32))  # full of ties
    there = torch.from_numpy(random.random((200, 4)) < [0.1, 0.5, 0.9, 0.3])
    for column, found in enumerate(auroc(values, there).tolist()):
        one, other = values[there[:, column], column], values[~there[:, column], column]
        assert found == pytest.approx(mannwhitneyu(one, other).statistic / (len(one) * len(other)))
        slow = np.mean([(a > b) + 0.5 * (a == b) for a in one.tolist() for b in other.tolist()])
        assert found == pytest.approx(slow)
    assert auroc(torch.rand(3, 2), torch.tensor([[True, False]] * 3)).isnan().all()


def test_correlations_are_pearsons() -> None:
    values, true = torch.randn(100, 3), torch.rand(100, 3)
    expected = [np.corrcoef(values[:, i], true[:, i])[0, 1] for i in range(3)]
    assert correlations(values, true).tolist() == pytest.approx(expected)
    constant = correlations(torch.ones(4, 2), torch.tensor([[0.0, 1.0], [1, 1], [0, 1], [0, 1]]))
    assert constant[0] == 0 and constant[1].isnan(), (
        "a dead latent tells nothing; a feature always there is no question"
    )


def test_the_true_dictionary_tells_all_and_chance_little() -> None:
    truth, true = planted()
    metric = Coefficients(truth.flip(0), truth)
    found = shown(metric, true @ truth, true.flip(1), true)
    assert found["coefficient_r"] == pytest.approx(1) and found["coefficient_auroc"] == pytest.approx(1)
    assert 0 < found["coefficient_r_chance"] < 0.7 and 0.5 < found["coefficient_auroc_chance"] < 0.9
    directions = random_directions(G, D)
    nearest = [max(range(G), key=lambda i, t=t: float(directions[i] @ t)) for t in truth]  # type: ignore[misc]
    by_hand = [np.corrcoef((true @ truth) @ directions[i], true[:, g])[0, 1] for g, i in enumerate(nearest)]
    assert found["coefficient_r_chance"] == pytest.approx(np.mean(by_hand), abs=1e-4)
    assert metric.details() == {"coefficients": {"rows": N, "features": G}}


def test_what_tells_half_is_in_between() -> None:
    """Half of the latents are silent; noise on the others."""
    truth, true = planted()
    codes = true + 0.3 * torch.rand(N, G)
    codes[:, ::2] = 0
    found = shown(Coefficients(truth, truth), true @ truth, codes, true)
    r = np.mean([0 if g % 2 == 0 else np.corrcoef(codes[:, g], true[:, g])[0, 1] for g in range(G)])
    assert found["coefficient_r"] == pytest.approx(r, abs=1e-5)
    assert 0.6 < found["coefficient_auroc"] < 1


def test_features_that_no_row_shows_count_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, true = planted()
    gone = truth.clone()
    gone[3] = 0
    found = shown(Coefficients(truth, gone), true @ truth, true, true)
    assert found["coefficient_r"] == pytest.approx(1)
    never = true.clone()
    never[:, 3] = 0
    assert shown(Coefficients(truth, truth), true @ truth, true, never)["coefficient_auroc"] == pytest.approx(1)
    monkeypatch.setattr(module, "KEPT", 50 * G)
    few = Coefficients(truth, truth)
    shown(few, true @ truth, true, true)
    assert few.details()["coefficients"]["rows"] == 50
    assert set(Coefficients(truth, truth).result().values()) == {None}
    assert set(Recovery(truth, torch.zeros(3, D)).result().values()) == {None}
    assert Recovery(truth, gone).result()["recovered"] == 1


def test_duplicates_stand_beside_chance() -> None:
    truth, _ = planted()
    learned = torch.cat([truth, truth[:4] + 0.01 * torch.randn(4, D)])
    found = Recovery(learned, truth).result()
    directions = random_directions(14, D)
    nearest = {max(range(G), key=lambda g, one=one: float(truth[g] @ one)) for one in directions}  # type: ignore[misc]
    assert found["duplicates"] == 4 and found["duplicates_chance"] == 14 - len(nearest)


# --- pairs ------------------------------------------------------------------------------------------------------------


def dictionary(rows: Tensor) -> Any:
    """ReLU(rows x), decoded by the same rows."""
    sae = create(parse({"arch": "l1", "d_sae": len(rows), "input_scale": "none"}), rows.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_pairs_apart() -> None:
    truth, _ = planted()
    metric = Pairs(dictionary(truth), 2 * truth, ((0, 1), (2, 3)))
    found = metric.result()
    assert found["merged_pairs"] == 0 and found["cross_talk"] == pytest.approx(0, abs=1e-6)
    assert found["merged_pairs_chance"] == 0 and found["cross_talk_chance"] > 0.05
    (first, _) = metric.details()["pairs"]
    assert first["members"] == [0, 1] and first["cosine"] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(first["only"], [[1, 0], [0, 1]], atol=1e-5)  # 2 times the mean coefficient


def test_a_merged_pair() -> None:
    """One latent for both: as near to each as can be, and it speaks of each alike."""
    truth, _ = planted()
    merged = (truth[0] + truth[1]) / 2**0.5
    metric = Pairs(dictionary(torch.stack([merged, *truth[2:]])), truth, ((0, 1), (2, 3)))
    found = metric.result()
    assert found["merged_pairs"] == 0.5
    first, second = metric.details()["pairs"]
    assert first["both"] == pytest.approx(2**-0.5) and second["both"] == pytest.approx(0, abs=1e-6)
    assert found["cross_talk"] == pytest.approx((0.5 + 0) / 2, abs=1e-6)


def test_pairs_that_are_alike_are_told() -> None:
    """A toy gives features that always come together one direction: then merging them is no fault of a dictionary."""
    truth, _ = planted()
    effect = truth.clone()
    effect[1] = truth[0] + 0.1 * truth[5]
    found = Pairs(dictionary(truth), effect, ((0, 1), (2, 3))).result()
    assert found["alike_pairs"] == 0.5 == found["merged_pairs"]


def test_a_pair_that_no_row_shows_is_left_out() -> None:
    truth, _ = planted()
    effect = truth.clone()
    effect[1] = 0
    assert Pairs(dictionary(truth), effect, ((0, 1), (2, 3))).pairs == [(2, 3)]
    nothing = Pairs(dictionary(truth), effect, ((0, 1),))
    assert set(nothing.result().values()) == {None} and nothing.details() == {"pairs": []}
