"""The few firings of every latent that are kept out of all that pass by, in bounded memory."""

import numpy as np
import torch
from torch import Tensor

LEAST_WAITING = 1 << 18


class Best:
    """For every latent the `n` firings of highest score seen so far, best first, optionally one of each document.

    Streaming loses nothing: a firing leaves the table only for `n` better ones (of other documents), and a document's
    best only ever rises. Equal scores are told apart by position, so the order of arrival does not matter.

    What beats a latent's last entry waits until as much has come together as the table holds, and is then merged in:
    each merge sorts the table, so merging every batch would cost more than encoding it. All of it is where the firings
    are; how many there are is asked for.
    """

    def __init__(self, d_sae: int, n: int, *, one_per_document: bool, device: torch.device | str = "cpu") -> None:
        self.n, self.one_per_document = n, one_per_document
        whole = torch.empty(0, dtype=torch.int64, device=device)
        self._kept: tuple[Tensor, ...] = (whole, whole, whole.float(), whole, whole)  # by latent, best first
        self._floor = torch.full((d_sae,), torch.iinfo(torch.int64).min, device=device)  # score of the n-th entry
        self._waiting: list[tuple[Tensor, ...]] = []
        self._many = max(LEAST_WAITING, d_sae * n)

    def update(self, latent: Tensor, score: Tensor, value: Tensor, position: Tensor, document: Tensor) -> None:
        """Offer firings, each argument [n], int64 but for the values, which are float32."""
        good = (score >= self._floor[latent]).nonzero().view(-1)
        self._waiting.append(tuple(column[good] for column in (latent, score, value, position, document)))
        if sum(len(columns[0]) for columns in self._waiting) >= self._many:
            self._merge()

    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All that is kept: latent, score, value, position and document, each [n]; by latent, best first."""
        self._merge()
        latent, score, value, position, document = (column.cpu().numpy() for column in self._kept)
        return latent, score, value, position, document

    def of(self, latent: int) -> list[tuple[float, int, int]]:
        """(value, position, document) of a latent's entries, best first."""
        latents, _, *columns = self.entries()
        return list(zip(*(column[latents == latent].tolist() for column in columns), strict=True))

    def _merge(self) -> None:
        """Merge the waiting firings into the table."""
        if not self._waiting:
            return
        columns = [torch.cat(parts) for parts in zip(self._kept, *self._waiting, strict=True)]
        self._waiting.clear()
        latent, score, _, position, document = columns
        order = _sorted_by(position, -score, latent)
        if self.one_per_document:
            by_document = order[_sorted_by(document[order], latent[order])]  # still best first
            a, b = latent[by_document], document[by_document]
            again = by_document[1:][(a[1:] == a[:-1]) & (b[1:] == b[:-1])]
            order = order[torch.ones_like(latent, dtype=torch.bool).index_fill_(0, again, False)[order]]
        n, by_latent = self.n, latent[order]
        within = torch.ones_like(order, dtype=torch.bool)
        within[n:] = by_latent[n:] != by_latent[:-n]
        order = order[within]
        latent, score, *_ = self._kept = tuple(column[order] for column in columns)
        ends = (latent[n - 1 :] == latent[: max(0, len(latent) - n + 1)]).nonzero().view(-1) + n - 1
        self._floor[latent[ends]] = score[ends]


def _sorted_by(*keys: Tensor) -> Tensor:
    """The order of a table by int64 keys [n], the last the foremost."""
    order = keys[0].argsort(stable=True)
    for key in keys[1:]:
        order = order[key[order].argsort(stable=True)]
    return order


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
    """Uniform [0, 1) numbers that depend on the firing and the seed alone.

    The firings with the highest of them are a uniform sample, whatever the order in which they come.
    """
    return random_bits(torch.from_numpy(latent), torch.from_numpy(position), seed).numpy() * 2.0**-53


def random_bits(latent: Tensor, position: Tensor, seed: int) -> Tensor:
    """The same as integers below 2^53, of int64 tensors (splitmix64, Steele et al. 2014, in wrapping arithmetic)."""
    mixed = _mix(latent * GOLDEN ^ _signed(seed * 0xD1342543DE82EF95 + 1))
    return _shifted(_mix(mixed + position * GOLDEN), 11)


def _signed(number: int) -> int:
    """The int64 with the last 64 bits of a number."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


GOLDEN = _signed(0x9E3779B97F4A7C15)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right as if there were no sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)
