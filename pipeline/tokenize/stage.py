"""Text -> token stores: `train` and `validation`, no document in both.

Documents are read in blocks of the source's order; each block is filtered to its split, shuffled (seeded) and encoded.
Each context begins with the tokenizer's begin token (end-of-text for GPT-2), or each document does. Packing `concat`
lays documents end to end and cuts the stream where a context is full; what does not fill a last one is left out.
Packing `document` starts each document in a context of its own and pads its last one with the begin token; padding
never becomes a row or a target. Encoding is shared out among processes (`pipeline.tokenize.encoding`); packing
stays here.

Each window of contexts is committed with the place in the source where the next one starts, so that an interrupted
run continues there and ends with the same bytes.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from sae.cache import activations, catalogue
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.cache.store.manifest import Window, place_after
from sae.cache.store.space import expect_room
from sae.cache.tokens import TokenStore, TokenWriter
from sae.configs.base import MOST, Amount, Settings
from sae.pipeline.language_model.token_mask import TokenMask, TokenRows
from sae.pipeline.parallel.dask_cluster import connected
from sae.pipeline.parallel.process_pool import Pool
from sae.pipeline.runtime import cores
from sae.pipeline.runtime.interrupts import telling
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.tokenize.earlier import point_to_older, settled
from sae.pipeline.tokenize.encoding import ALONE_CHARACTERS, Block, Encoder
from sae.pipeline.tokenize.packing import DocumentPosition, Packer
from sae.pipeline.tokenize.sources import Document, Moving, TextSource, is_validation, text_source
from sae.pipeline.tokenizers.former import begun, identity
from sae.pipeline.tokenizers.layout import DEFAULT, Begin, Layout, layout
from sae.pipeline.tokenizers.tokenizer import Tokenizer, tokenizer

BLOCK_DOCUMENTS = 4096
BLOCK_CHARACTERS = 1 << 25
SPLITS = ("train", "validation")
ZSTD_LEAVES = 0.85  # of the bytes of tokens of text, measured; documents and lengths hardly add to them


class TooLittle(SaeError):
    """A split of the source does not fill one context."""


class TokenizeConfig(Settings):
    """Settings of tokenizing."""

    source: str = Field(
        "fineweb",
        description="fineweb, python (the text that ships with Python), org/name on the hub, or local parquet, arrow, "
        "jsonl, json, csv, tsv, txt files, folders (also those that datasets saves), globs",
    )
    column: str = Field(
        "text",
        description="the field that holds the text, where documents are records (a.b: b inside a); lists of integers "
        "are token ids",
    )
    tokenizer: str = Field(
        "gpt2",
        description="gpt2 or another tiktoken encoding, tiny (embedded), a Hugging Face folder, or hf:org/name",
    )
    context: int = Field(128, ge=2, le=MOST, description="tokens in a context")
    tokens: Amount = Field(10_000_000, description="training tokens wanted, rounded up to a whole window")
    validation_tokens: Amount = Field(131_072, description="validation tokens wanted; all for all there are")
    validation: float = Field(
        0.05, ge=0, lt=1, description="share of the documents, chosen by hash, that is kept for validation"
    )
    packing: Literal["concat", "document"] = Field(
        "concat", description="concat: documents end to end; document: none shares a context with another"
    )
    begin: Begin | None = Field(
        None,
        description="what begins with the begin token: context (each), document (each) or none; null: context, or "
        "document where the tokenizer has no token for it",
    )
    separator: Annotated[int, Field(ge=0)] | str | None = Field(
        DEFAULT,
        description="token between two documents of a context: begin, eos, a token's text or id, none; default: begin "
        "where contexts begin with it, else none",
    )
    min_tokens: int = Field(0, ge=0, description="documents of fewer tokens are left out")
    seed: int = Field(0, ge=0, description="seed of the document shuffle")

    def layout(self, tok: Tokenizer) -> Layout:
        """Return how documents lie in contexts with a tokenizer."""
        return layout(
            tok, self.context, self.packing, begin=self.begin, separator=self.separator, min_tokens=self.min_tokens
        )


@dataclass(frozen=True)
class TokenizeResult:
    """The stores a call made or continued, by split."""

    stores: dict[str, TokenStore]


def tokenize(
    config: TokenizeConfig, root: Path, progress: Progress, *, workers: int = 1, scheduler: str | None = None,
    offline: bool = False,
) -> TokenizeResult:  # fmt: skip
    """Make or continue the token stores `config` describes, under the cache folder `root`.

    Text is encoded by `workers` processes (1: by this one) or by the workers of a dask `scheduler`. Where the source is
    too small to have a validation split, a note says so.
    """
    if scheduler is None:
        cores.expect_few(workers, "workers =", progress.note)
    source = text_source(config.source, offline=offline, column=config.column)
    try:
        tok = tokenizer(config.tokenizer, offline=offline)
    except SaeError:
        source.recipe()  # where the text cannot be had either, that is said: without it no tokenizer is of use
        raise
    if isinstance(source, Moving):
        source = settled(source, lambda one: token_recipe(config, one, tok, SPLITS[0]), root, progress)
    stores = {}
    with ExitStack() as stack:
        local = Pool(workers) if scheduler is None and workers > 1 else None
        connect = partial(stack.enter_context, local or connected(1, scheduler, progress))
        alone = ALONE_CHARACTERS if scheduler is None else 0
        encoder = Encoder(config.tokenizer, tok, connect, offline=offline, alone=alone)
        for split in SPLITS if config.validation > 0 else SPLITS[:1]:
            wanted = config.tokens if split == "train" else config.validation_tokens
            try:
                stores[split] = tokenize_split(config, split, wanted, source, tok, encoder, root, progress)
            except TooLittle as error:
                if split == "train":
                    raise
                progress.note(f"no validation store: {error}")
    if config.validation == 0:
        progress.note("no validation store: `validation = 0` keeps no documents, so what is trained cannot be judged")
    return TokenizeResult(stores)


def token_recipe(config: TokenizeConfig, source: TextSource, tok: Tokenizer, split: str) -> Recipe:
    """Everything that decides the tokens of a store."""
    return {
        "source": source.recipe(),
        "tokenizer": identity(tok),
        "context_length": config.context,
        "packing": config.packing,
        **config.layout(tok).recipe(),
        "shuffle": {
            "order": "pcg64",
            "seed": config.seed,
            "documents": BLOCK_DOCUMENTS,
            "characters": BLOCK_CHARACTERS,
        },
        "validation": config.validation,
        "split": split,
    }


def found_at(config: TokenizeConfig, source: TextSource) -> dict[str, str]:
    """Return where text and tokenizer are, from any folder: `sae cache verify --repair` reads them there."""
    files = source.recipe()["source"] == "files"
    text = os.path.abspath(os.path.expanduser(config.source)) if files else config.source
    folder = Path(config.tokenizer).expanduser()
    return {"source": text, "tokenizer": str(folder.resolve()) if folder.is_dir() else config.tokenizer}


def tokenize_split(
    config: TokenizeConfig, split: str, wanted: Amount, source: TextSource, tok: Tokenizer,
    encoder: Encoder, root: Path, progress: Progress,
) -> TokenStore:  # fmt: skip
    """Make or continue the store of one split."""
    slug = "-".join([source.slug, tok.slug, str(config.context), *([split] if split != "train" else [])])
    recipe = begun(root, slug, token_recipe(config, source, tok, split), tok, progress)
    if (there := catalogue.of_recipe(root, TokenStore, recipe)) is not None:
        slug = there.slug  # made under another name of the same text
    with TokenWriter(root, slug, recipe) as writer:
        if writer.notice:
            progress.note(writer.notice)
        if not writer.store.n_contexts and config.begin is None and split == SPLITS[0]:
            point_to_older(root, slug, recipe, tok, progress)
        writer.write_vocabulary(tok.vocabulary())
        writer.hint(**found_at(config, source))
        while (reach := _reach(writer.store, wanted, progress)) is None or reach > writer.store.n_contexts:
            if writer.store.closed:
                break
            total = None if reach is None else reach * config.context
            if total is not None:
                size = ZSTD_LEAVES * np.dtype(writer.store.arrays["tokens"].dtype).itemsize
                expect_room(root, (total - writer.store.n_tokens) * size, f"what tokenize would add ({split})")
            progress.start(f"tokenize {split}", total, "tokens", done=writer.store.n_tokens)
            with telling(lambda: f"{writer.store.n_tokens:,} {split} tokens are committed"):
                try:
                    _fill(config, split, reach, source, tok, encoder, writer, progress)
                finally:
                    progress.finish()
        if not writer.store.n_contexts:
            raise TooLittle(_too_little(config, split))
        if wanted != "all" and writer.store.n_tokens < wanted:
            progress.note(
                f"{split}: {wanted:,} tokens wanted, {writer.store.n_tokens:,} are kept: "
                f"`source = {config.source}` has no more documents{_share(config, split)}"
            )
        return writer.store


def _reach(store: TokenStore, wanted: Amount, progress: Progress) -> int | None:
    """Contexts to reach: whole windows, of which a harvest, which keeps whole windows of rows, keeps as many as wanted.

    Not every token becomes a row, so how many contexts that takes is known once they are there.
    """
    if wanted == "all":
        return None
    rows = activations.WINDOWS.round_up(wanted)
    there = TokenRows(store, TokenMask()).count(activations.WINDOWS, store.n_contexts).rows
    contexts = -(-wanted // store.context_length)
    if there < rows and (there or not store.n_contexts):  # a context has one row less than tokens, or fewer
        contexts = max(contexts, store.n_contexts + -(-(rows - there) // (store.context_length - 1)))
    reach = store.windows.round_up(contexts)
    if not store.closed and store.n_contexts < reach:
        progress.note(
            f"{store.split}: {wanted:,} tokens wanted, {reach * store.context_length:,} are made if the "
            f"text has them: whole windows, of which a harvest keeps at least {rows:,} rows"
        )
    return reach


def _share(config: TokenizeConfig, split: str) -> str:
    """The share of the documents that fall to a split, to say why there are no more; nothing where it has them all."""
    share = config.validation if split == "validation" else 1 - config.validation
    return f" for it ({share:g} of all)" if share < 1 else ""


def _too_little(config: TokenizeConfig, split: str) -> str:
    if split == "validation":
        return (
            f"the documents of `source = {config.source}` that fell to it ({config.validation:g} of all) do not fill a "
            "context; a larger `validation` gives it more"
        )
    least = f" in documents of at least {config.min_tokens}" if config.min_tokens else ""
    remedy = "try a smaller `context`" + (" or `tokenize.min_tokens`" if least else "")
    return f"source = {config.source}: holds less than one context of {config.context} tokens{least}; {remedy}"


def _fill(
    config: TokenizeConfig, split: str, target: int | None, source: TextSource, tok: Tokenizer,
    encoder: Encoder, writer: TokenWriter, progress: Progress,
) -> None:  # fmt: skip
    """Pack and commit windows until the target or the source's end."""
    windows = writer.store.manifest.windows
    place = (
        DocumentPosition(**place_after(windows[-1], DocumentPosition._fields, writer.store.path))
        if windows
        else DocumentPosition(None, 0, 0, 0, 0)
    )
    writer.request(target if target is not None else 1 << 62)
    stream = Contexts(config, split, source, tok, encoder, place)
    number, contexts = len(windows), writer.store.n_contexts
    # A window is compressed and flushed while the next one is being encoded; at most one is under way.
    with ThreadPoolExecutor(1) as committing:
        under_way: Future[Window] | None = None
        while target is None or contexts < target:
            start, stop = writer.store.windows.bounds(number)
            taken = stream.take(stop - start)
            _committed(under_way, writer, progress)
            under_way = None
            if taken is None:
                break
            arrays, place = taken
            under_way = committing.submit(writer.append, arrays, {"next": place._asdict()})
            number, contexts = number + 1, contexts + len(arrays["tokens"])
        _committed(under_way, writer, progress)
    if target is None or contexts < target:
        writer.close()


class Contexts:
    """The contexts of one split from a place in its source on."""

    def __init__(
        self,
        config: TokenizeConfig,
        split: str,
        source: TextSource,
        tok: Tokenizer,
        encoder: Encoder,
        place: DocumentPosition,
    ) -> None:
        layout = config.layout(tok)
        self._documents = _encoded_documents(_blocks(config, split, source, place), place, encoder, layout)
        self._packer = Packer(layout)

    def take(self, contexts: int) -> tuple[dict[str, np.ndarray], DocumentPosition] | None:
        """Arrays of the next `contexts` contexts (fewer where the source ends) and the place after them, or None."""
        while self._packer.contexts < contexts and (item := next(self._documents, None)) is not None:
            self._packer.add(*item)
        return self._packer.take(min(self._packer.contexts, contexts)) if self._packer.contexts else None


def _committed(window: Future[Window] | None, writer: TokenWriter, progress: Progress) -> None:
    """Wait until a window is on the disk, then report it."""
    if window is not None:
        done = window.result()
        tokens = (done.stop - done.start) * writer.store.context_length
        progress.advance(tokens, documents=done.notes["next"]["documents"])


def _blocks(config: TokenizeConfig, split: str, source: TextSource, place: DocumentPosition) -> Iterator[Block]:
    """Blocks of the source from `place` on: read, kept to one split, shuffled."""
    stream = source.open(place.source)
    state, index = place.source, place.block
    while True:
        kept: list[Document] = []
        read = characters = 0
        while read < BLOCK_DOCUMENTS and characters < BLOCK_CHARACTERS and (one := next(stream, None)) is not None:
            read, characters = read + 1, characters + len(one)
            if is_validation(one, config.validation) == (split == "validation"):
                kept.append(one)
        if not read:
            return
        # NumPy promises the bits of PCG64 for ever, but not what Generator.permutation makes of them
        order = np.argsort(np.random.PCG64([config.seed, index]).random_raw(len(kept)), kind="stable")
        yield Block(state, index, [kept[i] for i in order])
        state, index = stream.state(), index + 1


def _encoded_documents(
    blocks: Iterator[Block], place: DocumentPosition, encoder: Encoder, layout: Layout
) -> Iterator[tuple[np.ndarray, DocumentPosition]]:
    """Every document that is kept, from `place` on: its tokens as they are laid, and the place of its first token."""
    used, number = place.token, place.documents
    for block, index, ids in encoder.documents(blocks, place.document):
        if layout.keeps(ids):
            yield layout.document(ids)[used:], DocumentPosition(block.source, block.number, index, used, number)
            used, number = 0, number + 1
