"""Shuffled contexts of a token store, by their place in an order that a seed decides: there is no state to save."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.cache.tokens import TokenStore, contexts_per_chunk

OPEN_CHUNKS = 16  # chunks mixed at any time: a million tokens


class TokenBatch(NamedTuple):
    """Tokens int64 [B, T], and how many of each context are real, int64 [B]."""

    tokens: Tensor
    lengths: Tensor


class Contexts:
    """The first `count` contexts of a token store, over and over, in an order of their own in each pass.

    Chunks are visited in a random order, and the contexts of OPEN_CHUNKS of them are mixed.
    """

    def __init__(self, store: TokenStore, count: int, seed: int) -> None:
        self.store, self.count, self.seed = store, count, seed
        self._chunk = contexts_per_chunk(store.context_length)
        self._order = lru_cache(maxsize=2)(self._order_of)
        self._mixed = lru_cache(maxsize=1)(self._mixed_of)

    def batch(self, start: int, size: int) -> TokenBatch:
        """The contexts in places [start, start + size) of the order, which has no end."""
        tokens, lengths = [], []
        while size:
            epoch, place = divmod(start, self.count)
            ends = self._order(epoch)[1]
            group = int(np.searchsorted(ends, place, side="right"))
            mixed = self._mixed(epoch, group)
            first = place - int(ends[group] - len(mixed.lengths))
            taken = min(size, len(mixed.lengths) - first)
            tokens.append(mixed.tokens[first : first + taken])
            lengths.append(mixed.lengths[first : first + taken])
            start, size = start + taken, size - taken
        return TokenBatch(torch.cat(tokens), torch.cat(lengths))

    def _order_of(self, epoch: int) -> tuple[list[list[int]], np.ndarray]:
        """The chunks of each group of an epoch, and where the groups end."""
        chunks = np.random.default_rng([self.seed, epoch]).permutation(-(-self.count // self._chunk)).tolist()
        groups = [chunks[i : i + OPEN_CHUNKS] for i in range(0, len(chunks), OPEN_CHUNKS)]
        sizes = [sum(stop - start for start, stop in map(self._bounds, group)) for group in groups]
        return groups, np.cumsum(sizes)

    def _bounds(self, chunk: int) -> tuple[int, int]:
        return chunk * self._chunk, min(self.count, (chunk + 1) * self._chunk)

    def _mixed_of(self, epoch: int, group: int) -> TokenBatch:
        bounds = [self._bounds(chunk) for chunk in self._order(epoch)[0][group]]
        tokens = np.concatenate([self.store.contexts(*each) for each in bounds])
        lengths = np.concatenate([self.store.lengths(*each) for each in bounds])
        order = np.random.default_rng([self.seed, epoch, group]).permutation(len(lengths))
        return TokenBatch(torch.from_numpy(tokens[order]), torch.from_numpy(lengths[order]))
