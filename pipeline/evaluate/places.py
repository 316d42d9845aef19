"""Where in a text rows come from: their tokens' places in contexts, and how common those tokens are."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sae.cache.tokens import TokenStore
from sae.pipeline.metrics.breakdown import FREQUENCIES
from sae.pipeline.metrics.metric import Places

MOST = 1 << 26  # tokens that are looked at, a byte each; rows of later ones are in no breakdown
AT_ONCE = 1 << 22


class TokenPlaces:
    """The places of held-out tokens. A token's share is that of its occurrences among them, padding left out."""

    def __init__(self, tokens: TokenStore) -> None:
        self.tokens = tokens
        self.contexts = min(tokens.n_contexts, MOST // tokens.context_length)

    def of(self, positions: Tensor) -> Places:
        """Return the places of tokens, int64 of any shape: context * length + position."""
        known = positions < len(self._classes)
        classes = torch.where(known, self._classes[positions.where(known, 0)].long(), -1)
        return Places(positions % self.tokens.context_length, classes)

    def of_contexts(self, start: int, stop: int) -> Places:
        """Return the places of all tokens of contexts [start, stop): [n, T]."""
        length = self.tokens.context_length
        return self.of(torch.arange(start * length, stop * length).view(stop - start, length))

    @cached_property
    def _classes(self) -> Tensor:
        """uint8 [tokens]: by how many of the shares FREQUENCIES each token is rarer."""
        step = max(1, AT_ONCE // self.tokens.context_length)
        parts = [(at, min(at + step, self.contexts)) for at in range(0, self.contexts, step)]
        counts = np.zeros(self.tokens.n_vocab, np.int64)
        for start, stop in parts:
            ids, lengths = self.tokens.contexts(start, stop), self.tokens.lengths(start, stop)
            real = np.arange(ids.shape[1]) < lengths[:, None]
            counts += np.bincount(ids[real], minlength=len(counts))
        shares = counts / max(1, counts.sum())
        rarer = sum((shares < least).astype(np.uint8) for least in FREQUENCIES)
        found = [rarer[self.tokens.contexts(*part)].ravel() for part in parts]
        return torch.from_numpy(np.concatenate(found) if found else np.zeros(0, np.uint8))
