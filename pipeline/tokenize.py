"""Text -> token stores: `train` and `validation`, no document in both.

Documents are read in blocks of the source's order; each block is filtered to its split, shuffled (seeded) and encoded.
Every document begins with the tokenizer's begin token (end-of-text for GPT-2). Packing `concat` lays documents end to
end and cuts the stream every `context` tokens; the tail of the last document that does not fill a context is left out.
Packing `document` starts each document in a context of its own and pads its last one with the begin token; padding
never becomes a row or a target.

Each window of contexts is committed with the place in the source where the next one starts, so that an interrupted
run continues there and ends with the same bytes.
"""

import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cache.errors import SaeError
from cache.identity import Recipe
from cache.manifest import Window
from cache.tokens import TokenStore, TokenWriter
from pipeline.progress import Progress
from pipeline.sources import TextSource, is_validation, text_source
from pipeline.tokenizers import Tokenizer, tokenizer

BLOCK_DOCUMENTS = 4096
BLOCK_CHARACTERS = 1 << 25
PIECE_CHARACTERS = 1 << 18  # what one worker encodes at a time
SPLITS = ("train", "validation")

Amount = Annotated[int, Field(ge=1)] | Literal["all"]


class TokenizeConfig(BaseModel):
    """What to tokenize and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        "fineweb",
        description="fineweb, python (the text every Python ships with), org/name of a hub data set, or local files: "
        "parquet, jsonl, txt, a folder, a glob",
    )
    column: str = Field("text", description="the field that holds the text, where documents are records")
    tokenizer: str = Field(
        "gpt2",
        description="a tiktoken encoding (gpt2, cl100k_base, ...), tiny, a Hugging Face folder, or hf:org/name",
    )
    context: int = Field(128, ge=2, description="tokens in a context")
    tokens: Amount = Field(
        10_000_000, description="training tokens wanted, rounded up to a window; all for all there are"
    )
    validation_tokens: Amount = Field(131_072, description="validation tokens wanted; all for all there are")
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of documents, chosen by hash, that is kept for validation"
    )
    packing: Literal["concat", "document"] = Field(
        "concat", description="concat: documents end to end; document: none shares a context"
    )
    seed: int = Field(0, ge=0, description="seed of the document shuffle")


class Place(NamedTuple):
    """Where the next context starts."""

    source: dict[str, Any] | None  # state of the source before the block
    block: int
    document: int  # index inside the filtered, shuffled block
    token: int  # tokens of that document already used
    documents: int  # documents before it in the whole store


class Block(NamedTuple):
    """Documents of one split, shuffled, and where the source stood before them."""

    source: dict[str, Any] | None
    number: int
    texts: list[str]


@dataclass(frozen=True)
class TokenizeResult:
    """The stores a call made or continued, by split."""

    stores: dict[str, TokenStore]


def tokenize(
    config: TokenizeConfig, root: Path, progress: Progress, *, workers: int = 1, offline: bool = False
) -> TokenizeResult:
    """Make or continue the token stores `config` describes, under the cache folder `root`."""
    source = text_source(config.source, offline=offline, column=config.column)
    tok = tokenizer(config.tokenizer, offline=offline)
    stores = {}
    with Encoder(config.tokenizer, tok, workers, offline) as encoder:
        for split in SPLITS if config.validation > 0 else SPLITS[:1]:
            wanted = config.tokens if split == "train" else config.validation_tokens
            stores[split] = tokenize_split(config, split, wanted, source, tok, encoder, root, progress)
    return TokenizeResult(stores)


def token_recipe(config: TokenizeConfig, source: TextSource, tok: Tokenizer, split: str) -> Recipe:
    """Everything that decides the tokens of a store."""
    return {
        "source": source.recipe(),
        "tokenizer": {**tok.recipe(), "n_vocab": tok.n_vocab, "begin": tok.begin},
        "context_length": config.context,
        "packing": config.packing,
        "shuffle": {"seed": config.seed, "documents": BLOCK_DOCUMENTS, "characters": BLOCK_CHARACTERS},
        "validation": config.validation,
        "split": split,
    }


def tokenize_split(
    config: TokenizeConfig, split: str, wanted: Amount, source: TextSource, tok: Tokenizer,
    encoder: "Encoder", root: Path, progress: Progress,
) -> TokenStore:  # fmt: skip
    """Make or continue the store of one split."""
    slug = "-".join([source.slug, tok.slug, str(config.context), *([split] if split != "train" else [])])
    with TokenWriter(root, slug, token_recipe(config, source, tok, split)) as writer:
        if writer.notice:
            progress.note(writer.notice)
        writer.write_vocabulary(tok.vocabulary())
        target = _target(writer.store, wanted, progress)
        if writer.store.closed or (target is not None and writer.store.n_contexts >= target):
            return writer.store
        total = None if target is None else target * config.context
        progress.start(f"tokenize {split}", total, "tokens", done=writer.store.n_tokens)
        try:
            _fill(config, split, target, source, tok, encoder, writer, progress)
        finally:
            progress.finish()
        if not writer.store.n_contexts:
            raise SaeError(_too_little(config, split))
        return writer.store


def _target(store: TokenStore, wanted: Amount, progress: Progress) -> int | None:
    """Contexts to reach, rounded up to a window."""
    if wanted == "all":
        return None
    contexts = -(-wanted // store.context_length)
    target = store.windows.round_up(contexts)
    if target != contexts and not store.closed and store.n_contexts < target:
        progress.note(
            f"{wanted:,} {store.split} tokens rounded up to {target * store.context_length:,}, a whole window"
        )
    return target


def _too_little(config: TokenizeConfig, split: str) -> str:
    if split == "validation":
        return (
            f"--source {config.source}: no document fell to the validation split ({config.validation:g} of all); "
            "try --set tokenize.validation=0.1"
        )
    return f"--source {config.source}: holds less than one context of {config.context} tokens; try a smaller --context"


def _fill(
    config: TokenizeConfig, split: str, target: int | None, source: TextSource, tok: Tokenizer,
    encoder: "Encoder", writer: TokenWriter, progress: Progress,
) -> None:  # fmt: skip
    """Pack and commit windows until the target or the source's end."""
    windows = writer.store.manifest.windows
    place = Place(**windows[-1].notes["next"]) if windows else Place(None, 0, 0, 0, 0)
    writer.request(target if target is not None else 1 << 62)
    documents = _encoded_documents(_blocks(config, split, source, place), place, encoder, tok.begin)
    packer = Packer(config.context, config.packing, tok.begin)
    number, contexts = len(windows), writer.store.n_contexts
    # A window is compressed and flushed while the next one is being encoded; at most one is under way.
    with ThreadPoolExecutor(1) as committing:
        under_way: Future[Window] | None = None
        while target is None or contexts < target:
            start, stop = writer.store.windows.bounds(number)
            while packer.contexts < stop - start and (item := next(documents, None)) is not None:
                packer.add(*item)
            ended = packer.contexts < stop - start
            _committed(under_way, writer, progress)
            under_way = None
            if packer.contexts:
                arrays, place = packer.take(min(packer.contexts, stop - start))
                under_way = committing.submit(writer.append, arrays, {"next": place._asdict()})
                number, contexts = number + 1, contexts + len(arrays["tokens"])
            if ended:
                break
        _committed(under_way, writer, progress)
    if target is None or contexts < target:
        writer.close()


def _committed(window: Future[Window] | None, writer: TokenWriter, progress: Progress) -> None:
    """Wait until a window is on the disk, then report it."""
    if window is not None:
        done = window.result()
        tokens = (done.stop - done.start) * writer.store.context_length
        progress.advance(tokens, documents=done.notes["next"]["documents"])


def _blocks(config: TokenizeConfig, split: str, source: TextSource, place: Place) -> Iterator[Block]:
    """Blocks of the source from `place` on: read, kept to one split, shuffled."""
    stream = source.open(place.source)
    state, index = place.source, place.block
    while True:
        texts: list[str] = []
        read = characters = 0
        while read < BLOCK_DOCUMENTS and characters < BLOCK_CHARACTERS and (text := next(stream, None)) is not None:
            read, characters = read + 1, characters + len(text)
            if is_validation(text, config.validation) == (split == "validation"):
                texts.append(text)
        if not read:
            return
        order = np.random.default_rng([config.seed, index]).permutation(len(texts))
        yield Block(state, index, [texts[i] for i in order])
        state, index = stream.state(), index + 1


def _encoded_documents(
    blocks: Iterator[Block], place: Place, encoder: "Encoder", begin: int
) -> Iterator[tuple[np.ndarray, Place]]:
    """Every document from `place` on: its tokens (begin token first), and the place of its first token."""
    skip, used, number = place.document, place.token, place.documents
    for block, encoded in encoder.blocks(blocks, skip):
        for offset, ids in enumerate(encoded):
            tokens = np.concatenate([np.array([begin], np.uint32), ids.astype(np.uint32, copy=False)])
            yield tokens[used:], Place(block.source, block.number, skip + offset, used, number)
            used, number = 0, number + 1
        skip = 0


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


class Encoder:
    """Encodes blocks in this process or in worker processes, in order, a block ahead of the packing."""

    def __init__(self, spec: str, tok: Tokenizer, workers: int, offline: bool) -> None:
        self._tokenizer, self._workers = tok, workers
        self._pool = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _boot, (spec, offline))

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def warm_up(self) -> None:
        """Start the workers now rather than at the first block."""
        if self._pool:
            list(self._pool.map(_encode, [[]] * self._workers))

    def blocks(self, blocks: Iterator[Block], skip: int) -> Iterator[tuple[Block, Iterator[np.ndarray]]]:
        """Each block with the tokens of its documents, the first `skip` documents of the first block left out."""
        waiting: deque[tuple[Block, list[Future[list[np.ndarray]]]]] = deque()
        for number, block in enumerate(blocks):
            texts = block.texts[skip if number == 0 else 0 :]
            if self._pool is None:
                yield block, (ids for piece in _pieces(texts) for ids in self._tokenizer.encode_batch(piece))
                continue
            waiting.append((block, [self._pool.submit(_encode, piece) for piece in _pieces(texts)]))
            if len(waiting) > 1:
                yield _results(*waiting.popleft())
        while waiting:
            yield _results(*waiting.popleft())


def _results(block: Block, futures: list[Future[list[np.ndarray]]]) -> tuple[Block, Iterator[np.ndarray]]:
    return block, (ids for future in futures for ids in future.result())


def _pieces(texts: list[str]) -> Iterator[list[str]]:
    """Consecutive runs of documents of about PIECE_CHARACTERS."""
    piece: list[str] = []
    characters = 0
    for text in texts:
        piece.append(text)
        characters += len(text)
        if characters >= PIECE_CHARACTERS:
            yield piece
            piece, characters = [], 0
    if piece:
        yield piece


_worker: Tokenizer | None = None


def _boot(spec: str, offline: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that asked us answers it
    _worker = tokenizer(spec, offline=offline)


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _worker is not None
    return _worker.encode_batch(texts)
