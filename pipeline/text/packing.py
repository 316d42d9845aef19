"""Documents -> contexts of equal length, and where in the source each window of contexts starts.

`concat` lays documents end to end and cuts the stream every `context` tokens. `document` starts each document in a
context of its own and pads its last one.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where the next context starts."""

    source: dict[str, Any] | None  # state of the source before the block
    block: int
    document: int  # index inside the filtered, shuffled block
    token: int  # tokens of that document already used
    documents: int  # documents before it in the whole store


class Packer:
    """Documents -> contexts. Knows the place of every document it holds, to say where the next window starts."""

    def __init__(self, context: int, packing: str, pad: int) -> None:
        self.context, self.packing, self.pad = context, packing, pad
        self._held: deque[tuple[np.ndarray, Place]] = deque()  # concat: documents not yet fully used
        self._tokens = 0
        self.contexts = 0  # whole contexts that `take` can give

    def add(self, tokens: np.ndarray, place: Place) -> None:
        """Take in what is left of a document from `place` on."""
        if self.packing == "document" and len(tokens) % self.context == 1:
            tokens = tokens[:-1]  # a last context of one token has nothing to predict
        if len(tokens):
            self._held.append((tokens, place))
            self._tokens += len(tokens)
            pieces = -(-len(tokens) // self.context)
            self.contexts = self._tokens // self.context if self.packing == "concat" else self.contexts + pieces

    def take(self, contexts: int) -> tuple[dict[str, np.ndarray], Place]:
        """Arrays of the next `contexts` contexts, and the place of the context after them."""
        assert 0 < contexts <= self.contexts
        tokens = np.full(contexts * self.context, self.pad, np.uint32)
        document = np.empty(contexts * self.context, np.uint32)
        length = np.full(contexts, self.context, np.uint32)
        filled = 0
        while filled < len(tokens):
            held, place = self._held.popleft()
            used = min(len(held), len(tokens) - filled)
            tokens[filled : filled + used] = held[:used]
            document[filled : filled + used] = place.documents
            filled += used
            self._tokens -= used
            after = place._replace(token=place.token + used)
            if used < len(held):
                self._held.appendleft((held[used:], after))
            elif self.packing == "document" and filled % self.context:
                length[filled // self.context] = filled % self.context
                padded = self.context - filled % self.context
                document[filled : filled + padded] = place.documents
                filled += padded
        self.contexts = self._tokens // self.context if self.packing == "concat" else self.contexts - contexts
        shape = (contexts, self.context)
        arrays = {"tokens": tokens.reshape(shape), "document": document.reshape(shape), "length": length}
        return arrays, self._held[0][1] if self._held else after
