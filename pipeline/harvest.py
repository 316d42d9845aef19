"""Token store -> activation stores: one forward pass, one store for each (layer, site).

A window of rows is the unit of work. Its contexts are batched from the window's own start, so its bytes depend on the
recipe, the window and the batch shape alone: an interrupted, a grown and an uninterrupted harvest write the same. The
context that straddles two windows is computed for both, and a batch at the end of the tokens is filled up.

Which tokens become rows is decided by tokens and positions only (`RowRule`), never by values, so rows of all sites of
a model align.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cache.activations import WINDOWS, ActivationStore, ActivationWriter, WindowBuffer
from cache.codecs import codec, codec_recipe
from cache.errors import SaeError
from cache.identity import Recipe
from cache.tokens import TokenStore
from pipeline.language_model import SITES, LanguageModel, Point
from pipeline.progress import Progress
from pipeline.rows import RowRule

VOCABULARY_PADDING = 1024  # models round their embedding up; more than this is another vocabulary
SCAN_CONTEXTS = 8192
ESTIMATE_TOKENS = 1024  # the pass that is timed to say how long a harvest will take

Amount = Annotated[int, Field(ge=1)] | Literal["all"]


class HarvestConfig(BaseModel):
    """Which activations to keep and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "gpt2", description="a model transformer_lens boots, a local Hugging Face folder, or tiny (embedded)"
    )
    revision: str | None = Field(None, description="revision of a hub model")
    layer: tuple[int, ...] = Field((6,), min_length=1, description="layers, from 0: one or several, 4,6,8")
    site: tuple[str, ...] = Field(
        ("mlp_out",), min_length=1, description=f"sites: one or several of {', '.join(SITES)}"
    )
    codec: str = Field("int8", description="int8, bfloat16, float16 or float32; settings as int8:step=0.11,zstd=3")
    tokens: Amount = Field("all", description="training tokens to run, or all the token store has")
    validation_tokens: Amount = Field(65_536, description="validation tokens to run, or all")
    rows: RowRule = RowRule()
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass")
    dtype: str = Field("float32", description="precision of the forward pass: float32 or bfloat16")


class Place(NamedTuple):
    """Where the next row comes from: a context, and how many of its rows are already written."""

    context: int
    row: int


@dataclass(frozen=True)
class Plan:
    """What a harvest of one split will do, said before it starts. Seconds are None when nothing is left to do."""

    split: str
    points: list[Point]
    rows: int  # rows each store will have
    rows_to_do: int  # rows of all stores still to be written
    forward_tokens: int
    stored_bytes: int  # of all stores when done, estimated
    seconds: float | None


@dataclass(frozen=True)
class HarvestResult:
    """The stores by split (empty for a dry run) and the plan that made them."""

    plans: list[Plan]
    stores: dict[str, list[ActivationStore]]


def harvest(
    config: HarvestConfig, token_stores: list[TokenStore], root: Path, progress: Progress, *,
    model: LanguageModel | None = None, device: str = "auto", offline: bool = False, dry_run: bool = False,
    wait: bool = False,
) -> HarvestResult:  # fmt: skip
    """Make or continue one activation store for each point and token store (train, then validation).

    `model` is the language model `config` names, where the caller has booted it already.
    """
    codec(config.codec)  # and the sites: what is wrong without looking at the model is said before it is loaded
    if unknown := [site for site in config.site if site not in SITES]:
        raise SaeError(f"--site {unknown[0]}: the sites are {', '.join(SITES)}")
    if model is None:
        model = LanguageModel.boot(
            config.model, device=device, dtype=config.dtype, revision=config.revision, offline=offline
        )
    points = [Point(layer, site) for layer in dict.fromkeys(config.layer) for site in dict.fromkeys(config.site)]
    for point in points:
        model.check(point)
    jobs, plans = [], []
    for tokens in token_stores:  # all planned before the first is run: what cannot be done is said at once
        check_tokens(model, tokens)
        wanted = config.tokens if tokens.split == "train" else config.validation_tokens
        jobs.append(_Job(config, model, tokens, points, root, progress, wait))
        plans.append(jobs[-1].plan(wanted))
        progress.note(describe(plans[-1]))
    if dry_run:
        return HarvestResult(plans, {})
    return HarvestResult(plans, {job.tokens.split: job.run(plan) for job, plan in zip(jobs, plans, strict=True)})


def check_tokens(model: LanguageModel, tokens: TokenStore) -> None:
    """Raise SaeError unless the model can read the token store."""
    if tokens.context_length > model.context_length:
        raise SaeError(
            f"--context {tokens.context_length}: {model.name} reads at most {model.context_length} tokens; "
            "tokenize again with a smaller --context"
        )
    if not tokens.n_vocab <= model.n_vocab <= tokens.n_vocab + VOCABULARY_PADDING:
        raise SaeError(
            f"--tokens-from {tokens.key}: its tokenizer has {tokens.n_vocab:,} tokens, {model.name} {model.n_vocab:,}; "
            "tokenize with the model's own tokenizer (--tokenizer)"
        )


def activation_recipe(config: HarvestConfig, model: LanguageModel, point: Point, tokens: TokenStore) -> Recipe:
    """Everything that decides the rows of a store."""
    return {
        "tokens": tokens.recipe,
        "model": model.recipe(),
        "layer": point.layer,
        "site": point.site,
        "hook": model.hook(point),
        "d": model.width(point),
        "rows": config.rows.model_dump(),
        "codec": codec_recipe(codec(config.codec)),
    }


def found_at(model: str) -> str:
    """A model's name, or the absolute path where it is a folder: what `sae eval` boots later, from any folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def describe(plan: Plan) -> str:
    """A plan in one line."""
    sites = ", ".join(f"{layer}.{site}" for layer, site in plan.points)
    what = f"{plan.split}: {plan.rows:,} rows of {sites}, about {plan.stored_bytes / 1e6:,.1f} MB"
    if plan.seconds is None:
        return f"{what}; all there already"
    spent = f"{plan.seconds / 60:,.1f} minutes" if plan.seconds >= 90 else f"{plan.seconds:,.0f} seconds"
    return f"{what}; {plan.rows_to_do:,} rows to write, about {spent}"


@dataclass
class _Job:
    """One split's harvest: a token store, a model, and one writer for each point."""

    config: HarvestConfig
    model: LanguageModel
    tokens: TokenStore
    points: list[Point]
    root: Path
    progress: Progress
    wait: bool

    def __post_init__(self) -> None:
        self.begin = int(self.tokens.recipe["tokenizer"]["begin"])
        self.batch = max(1, self.config.batch_tokens // self.tokens.context_length)

    def writer(self, point: Point) -> ActivationWriter:
        recipe = activation_recipe(self.config, self.model, point, self.tokens)
        name = codec(self.config.codec).name
        slug = f"{self.model.slug}-{point.layer}.{point.site}-{self.tokens.slug}-{name}"
        return ActivationWriter(self.root, slug, recipe, wait=self.wait)

    def plan(self, wanted: Amount) -> Plan:
        """Count the rows, estimate bytes and time (from one batch of the real model)."""
        available = self._count_rows(self.tokens.n_contexts)
        if not available:
            raise SaeError(f"{self.tokens.key}: no token of it becomes a row; see rows.skip_first and rows.skip_begin")
        rows = available
        if wanted != "all" and wanted < self.tokens.n_tokens:
            counted = self._count_rows(-(-wanted // self.tokens.context_length))
            rows = min(available, WINDOWS.round_up(max(1, counted)))
        if not self.tokens.closed and WINDOWS.start(WINDOWS.count(rows)) != rows:
            rows = WINDOWS.start(WINDOWS.count(rows) - 1)
            if not rows:
                raise SaeError(
                    f"{self.tokens.key}: {available:,} rows are less than the first window of {WINDOWS.first:,}; "
                    "run `sae tokenize` for more tokens"
                )
        there = [self._rows_there(point) for point in self.points]
        widths = [self.model.width(point) for point in self.points]
        to_do = sum(max(rows - n, 0) for n in there)
        forward = int(max(rows - min(there), 0) * self.tokens.n_tokens / available)
        seconds = forward / self._tokens_per_second() if to_do else None
        stored = sum(max(rows, n) * _bytes_per_row(self.config.codec, d) for n, d in zip(there, widths, strict=True))
        return Plan(self.tokens.split, self.points, rows, to_do, forward, int(stored), seconds)

    def run(self, plan: Plan) -> list[ActivationStore]:
        """Write the windows the plan still lacks."""
        with ExitStack() as stack:
            writers = {point: stack.enter_context(self.writer(point)) for point in self.points}
            for writer in writers.values():
                if writer.notice:
                    self.progress.note(writer.notice)
                writer.request(max(plan.rows, writer.store.requested))
                writer.hint(model=found_at(self.config.model))
            self.progress.start(
                f"harvest {plan.split}", plan.rows, "rows", done=min(w.store.n_rows for w in writers.values())
            )
            try:
                for window in range(WINDOWS.count(plan.rows)):
                    behind = {p: w for p, w in writers.items() if len(w.store.manifest.windows) == window}
                    if behind:
                        self._window(window, behind, plan)
            finally:
                self.progress.finish()
            for writer in writers.values():  # here, so that a store whose last window came earlier is closed, too
                if self.tokens.closed and writer.store.n_rows == self._all_rows and not writer.store.closed:
                    writer.close()
            return [writer.store for writer in writers.values()]

    def _window(self, window: int, writers: dict[Point, ActivationWriter], plan: Plan) -> None:
        """Run the model over one window's contexts and commit its rows to every store that lacks them."""
        start, stop = WINDOWS.bounds(window)
        stop = min(stop, plan.rows)
        before = next(iter(writers.values())).store.manifest.windows
        place = Place(**before[-1].notes["next"]) if before else Place(0, 0)
        buffers: dict[Point, WindowBuffer] = {point: writer.window(stop - start) for point, writer in writers.items()}
        filled = 0
        for context, tokens, mask in self._batches(place.context):
            keep = np.flatnonzero(mask)
            keep = keep[place.row if context == place.context else 0 :][: stop - start - filled]
            found = self.model.activations(self._full_batch(tokens), list(writers))
            index = torch.from_numpy(keep).to(self.model.device)
            positions = context * self.tokens.context_length + keep
            for point, buffer in buffers.items():
                buffer.add(found[point].flatten(0, 1).index_select(0, index), positions)
            filled += len(keep)
            self.progress.advance(len(keep), window=window)
            if filled == stop - start:
                break
        assert filled == stop - start, (filled, start, stop)
        notes = {"next": self._after(context, mask, int(keep[-1]))._asdict(), "made": self._made()}
        for point, writer in writers.items():
            writer.append(buffers[point].arrays(), notes)

    def _after(self, context: int, mask: np.ndarray, last: int) -> Place:
        """The place after row `last` (a flat index into the batch that starts at `context`)."""
        inside, position = divmod(last, self.tokens.context_length)
        used = int(mask[inside, : position + 1].sum())
        if used == int(mask[inside].sum()):
            return Place(context + inside + 1, 0)
        return Place(context + inside, used)

    def _batches(self, context: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(first context, tokens [b, T], row mask [b, T]) from a context on."""
        while context < self.tokens.n_contexts:
            stop = min(context + self.batch, self.tokens.n_contexts)
            tokens = self.tokens.contexts(context, stop)
            yield context, tokens, self.config.rows.mask(tokens, self.tokens.lengths(context, stop), self.begin)
            context = stop

    def _full_batch(self, tokens: np.ndarray) -> Tensor:
        """Tokens [b, T] as [batch, T], the last context repeated.

        Rounding depends on the batch's shape, so a row must not know where a token store that grows ended at the time.
        """
        return torch.from_numpy(np.pad(tokens, ((0, self.batch - len(tokens)), (0, 0)), mode="edge"))

    def _count_rows(self, contexts: int) -> int:
        """Rows in the first `contexts` contexts."""
        count = 0
        for start in range(0, contexts, SCAN_CONTEXTS):
            stop = min(start + SCAN_CONTEXTS, contexts)
            mask = self.config.rows.mask(
                self.tokens.contexts(start, stop), self.tokens.lengths(start, stop), self.begin
            )
            count += int(mask.sum())
        if contexts == self.tokens.n_contexts:
            self._all_rows = count
        return count

    def _rows_there(self, point: Point) -> int:
        path = self.writer(point).path
        return ActivationStore(path).n_rows if (path / "recipe.json").exists() else 0

    def _tokens_per_second(self) -> float:
        """Speed of the forward pass, from the second of two small batches."""
        contexts = max(1, min(self.batch, self.tokens.n_contexts, ESTIMATE_TOKENS // self.tokens.context_length))
        tokens = torch.from_numpy(self.tokens.contexts(0, contexts))
        self.model.activations(tokens, self.points)
        begun = time.perf_counter()
        for activations in self.model.activations(tokens, self.points).values():
            activations.flatten()[0].item()  # waits for the device
        return tokens.numel() / (time.perf_counter() - begun)

    def _made(self) -> dict[str, object]:
        """What byte identity is promised for: the same device kind, precision and batch shape."""
        return {"device": self.model.device.type, "dtype": self.config.dtype, "contexts": self.batch}


def _bytes_per_row(text: str, d: int) -> float:
    """Stored size of a row, estimated: measured for int8 with zstd, exact for the others."""
    value = codec(text)
    if value.name == "int8":
        return d * (0.72 if value.zstd else 1.0) + 6
    return d * {"bfloat16": 2, "float16": 2, "float32": 4}[value.name] * (0.9 if value.zstd else 1.0) + 4
