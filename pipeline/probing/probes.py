"""Probes: logistic regressions on a few columns of a table, chosen on the training rows alone.

Columns are chosen by the difference of their means between the class and the others, as k-sparse probing does (Gurnee
et al. 2023, arXiv 2305.01610); the best single one also by its area under the ROC curve. A table is dense [n, d] or
sparse [n, m]. Each class is told from all others; of two classes there is one such question, of the second one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from sae.cache.errors import needing

STEPS = 1000  # of a regression
RANKED = 1 << 22  # values that are ranked at a time
CONSTANT = 1e-6  # deviation, as a share of the mean, below which a column says nothing

Scores = dict[str, float]
FIGURES = ("auroc", "balanced_accuracy", "accuracy")


class Split(NamedTuple):
    """Which rows train and which test, both bool [n]."""

    train: np.ndarray
    test: np.ndarray


def expect_scikit_learn() -> None:
    """Raise SaeError where scikit-learn, which fits the regressions, is not installed."""
    with needing("probe", "probing"):
        import sklearn  # noqa: F401


def split_of(labels: np.ndarray, share: float, seed: int) -> Split:
    """A share of each class for the test, at least one row of each; a function of labels [n] and the seed alone."""
    random, test = np.random.default_rng([seed, 1]), np.zeros(len(labels), bool)
    for one in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == one))
        test[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    return Split(~test, test)


def questions(labels: np.ndarray) -> list[np.ndarray]:
    """bool [n] for each question: is a row of this class? Of two classes, of the second one alone."""
    classes = np.unique(labels)
    return [labels == one for one in (classes[1:] if len(classes) == 2 else classes)]


def mean_differences(table: Any, positive: np.ndarray) -> np.ndarray:
    """[m]: how much higher the mean of each column is over rows that are `positive` [n]."""
    return _mean(table[positive]) - _mean(table[~positive])


def largest(differences: np.ndarray, k: int) -> np.ndarray:
    """The k columns that differ most, either way, the most so first; of equal ones the first."""
    return np.argsort(-np.abs(differences), kind="stable")[:k]


def aurocs(table: Any, asked: Sequence[np.ndarray]) -> np.ndarray:
    """[questions, m]: the area under the ROC curve of each column for each question, bool [n]; ties count half."""
    from scipy.stats import rankdata

    n, m = table.shape
    positive = np.stack([one.astype(np.float64) for one in asked])
    count = positive.sum(1, keepdims=True)
    found = np.full((len(asked), m), 0.5)
    alive = np.flatnonzero(fired(table))
    columns = table.tocsc() if sparse.issparse(table) else table
    for part in np.array_split(alive, max(1, -(-len(alive) * n // RANKED))):
        if len(part):
            ranks = rankdata(_dense(columns[:, part]), axis=0)
            found[:, part] = (positive @ ranks - count * (count + 1) / 2) / (count * (n - count))
    return found


def fired(table: Any) -> np.ndarray:
    """bool [m]: which columns are not zero in all rows."""
    return np.asarray((table != 0).sum(0)).reshape(-1) > 0


@dataclass
class Fitting:
    """Fits probes on one split. `unconverged` counts regressions that were still moving after the last step."""

    labels: np.ndarray
    split: Split
    fits: int = 0
    unconverged: int = 0

    def asked(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whether each training row and each test row is of a class, for every question."""
        for positive in questions(self.labels):
            yield positive[self.split.train], positive[self.split.test]

    def scores(self, table: Any, chosen: Sequence[np.ndarray] | None = None) -> Scores:
        """The mean over the questions of a probe's scores on the test rows of a table [n, m].

        chosen: the columns that it reads, of each question; None: all.
        """
        train, test = table[self.split.train], table[self.split.test]
        if chosen is not None and sparse.issparse(table):
            train, test = train.tocsc(), test.tocsc()
        each = []
        for number, (y, y_test) in enumerate(self.asked()):
            columns = slice(None) if chosen is None else chosen[number]
            each.append(self._fitted(train[:, columns], y, test[:, columns], y_test))
        return _mean_scores(each)

    def majority(self) -> Scores:
        """The scores of saying the more frequent answer always."""
        found = []
        for y, y_test in self.asked():
            said = y.mean() > 0.5
            found.append({"auroc": 0.5, "balanced_accuracy": 0.5, "accuracy": float((y_test == said).mean())})
        return _mean_scores(found)

    def _fitted(self, x: Any, y: np.ndarray, x_test: Any, y_test: np.ndarray) -> Scores:
        """Columns in units of their training deviation; classes weigh alike, however many rows they have."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score, roc_auc_score

        whole = sparse.issparse(x) and x.shape[1] > len(y)  # too wide to be held with its zeros
        x, x_test = (one.tocsr().astype(np.float64) if whole else _dense(one) for one in (x, x_test))
        mean, deviation = _mean(x), _deviation(x)
        unit = 1 / np.where(deviation > CONSTANT * np.abs(mean), deviation, 1)
        x, x_test = (one @ sparse.diags(unit) if whole else (one - mean) * unit for one in (x, x_test))
        model = LogisticRegression(max_iter=STEPS, class_weight="balanced")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it is counted
            model.fit(x, y)
        self.fits += 1
        self.unconverged += int(model.n_iter_.max() >= STEPS)
        answer = model.predict(x_test)
        return {
            "auroc": float(roc_auc_score(y_test, model.decision_function(x_test))),
            "balanced_accuracy": float(balanced_accuracy_score(y_test, answer)),
            "accuracy": float((answer == y_test).mean()),
        }


def _mean_scores(each: Sequence[Scores]) -> Scores:
    return {name: float(np.mean([one[name] for one in each])) for name in FIGURES}


def _dense(table: Any) -> np.ndarray:
    return np.asarray(table.toarray() if sparse.issparse(table) else table, np.float64)


def _mean(table: Any) -> np.ndarray:
    return np.asarray(table.mean(0), np.float64).reshape(-1)


def _deviation(table: Any) -> np.ndarray:
    squares = table.multiply(table) if sparse.issparse(table) else table * table
    return np.sqrt(np.maximum(_mean(squares) - _mean(table) ** 2, 0))
