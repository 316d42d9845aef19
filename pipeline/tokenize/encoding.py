"""Documents -> tokens, in this process or by the workers of a cluster, in order.

A document is text, or token ids that somebody made before: those are checked, not made. Documents travel in pieces of
about PIECE_CHARACTERS; the tokens of a piece come back as one array, which is packed and unpacked faster than one array
a document. A few pieces a worker are under way, whatever the size of a block.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.cache.disk.identity import canonical
from sae.cache.errors import SaeError
from sae.pipeline.parallel.dask_cluster import Cluster
from sae.pipeline.parallel.process_pool import Pool
from sae.pipeline.tokenize.sources import Document
from sae.pipeline.tokenizers.foreign import said
from sae.pipeline.tokenizers.tokenizer import Tokenizer, tokenizer

PIECE_CHARACTERS = 1 << 18  # what one worker encodes at a time
ALONE_CHARACTERS = 1 << 22  # what this process encodes first: less takes no longer than processes to start
Team = Cluster | Pool
AHEAD = 4  # pieces that wait, beside two a worker


class Block(NamedTuple):
    """Documents of one split, shuffled, and where the source stood before them."""

    source: dict[str, Any] | None
    number: int
    documents: list[Document]


class Encoder:
    """Encodes the documents of blocks with the tokenizer that `spec` names, which is `tok` in this process.

    `connect` starts the processes that are to do it; None: this process does it. The first `alone` characters are
    encoded here in any case, and processes started where there is more.
    """

    def __init__(
        self,
        spec: str,
        tok: Tokenizer,
        connect: Callable[[], Cluster | Pool | None] = lambda: None,
        *,
        offline: bool = False,
        alone: int = 0,
    ) -> None:
        self._tokenizer, self._connect, self._alone = tok, connect, alone
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

        def pieces() -> Iterator[list[Document]]:
            left_out = skip
            for block in blocks:
                for first, documents in _pieces(block.documents, left_out):
                    heads.append((block, first))
                    yield documents
                left_out = 0

        for encoded in self._encoded(pieces()):
            block, first = heads.popleft()
            for index, ids in enumerate(encoded, first):
                yield block, index, ids

    def _encoded(self, pieces: Iterator[list[Document]]) -> Iterator[list[np.ndarray]]:
        while self._alone > 0 and (piece := next(pieces, None)) is not None:
            self._alone -= sum(map(len, piece))
            yield encoded(self._tokenizer, piece)
        piece = next(pieces, None)
        if piece is None:
            return
        pieces = itertools.chain([piece], pieces)
        if self._cluster is None:
            yield from (encoded(self._tokenizer, piece) for piece in pieces)
            return
        done = self._cluster.ordered(self._call(), pieces, lambda size: AHEAD + 2 * size, lambda _: "encoding text")
        for _, (ids, ends) in done:
            yield np.split(ids, ends[:-1])

    def _call(self) -> "functools.partial[tuple[np.ndarray, np.ndarray]]":
        return functools.partial(_encode, self._spec, self._offline, canonical(self._tokenizer.recipe()))


def _pieces(documents: list[Document], start: int) -> Iterator[tuple[int, list[Document]]]:
    """Consecutive runs of documents from `start` on, of about PIECE_CHARACTERS, each with the index of its first."""
    piece: list[Document] = []
    characters = 0
    for index in range(start, len(documents)):
        piece.append(documents[index])
        characters += len(documents[index])
        if characters >= PIECE_CHARACTERS or index == len(documents) - 1:
            yield index + 1 - len(piece), piece
            piece, characters = [], 0


def encoded(tok: Tokenizer, documents: list[Document]) -> list[np.ndarray]:
    """Tokens (uint32) of each document. SaeError for text that cannot be encoded and ids that are not its own."""
    made = iter(_of_texts(tok, [one for one in documents if isinstance(one, str)]))
    return [next(made) if isinstance(one, str) else _ready_made(tok, one) for one in documents]


def _of_texts(tok: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    try:
        return tok.encode_batch(texts)
    except BaseException as error:
        if not _is_of_text(error):
            raise
        for text in texts if len(texts) > 1 else []:
            _of_texts(tok, [text])  # raises for the one that it was
        begin = f"of {len(texts[0]):,} characters that begins {texts[0][:40]!r}"
        raise SaeError(
            f"tokenizer = {tok.slug}: cannot encode the text {begin} ({said(error)}); leave it out, or try another"
        ) from error


def _is_of_text(error: BaseException) -> bool:
    """Return True if a tokenizer stumbled over its text. A panic of those written in Rust is not an Exception."""
    unrelated = isinstance(error, SaeError | MemoryError) or not isinstance(error, Exception)
    return not unrelated or type(error).__name__ == "PanicException"


def _ready_made(tok: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """Token ids as a document's own: checked, and without the begin token, which the layout puts where it belongs."""
    if len(ids) and int(ids.max()) >= tok.n_vocab:
        raise SaeError(
            f"tokenizer = {tok.slug}: has tokens 0 to {tok.n_vocab - 1}, and the ready-made ids hold {ids.max()}; "
            "name the tokenizer they were made with"
        )
    return ids[1:] if len(ids) and ids[0] == tok.begin else ids


def _encode(spec: str, offline: bool, recipe: str, documents: list[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all documents behind each other (uint32), and where each ends. Runs in a worker."""
    found = encoded(_tokenizer(spec, offline, recipe), documents)
    return np.concatenate([np.empty(0, np.uint32), *found]), np.cumsum([0, *map(len, found)])[1:]


@functools.lru_cache(maxsize=2)
def _tokenizer(spec: str, offline: bool, recipe: str) -> Tokenizer:
    """The worker's tokenizer. Raises SaeError where it is not the client's."""
    found = tokenizer(spec, offline=offline)
    if canonical(found.recipe()) != recipe:
        raise SaeError(f"tokenizer = {spec}: a worker has another one of that name; give all machines the same")
    return found
