"""Probes against slow twins, planted truth, and a choice that the test rows would spoil."""

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.probing.probes import (
    Fitting,
    Split,
    aurocs,
    fired,
    largest,
    mean_differences,
    questions,
    split_of,
)
from sae.pipeline.probing.stage import of_activations, of_latents

pytest.importorskip("sklearn")

CONFIG = ProbeConfig(ks=(1, 2, 5))


def latents_of(n: int = 240, m: int = 40, *, seed: int = 0) -> np.ndarray:
    """Sparse latents [n, m]: about a tenth of each fires."""
    random = np.random.default_rng(seed)
    return ((random.random((n, m)) < 0.1) * (0.5 + random.random((n, m)))).astype(np.float32)


def test_a_planted_latent_is_found_and_a_random_one_tells_nothing() -> None:
    table = latents_of()
    labels = (table[:, 7] > 0).astype(np.int64)
    for seed, form in enumerate((table, sparse.csr_matrix(table))):
        fitting = Fitting(labels, split_of(labels, 0.25, seed))
        scores, picked = of_latents(CONFIG, fitting, form, seed)
        assert picked[0]["latents"][0] == picked[0]["best"] == 7 and picked[0]["best_train_auroc"] == 1
        assert picked[0]["differences"][0] > 0.3
        assert scores["latents", 1]["auroc"] == scores["best latent by AUROC", 1]["balanced_accuracy"] == 1
        assert scores["random latents", 1]["auroc"] < 0.75 < 0.9 < scores["latents", "all"]["auroc"]
        assert not fitting.unconverged
    shuffled = np.random.default_rng(5).permutation(labels)
    found = [
        of_latents(ProbeConfig(ks=(5,)), Fitting(shuffled, split_of(shuffled, 0.25, seed)), table, seed)[0][
            "latents", 5
        ]["auroc"]
        for seed in range(4)
    ]
    assert 0.35 < np.mean(found) < 0.65, "labels that nothing says are not told"


def test_latents_are_chosen_on_the_training_rows_alone() -> None:
    """Latent 3 is the label on test rows, and there so strong that over all rows it is the best by far; latent 11 is
    the label with some errors on training rows, and silent on the others."""
    table = latents_of()
    labels = (np.arange(len(table)) % 2).astype(np.int64)
    split = split_of(labels, 0.4, 0)
    random = np.random.default_rng(1)
    table[:, 3] = np.where(split.test, 50.0 * labels, (random.random(len(table)) < 0.1))
    table[:, 11] = np.where(split.train, labels != (random.random(len(table)) < 0.3), 0)
    assert largest(mean_differences(table, labels == 1), 1).tolist() == [3]
    assert np.abs(aurocs(table, [labels == 1])[0] - 0.5).argmax() == 3
    scores, picked = of_latents(CONFIG, Fitting(labels, split), table, 0)
    assert picked[0]["latents"][0] == picked[0]["best"] == 11 and 3 not in picked[0]["latents"][:2]
    assert scores["latents", 1]["auroc"] == 0.5
    values = of_activations(CONFIG, Fitting(labels, split), table)
    assert values["activations", 1]["auroc"] == 0.5, "nor are values of activations"
    # scaling is of the training rows, too: what the test rows hold changes no fit
    other = table.copy()
    other[split.test] *= 7
    for one in (table, other):
        _, again = of_latents(CONFIG, Fitting(labels, split), one, 0)
        assert again == picked


def test_areas_and_differences_against_their_definitions() -> None:
    table = latents_of(50, 9)
    table[:, 8] = 0
    asked = [np.random.default_rng(i).random(50) < 0.4 for i in range(2)]
    found = aurocs(sparse.csr_matrix(table), asked)
    for i, y in enumerate(asked):
        pairs = table[y][:, None] - table[~y][None]
        np.testing.assert_allclose(found[i], ((pairs > 0) + 0.5 * (pairs == 0)).mean((0, 1)), atol=1e-12)
        np.testing.assert_allclose(mean_differences(table, y), table[y].mean(0) - table[~y].mean(0), atol=1e-6)
    assert found[:, 8].tolist() == [0.5, 0.5] and fired(table).tolist() == [True] * 8 + [False]
    assert largest(np.array([1.0, -3, 2, 3]), 3).tolist() == [1, 3, 2]


def test_splits_have_every_class_on_both_sides() -> None:
    labels = np.array([0] * 40 + [1] * 4 + [2] * 2)
    for seed in range(5):
        split = split_of(labels, 0.25, seed)
        assert (split.train ^ split.test).all()
        assert [int((split.test & (labels == one)).sum()) for one in range(3)] == [10, 1, 1]
        assert np.array_equal(split.test, split_of(labels, 0.25, seed).test)
    assert not np.array_equal(split_of(labels, 0.25, 0).test, split_of(labels, 0.25, 1).test)
    assert [one.tolist() for one in questions(np.array([4, 4, 9]))] == [[False, False, True]]
    assert len(questions(labels)) == 3


def test_scores_are_those_of_scikit_learn_by_hand() -> None:
    """Standardised by training rows, classes weighing alike; three classes, one against the rest; the majority."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    random = np.random.default_rng(3)
    labels = random.integers(3, size=150)
    x = random.standard_normal((150, 6)) * [1, 9, 0.1, 1, 1, 1] + labels[:, None] * [0.5, 0, 0.1, 0, 0, 0] + 4
    split = split_of(labels, 0.3, 0)
    fitting = Fitting(labels, split)
    areas: list[Any] = []
    for one in range(3):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        model.fit(x[split.train], labels[split.train] == one)
        areas.append(roc_auc_score(labels[split.test] == one, model.decision_function(x[split.test])))
    assert fitting.scores(x)["auroc"] == pytest.approx(np.mean(areas), abs=1e-9)
    wide = sparse.csr_matrix(np.hstack([x, np.zeros((150, 200))]))  # held sparsely, so not centred
    assert fitting.scores(wide)["auroc"] == pytest.approx(np.mean(areas), abs=0.02)
    shares = [(labels[split.test] != one).mean() for one in range(3)]
    said = fitting.majority()
    assert said == {"auroc": 0.5, "balanced_accuracy": 0.5, "accuracy": pytest.approx(np.mean(shares))}
    constant = np.column_stack([x[:, 0], np.full(150, 1e7)])
    assert fitting.scores(constant) == pytest.approx(fitting.scores(x[:, :1]), abs=1e-9)
    assert isinstance(split, Split)
