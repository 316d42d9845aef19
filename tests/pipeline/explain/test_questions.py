"""Scores of answers, and windows that questions are made of."""

import numpy as np
import pytest

from sae.pipeline.explain.corpus import Material, Window
from sae.pipeline.explain.questions import Question, balanced_accuracy, correlation, questions, scored


def window(*activations: float, document: int = 0) -> Window:
    n = len(activations)
    return Window(tuple(range(n)), tuple(f" t{i}" for i in range(n)), activations, document, 0)


def material(active: int = 4, silent: int = 10) -> Material:
    return Material(
        7, 0.1, (window(1.0),) * 4, tuple(window(0.0, 2.0, 0.0, 4.0, document=i) for i in range(active)),
        tuple(window(0.0, 0.0, 0.0, 0.0, document=100 + i) for i in range(silent)),
    )  # fmt: skip


def test_always_no_is_chance_and_not_what_the_share_of_right_answers_makes_of_it() -> None:
    (asked,) = questions("detection", material(), 0)
    found = scored([asked], [[0] * 14])
    assert (found.score, found.balanced_accuracy) == (0.5, 0.5)
    assert found.accuracy == pytest.approx(10 / 14) and round(10 / 14, 3) == 0.714  # the figure that deceived others
    assert scored([asked], [[int(bool(right)) for right in asked.truth]]).score == 1.0
    assert scored([asked], [[int(not right) for right in asked.truth]]).score == 0.0


def test_no_answers_have_no_score() -> None:
    assert scored([], []).score is None and scored([], []).accuracy is None
    assert balanced_accuracy(np.array([True, True]), np.array([True, False])) is None
    assert correlation(np.array([1.0, 1.0]), np.array([0.0, 3.0])) is None
    with pytest.raises(ValueError, match="zip"):
        scored(questions("detection", material(), 0), [[1, 0]])


def test_a_simulation_is_scored_by_correlation_over_all_tokens() -> None:
    asked = questions("simulation", material(), 0)
    assert len(asked) == 14 and all(question.largest == 10 for question in asked)
    right = [[round(2 * value) for value in question.truth] for question in asked]
    assert scored(asked, right).score == pytest.approx(1.0)
    assert scored(asked, [[7] * 4] * 14).score == 0.0, "the same everywhere is correlated with nothing"


def test_fuzzing_marks_as_many_tokens_in_wrong_windows_as_in_right_ones() -> None:
    (asked,) = questions("fuzzing", material(active=6), 3)
    assert sorted(asked.truth) == [0.0] * 3 + [1.0] * 3
    for one, marks, truth in zip(asked.windows, asked.marks, asked.truth, strict=True):
        assert sum(marks) == sum(one.fires) == 2 and (marks == one.fires) == bool(truth)


def test_the_order_of_windows_tells_nothing_and_is_seeded() -> None:
    orders = [questions("detection", material(), seed)[0].truth for seed in range(20)]
    assert len(set(orders)) > 10 and orders == [questions("detection", material(), seed)[0].truth for seed in range(20)]
    assert isinstance(questions("detection", material(), 0)[0], Question)
