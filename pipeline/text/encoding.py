"""Documents -> tokens, in this process or by the workers of a cluster, in order.

Documents travel in pieces of about PIECE_CHARACTERS; the tokens of a piece come back as one array, which is packed and
unpacked faster than one array a document. A few pieces a worker are under way, whatever the size of a block.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache.errors import SaeError
from cache.identity import canonical
from pipeline.cluster import Cluster
from pipeline.text.pool import Pool
from pipeline.text.tokenizers import Tokenizer, tokenizer

PIECE_CHARACTERS = 1 << 18  # what one worker encodes at a time
Team = Cluster | Pool
AHEAD = 6  # pieces a worker that are under way or wait to be packed


class Block(NamedTuple):
    """Documents of one split, shuffled, and where the source stood before them."""

    source: dict[str, Any] | None
    number: int
    texts: list[str]


class Encoder:
    """Encodes the documents of blocks with the tokenizer that `spec` names, which is `tok` in this process.

    `connect` starts the processes that are to do it, once there is something to encode; None: this process does it.
    """

    def __init__(
        self,
        spec: str,
        tok: Tokenizer,
        connect: Callable[[], Cluster | Pool | None] = lambda: None,
        *,
        offline: bool = False,
    ) -> None:
        self._tokenizer, self._connect = tok, connect
        self._spec = str(Path(spec).resolve()) if Path(spec).is_dir() else spec
        self._offline = offline

    @functools.cached_property
    def _cluster(self) -> Team | None:
        return self._connect()

    def warm_up(self) -> None:
        """Load the tokenizer in every worker now rather than at its first piece."""
        if self._cluster is not None:
            self._cluster.everywhere(self._call(), [])

    def documents(self, blocks: Iterator[Block], skip: int) -> Iterator[tuple[Block, int, np.ndarray]]:
        """Each document's block, index in it and tokens (uint32); the first `skip` of the first block are left out."""
        heads: deque[tuple[Block, int]] = deque()  # of the pieces under way

        def pieces() -> Iterator[list[str]]:
            left_out = skip
            for block in blocks:
                for first, texts in _pieces(block.texts, left_out):
                    heads.append((block, first))
                    yield texts
                left_out = 0

        for encoded in self._encoded(pieces()):
            block, first = heads.popleft()
            for index, ids in enumerate(encoded, first):
                yield block, index, ids

    def _encoded(self, pieces: Iterator[list[str]]) -> Iterator[list[np.ndarray]]:
        if self._cluster is None:
            yield from map(self._tokenizer.encode_batch, pieces)
            return
        ahead = AHEAD * self._cluster.size
        for _, (ids, ends) in self._cluster.ordered(self._call(), pieces, ahead, lambda _: "encoding text"):
            yield np.split(ids, ends[:-1])

    def _call(self) -> "functools.partial[tuple[np.ndarray, np.ndarray]]":
        return functools.partial(_encode, self._spec, self._offline, canonical(self._tokenizer.recipe()))


def _pieces(texts: list[str], start: int) -> Iterator[tuple[int, list[str]]]:
    """Consecutive runs of documents from `start` on, of about PIECE_CHARACTERS, each with the index of its first."""
    piece: list[str] = []
    characters = 0
    for index in range(start, len(texts)):
        piece.append(texts[index])
        characters += len(texts[index])
        if characters >= PIECE_CHARACTERS or index == len(texts) - 1:
            yield index + 1 - len(piece), piece
            piece, characters = [], 0


def _encode(spec: str, offline: bool, recipe: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts behind each other (uint32), and where each text ends. Runs in a worker."""
    encoded = _tokenizer(spec, offline, recipe).encode_batch(texts)
    none = np.empty(0, np.uint32)
    return np.concatenate([none, *encoded]), np.cumsum([0, *map(len, encoded)])[1:]


@functools.lru_cache(maxsize=2)
def _tokenizer(spec: str, offline: bool, recipe: str) -> Tokenizer:
    """The worker's tokenizer. Raises SaeError where it is not the client's."""
    found = tokenizer(spec, offline=offline)
    if canonical(found.recipe()) != recipe:
        raise SaeError(f"--tokenizer {spec}: a worker has another one of that name; give all machines the same")
    return found
