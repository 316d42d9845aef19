"""The questions by which an explanation is judged, and the scores of their answers.

    detection    in which of these contexts does the latent fire?
    fuzzing      in which of these contexts are the marked tokens those on which it fires?
    simulation   how strongly, from 0 to 10, does it fire on each token of this context?

The first two are scored by balanced accuracy: the mean of the shares of right answers where it fires and where it does
not. The share of right answers alone would flatter whoever always says no. A simulation is scored by the correlation of
its numbers with the activations; one that says the same of every token is correlated with nothing, and scores 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae.pipeline.explain.config import Scoring
from sae.pipeline.explain.corpus import Material, Window

SCALE = 10  # the strongest activation in a simulation
CHANCE: dict[Scoring, float] = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0}


@dataclass(frozen=True)
class Question:
    """Windows, of fuzzing with the tokens marked in each, that are asked about at once, and the right answers.

    A question has as many answers as `truth`: one a window or, of a simulation, one a token.
    """

    scoring: Scoring
    windows: tuple[Window, ...]
    marks: tuple[tuple[bool, ...], ...]
    truth: tuple[float, ...]

    @property
    def largest(self) -> int:
        """The largest answer; the smallest is 0."""
        return SCALE if self.scoring == "simulation" else 1


@dataclass(frozen=True)
class Scored:
    """The score of the answers that there were; each figure None where it is not defined.

    accuracy: the share of right answers, to be read beside the others only.
    """

    score: float | None
    balanced_accuracy: float | None
    accuracy: float | None


def questions(scoring: Scoring, material: Material, seed: int) -> list[Question]:
    """The questions about one latent, in a seeded order of their windows."""
    random = np.random.default_rng((seed, material.latent, *scoring.encode()))
    if scoring == "fuzzing":
        return [_fuzzing(material.active, random)]
    both = [*material.active, *material.silent]
    order = random.permutation(len(both))
    windows = tuple(both[i] for i in order)
    if scoring == "detection":
        return [Question(scoring, windows, (), tuple(float(i < len(material.active)) for i in order))]
    return [Question(scoring, (window,), (), window.activations) for window in windows]


def _fuzzing(active: Sequence[Window], random: np.random.Generator) -> Question:
    """Every other window marked on as many tokens as it fires on, but on others, where there are any."""
    windows = [active[i] for i in random.permutation(len(active))]
    marks: list[tuple[bool, ...]] = []
    truth = []
    for turn, window in enumerate(windows):
        quiet = [i for i, value in enumerate(window.activations) if value == 0]
        wrong = turn % 2 == 1 and len(quiet) > 0
        chosen = set(random.permutation(quiet)[: sum(window.fires)].tolist()) if wrong else set()
        marks.append(tuple(i in chosen for i in range(len(window.tokens))) if wrong else window.fires)
        truth.append(float(not wrong))
    return Question("fuzzing", tuple(windows), tuple(marks), tuple(truth))


def scored(asked: Sequence[Question], answers: Sequence[Sequence[int]]) -> Scored:
    """The score of questions by their answers, all of one scoring."""
    pairs = [
        (right, said)
        for question, answer in zip(asked, answers, strict=True)
        for right, said in zip(question.truth, answer, strict=True)
    ]
    truth, said = (np.array(column, np.float64) for column in zip(*pairs, strict=True)) if pairs else (np.zeros(0),) * 2
    balanced = balanced_accuracy(truth > 0, said > 0)
    accuracy = float(((truth > 0) == (said > 0)).mean()) if len(truth) else None
    score = correlation(truth, said) if asked and asked[0].scoring == "simulation" else balanced
    return Scored(score, balanced, accuracy)


def balanced_accuracy(truth: np.ndarray, said: np.ndarray) -> float | None:
    """The mean of the shares of right answers among the true and among the false; None where one of them is empty."""
    if truth.all() or not truth.any():
        return None
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def correlation(truth: np.ndarray, said: np.ndarray) -> float | None:
    """Pearson's correlation; None where there is nothing to be correlated with, 0 where the same is said everywhere."""
    if len(truth) < 2 or truth.min() == truth.max():
        return None
    if said.min() == said.max():
        return 0.0
    return float(np.corrcoef(truth, said)[0, 1])
