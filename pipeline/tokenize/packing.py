"""Documents -> contexts of equal length, and where in the source each window of contexts starts.

`concat` lays documents end to end and cuts the stream every `context` tokens. `document` starts each document in a
context of its own and pads its last one. `pipeline.tokenizers.layout` says what stands before and between them.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from sae.pipeline.tokenizers.layout import Layout


class DocumentPosition(NamedTuple):
    """The place where the next context starts."""

    source: dict[str, Any] | None  # state of the source before the block
    block: int
    document: int  # index inside the filtered, shuffled block
    token: int  # tokens of that document already used
    documents: int  # documents before it in the whole store


class Packer:
    """Documents -> contexts. Knows the place of every document it holds, to say where the next window starts.

    What it holds always starts at the start of a context.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._held: deque[tuple[np.ndarray, DocumentPosition]] = deque()  # documents not yet fully used
        self._tokens = 0
        self.contexts = 0  # whole contexts that `take` can give

    def add(self, tokens: np.ndarray, place: DocumentPosition) -> None:
        """Take in what is left of a document (as `Layout.document` lays it) from `place` on."""
        layout, body = self.layout, self.layout.body
        apart = layout.packing == "document"
        if layout.separator is not None and place.token == 0 and (apart or self._tokens % body == 0):
            tokens, place = tokens[1:], place._replace(token=1)  # nothing before it in this context
        if apart and layout.begin != "context" and len(tokens) % body == 1:
            tokens = tokens[:-1]  # a last context of one token has nothing to predict
        if len(tokens):
            self._held.append((tokens, place))
            self._tokens += len(tokens)
            self.contexts = self.contexts + -(-len(tokens) // body) if apart else self._tokens // body

    def take(self, contexts: int) -> tuple[dict[str, np.ndarray], DocumentPosition]:
        """Arrays of the next `contexts` contexts, and the place of the context after them."""
        assert 0 < contexts <= self.contexts
        layout, body = self.layout, self.layout.body
        apart = layout.packing == "document"
        tokens = np.full(contexts * body, layout.token, np.uint32)
        document = np.empty(contexts * body, np.uint32)
        length = np.full(contexts, layout.context, np.uint32)
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
            elif apart and (padded := -filled % body):
                length[filled // body] = layout.context - padded
                document[filled : filled + padded] = place.documents
                filled += padded
        self.contexts = self.contexts - contexts if apart else self._tokens // body
        arrays = {"tokens": tokens.reshape(contexts, body), "document": document.reshape(contexts, body)}
        if layout.begin == "context":
            arrays["tokens"] = np.insert(arrays["tokens"], 0, layout.token, axis=1)
            arrays["document"] = np.concatenate([arrays["document"][:, :1], arrays["document"]], axis=1)
        return {**arrays, "length": length}, self._held[0][1] if self._held else after
