"""The few firings of every latent that are kept out of all that pass by, in bounded memory."""

import numpy as np

LEAST_WAITING = 1 << 18


class Best:
    """For every latent the `n` firings of highest score seen so far, best first, optionally one of each document.

    Streaming loses nothing: a firing leaves the table only for `n` better ones (of other documents), and a document's
    best only ever rises. Equal scores are told apart by position, so the order of arrival does not matter.

    What beats a latent's last entry waits until as much has come together as the table holds, and is then merged in:
    each merge sorts the table, so merging every batch would cost more than encoding it.
    """

    def __init__(self, d_sae: int, n: int, *, one_per_document: bool) -> None:
        self.n, self.one_per_document = n, one_per_document
        self.score = np.full((d_sae, n), -np.inf)
        self.value = np.zeros((d_sae, n), np.float32)
        self.position = np.full((d_sae, n), -1)
        self.document = np.zeros((d_sae, n), np.int64)
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._many = max(LEAST_WAITING, d_sae * n)

    def update(
        self, latent: np.ndarray, score: np.ndarray, value: np.ndarray, position: np.ndarray, document: np.ndarray
    ) -> None:
        """Offer firings, each argument [n]."""
        good = np.flatnonzero(score >= self.score[latent, -1])
        self._waiting.append((latent[good], score[good], value[good], position[good], document[good]))
        if sum(len(columns[0]) for columns in self._waiting) >= self._many:
            self._merge()

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All that is kept: latent, score, value, position and document, each [n]; by latent, best first."""
        self._merge()
        latent, rank = np.nonzero(self.position >= 0)
        at = latent, rank
        return latent, self.score[at], self.value[at], self.position[at], self.document[at]

    def of(self, latent: int) -> list[tuple[float, int, int]]:
        """(value, position, document) of a latent's entries, best first."""
        self._merge()
        there = self.position[latent] >= 0
        columns = self.value[latent][there], self.position[latent][there], self.document[latent][there]
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _merge(self) -> None:
        """Merge the waiting firings into the table."""
        if not self._waiting:
            return
        there = self.position >= 0
        old = np.nonzero(there)[0], self.score[there], self.value[there], self.position[there], self.document[there]
        columns = [np.concatenate(parts) for parts in zip(old, *self._waiting, strict=True)]
        self._waiting.clear()
        latent, score, value, position, document = columns
        order = np.arange(len(latent))
        if self.one_per_document:
            order = np.lexsort((position, -score, document, latent))
            order = order[first_of_run(latent[order], document[order])]
        order = order[np.lexsort((position[order], -score[order], latent[order]))]
        rank = rank_in_run(latent[order])
        order, rank = order[rank < self.n], rank[rank < self.n]
        place = latent[order], rank
        self.score[place], self.value[place] = score[order], value[order]
        self.position[place], self.document[place] = position[order], document[order]


def first_of_run(*columns: np.ndarray) -> np.ndarray:
    """bool [n]: where a sorted table's key columns differ from the row before."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    return first


def rank_in_run(*columns: np.ndarray) -> np.ndarray:
    """int64 [n]: how many rows of a sorted table with the same key columns come before each."""
    first = np.flatnonzero(first_of_run(*columns))
    n = len(columns[0])
    return np.arange(n) - np.repeat(first, np.diff(np.append(first, n)))


def random_scores(latent: np.ndarray, position: np.ndarray, seed: int) -> np.ndarray:
    """Uniform [0, 1) numbers that depend on the firing and the seed alone (splitmix64, Steele et al. 2014).

    The firings with the highest of them are a uniform sample, whatever the order in which they come.
    """
    salt = (seed * 0xD1342543DE82EF95 + 1) % (1 << 64)
    mixed = latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(salt)
    mixed = _mix(mixed) + position.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(mixed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
