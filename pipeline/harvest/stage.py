"""Token store -> activation stores: one forward pass, one store for each (layer, site).

A window of rows is the unit of work (`pipeline.harvest.windows`). Where each starts is known from the tokens alone, so
windows are computed one after the other in this process, each written while the next is computed, or at once by the
workers of a cluster; this process holds the locks and commits them in order either way.

Which tokens become rows is decided by tokens and positions only (`RowRule`), never by values, so rows of all sites of
a model align.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from sae.cache.activations import WINDOWS, ActivationStore, ActivationWriter
from sae.cache.disk.durable import PARTIAL, write_atomic
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.disk.locks import reading
from sae.cache.disk.paths import listing
from sae.cache.errors import SaeError
from sae.cache.store import scratch
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.store.contents import is_temporary
from sae.cache.store.space import expect_room, folder_size, on_disk
from sae.cache.tokens import TokenStore
from sae.configs.base import Amount, Distinct, Settings
from sae.pipeline.harvest.keeping import Keeper, rows_kept
from sae.pipeline.harvest.windows import Arrays, Origin, Passes, Task, Work, expect_lease, harvest_window
from sae.pipeline.language_model import SITES, LanguageModel, Point
from sae.pipeline.language_model.token_mask import RowRule, RowsOf
from sae.pipeline.parallel.dask_cluster import Cluster, connected
from sae.pipeline.runtime.interrupts import interruptible, telling
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.tokenizers.matching import matches

VOCABULARY_PADDING = 1024  # models round their embedding up; more than this is another vocabulary
ESTIMATE_TOKENS = 1024  # the pass that is timed for --dry-run


class HarvestConfig(Settings):
    """Which activations to keep and how."""

    model: str = Field(
        "gpt2",
        description="gpt2, any hub model transformer_lens boots, a local Hugging Face folder, or tiny (embedded)",
    )
    revision: str | None = Field(None, description="revision of a hub model")
    layer: Annotated[tuple[int, ...], Distinct] = Field(
        (6,), min_length=1, description="layers, from 0: one, or several as 4,6,8 or 0-3"
    )
    site: Annotated[tuple[str, ...], Distinct] = Field(
        ("mlp_out",), min_length=1, description="sites: one, or several as resid_post,mlp_out; `sae list` explains each"
    )
    codec: str = Field("int8", description="int8, bfloat16, float16 or float32; with settings as int8:step=0.11")
    tokens: Amount = Field("all", description="training tokens to run")
    validation_tokens: Amount = Field(65_536, description="validation tokens to run, or all")
    rows: RowRule = RowRule()
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass, at most")
    dtype: str = Field("float32", description="precision of the forward pass: float32 or bfloat16")
    tokenizer: Literal["checked", "unchecked"] = Field(
        "checked", description="checked: tokens of another tokenizer than the model's are refused; unchecked: taken"
    )


@dataclass(frozen=True)
class Plan:
    """What a harvest of one split will do, said before it starts.

    Seconds, of this process alone, are measured for a dry run only; None when nothing is left to do.
    """

    split: str
    points: list[Point]
    rows: int  # rows each store will have
    rows_to_do: int  # rows of all stores still to be written
    forward_tokens: int
    stored_bytes: int  # of all stores when done, estimated
    seconds: float | None
    left_out: int = 0  # rows of the tokens asked for that are not kept, since they do not fill a window
    why: str = ""  # they are not, and what to do about it
    new_bytes: int = 0  # of stored_bytes, those still to be written


@dataclass(frozen=True)
class HarvestResult:
    """The stores by split (empty for a dry run) and the plan that made them."""

    plans: list[Plan]
    stores: dict[str, list[ActivationStore]]


def harvest(
    config: HarvestConfig, token_stores: list[TokenStore], root: Path, progress: Progress, *,
    model: LanguageModel | None = None, device: str = "auto", offline: bool = False, dry_run: bool = False,
    wait: bool = False, workers: int = 1, scheduler: str | None = None,
) -> HarvestResult:  # fmt: skip
    """Make or continue one activation store for each point and token store (train, then validation).

    `model` is the language model `config` names, where the caller has booted it already. The work is this process's, or
    that of `workers` processes on this machine, or of the workers of a dask `scheduler`.
    """
    codec(config.codec)  # and the sites: what is wrong without looking at the model is said before it is loaded
    if unknown := [site for site in config.site if site not in SITES]:
        raise SaeError(f"--site {unknown[0]}: the sites are {', '.join(SITES)}")
    if model is None:
        with said_if_slow(progress, f"loading {config.model}"):
            model = LanguageModel.boot(
                config.model, device=device, dtype=config.dtype, revision=config.revision, offline=offline
            )
    points = [Point(layer, site) for layer in config.layer for site in config.site]
    for point in points:
        model.check(point)
    jobs, plans = [], []
    with ExitStack() as stack:
        for tokens in token_stores:  # all planned before the first is run: what cannot be done is said at once
            stack.enter_context(reading(tokens.path))
            check_tokens(config, model, tokens, progress, offline=offline)
            wanted = config.tokens if tokens.split == "train" else config.validation_tokens
            jobs.append(_Job(config, model, tokens, points, root, progress, wait, device, offline))
            plans.append(jobs[-1].plan(wanted, timed=dry_run))
            progress.note(describe(plans[-1]))
            if plans[-1].left_out:
                progress.note(f"{tokens.split}: {plans[-1].why}")
        if dry_run:
            return HarvestResult(plans, {})
        expect_room(root, sum(plan.new_bytes for plan in plans), "what harvest would add")
        work_left = any(plan.rows_to_do for plan in plans)
        cluster = stack.enter_context(connected(workers, scheduler, progress)) if work_left else None
        stores = {job.tokens.split: job.run(plan, cluster) for job, plan in zip(jobs, plans, strict=True)}
    for plan in plans:
        if plan.left_out:
            progress.note(f"{plan.split}: kept {plan.rows:,} rows, left out {plan.left_out:,} as said above")
    return HarvestResult(plans, stores)


def check_tokens(
    config: HarvestConfig, model: LanguageModel, tokens: TokenStore, progress: Progress, *, offline: bool = False
) -> None:
    """Raise SaeError unless the token store is one for the model: made with its tokenizer, as far as can be known."""
    if tokens.context_length > model.context_length:
        raise SaeError(
            f"--context {tokens.context_length}: {model.name} reads at most {model.context_length} tokens; "
            "tokenize again with a smaller --context"
        )
    if config.tokenizer == "checked":
        if matches(tokens, config.model, revision=model.revision, offline=offline):
            return
        progress.note(f"{tokens.key}: nothing says what tokenizer {model.name} has, so only their sizes were compared")
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
        "rows": config.rows.recipe(),
        "codec": codec_recipe(codec(config.codec)),
    }


def found_at(model: str) -> str:
    """A model's name, or the absolute path where it is a folder: what `sae eval` boots later, from any folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def describe(plan: Plan) -> str:
    """A plan in one line."""
    sites = ", ".join(f"{layer}.{site}" for layer, site in plan.points)
    what = f"{plan.split}: {plan.rows:,} rows of {sites}, about {plan.stored_bytes / 1e6:,.1f} MB"
    if not plan.rows_to_do:
        return f"{what}; all there already"
    if plan.seconds is None:
        return f"{what}; {plan.rows_to_do:,} rows to write"
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
    device: str
    offline: bool

    def __post_init__(self) -> None:
        self.rows = RowsOf(self.tokens, self.config.rows)
        self.batch = max(1, self.config.batch_tokens // self.tokens.context_length)

    def writer(self, point: Point) -> ActivationWriter:
        recipe = activation_recipe(self.config, self.model, point, self.tokens)
        name = codec(self.config.codec).name
        slug = f"{self.model.slug}-{point.layer}.{point.site}-{self.tokens.slug}-{name}"
        return ActivationWriter(self.root, slug, recipe, wait=self.wait)

    def plan(self, wanted: Amount, *, timed: bool) -> Plan:
        """Count the rows and estimate the bytes; and, if `timed`, the seconds (from a small batch)."""
        first = self.tokens.n_contexts
        if wanted != "all":
            first = min(first, -(-wanted // self.tokens.context_length))
        self.counted = self.rows.count(WINDOWS, first)
        rows = available = self.counted.rows
        if not available:
            raise SaeError(f"{self.tokens.key}: no token of it becomes a row; see --set harvest.rows")
        asked = self.counted.within if first < self.tokens.n_contexts else available
        if asked < available:
            rows = min(available, WINDOWS.round_up(max(1, asked)))
        lacking = ""
        if not self._ends and WINDOWS.round_up(rows) != rows:
            lacking = self._lacking(asked, WINDOWS.count(rows))
            rows = WINDOWS.start(WINDOWS.count(rows) - 1)
            if not rows:
                raise SaeError(f"{self.tokens.key}: {lacking}")
        there = [self._rows_there(point, rows) for point in self.points]
        to_do = sum(max(rows - n, 0) for n in there)
        forward = int(max(rows - min(there), 0) * self.tokens.n_tokens / available)
        seconds = forward / self._tokens_per_second() if timed and to_do else None
        folder = folder_size(self.root)
        recipes = [activation_recipe(self.config, self.model, point, self.tokens) for point in self.points]
        stored = [  # of each store when done, and as it is
            [on_disk(ActivationStore.specs(recipe), recipe, size, folder) for size in (max(rows, n), n)]
            for recipe, n in zip(recipes, there, strict=True)
        ]
        total, new = sum(done for done, _ in stored), sum(done - before for done, before in stored)
        packed = [{**recipe, "codec": {**recipe["codec"], "zstd": 1}} for recipe in recipes]
        smaller = sum(on_disk(ActivationStore.specs(recipe), recipe, rows, folder) for recipe in packed)
        if to_do and total > 2 * smaller:
            self.progress.note(
                f"{self.tokens.split}: chunks are padded to their whole size, and so small a store is padding for the "
                f"most part; with --codec {codec(self.config.codec).name}:zstd=1 about {smaller / 1e6:,.1f} MB"
            )
        left_out = max(0, asked - rows)
        why = lacking if left_out else ""
        return Plan(self.tokens.split, self.points, rows, to_do, forward, total, seconds, left_out, why, new)

    @property
    def _ends(self) -> bool:
        """Whether the rows there are now are all there will ever be of this store."""
        return self.tokens.closed or self.config.rows.last_window == "short"

    def _lacking(self, rows: int, windows: int) -> str:
        """Why the last of some rows are not kept, and what would keep them."""
        wanted = WINDOWS.start(windows)
        if self.config.rows != RowRule():  # which is what tokenize reckons with
            wanted = -(-wanted * self.tokens.n_tokens // self.counted.rows)
        option = "--tokens " if self.tokens.split == "train" else "--set tokenize.validation_tokens="
        left = rows - WINDOWS.start(windows - 1)
        return (
            f"{left:,} rows do not fill their window, which ends at row {WINDOWS.start(windows):,}; `sae tokenize` "
            f"again with {option}{wanted} to fill it, or --set harvest.rows.last_window=short to keep them as they are"
        )

    def run(self, plan: Plan, cluster: Cluster | None) -> list[ActivationStore]:
        """Write the windows the plan still lacks."""
        with ExitStack() as stack:
            writers = {point: stack.enter_context(self.writer(point)) for point in self.points}
            for writer in writers.values():
                if writer.notice:
                    self.progress.note(writer.notice)
                writer.request(max(plan.rows, writer.store.requested))
                writer.hint(model=found_at(self.config.model))
            tasks = self._tasks(plan, writers)
            stack.enter_context(telling(lambda: self._safe(plan, writers)))
            self._start(plan, self._committed(writers))
            try:
                if cluster is None:
                    self._alone(plan, tasks, writers)
                else:
                    self._together(cluster, tasks, writers)
            finally:
                self.progress.finish()
            for writer in writers.values():  # here, so that a store whose last window came earlier is closed, too
                if self._ends and writer.store.n_rows == self.counted.rows and not writer.store.closed:
                    writer.close()
            return [writer.store for writer in writers.values()]

    def _tasks(self, plan: Plan, writers: dict[Point, ActivationWriter]) -> list[Task]:
        """The windows that some store lacks, in order."""
        there = {point: len(writer.store.manifest.windows) for point, writer in writers.items()}
        tasks = []
        for window in range(min(there.values()), WINDOWS.count(plan.rows)):
            start, stop = WINDOWS.bounds(window)
            place, end = self.counted.starts[window : window + 2]
            behind = tuple(point for point in writers if there[point] <= window)
            tasks.append(Task(window, min(stop, plan.rows) - start, place, end, behind))
        return tasks

    def _start(self, plan: Plan, done: int) -> None:
        self.progress.start(f"harvest {plan.split}", plan.rows, "rows", done=done)

    def _committed(self, writers: dict[Point, ActivationWriter]) -> int:
        return min(writer.store.n_rows for writer in writers.values())

    def _safe(self, plan: Plan, writers: dict[Point, ActivationWriter]) -> str:
        """What an interruption leaves."""
        there = min(len(writer.store.manifest.windows) for writer in writers.values())
        kept = rows_kept([writer.path for writer in writers.values()], there)
        also = f", and {kept:,} of an unfinished window are kept to go on from" if kept else ""
        return f"{self._committed(writers):,} of {plan.rows:,} {plan.split} rows are committed{also}"

    def _alone(self, plan: Plan, tasks: Sequence[Task], writers: dict[Point, ActivationWriter]) -> None:
        """Compute in this process. A window is compressed and flushed while the next one is computed."""
        passes = Passes(self.model, self.rows, self.batch)

        def append(task: Task, arrays: dict[Point, Arrays]) -> None:
            for point in task.points:
                writers[point].append(arrays.pop(point), passes.notes(task))

        def took(rows: int) -> None:
            self.progress.finish()  # begun anew, so that its rate is that of what is computed now
            self.progress.note(f"{rows:,} rows of an unfinished window were kept and are taken up")
            self._start(plan, self._committed(writers) + rows)

        with interruptible() as stopping, ThreadPoolExecutor(1) as committing:
            keeper = Keeper(self.progress.note, took, stopping)
            under_way: Future[None] | None = None
            try:
                for task in tasks:
                    if under_way is not None and task.window == 1:  # window 0 has the columns later ones are coded by
                        under_way.result()
                    advance = partial(self.progress.advance, window=task.window)
                    stores = {point: writers[point].store for point in task.points}
                    arrays = passes.compute(task, stores, advance, keeper)
                    if under_way is not None:
                        under_way.result()
                    under_way = committing.submit(append, task, arrays)
            finally:
                if under_way is not None:
                    under_way.result()

    def _together(self, cluster: Cluster, tasks: Sequence[Task], writers: dict[Point, ActivationWriter]) -> None:
        """Give the windows to workers, which write their files, and commit them here, in order.

        Window 0 comes before all others, which are coded by its columns.
        """
        with self._lease(writers) as lease:
            cluster.everywhere(expect_lease, lease)
            call = partial(harvest_window, self._work(cluster, lease))
            for part in ([t for t in tasks if t.window == 0], [t for t in tasks if t.window > 0]):
                for task, windows in cluster.ordered(call, part, lambda size: size + 1, lambda t: f"window {t.window}"):
                    for point, window in windows.items():
                        writers[point].commit(window)
                    self.progress.advance(task.rows, window=task.window)

    def _work(self, cluster: Cluster, lease: Path) -> Work:
        recipe, config = self.model.recipe(), self.config
        origin = Origin(
            found_at(config.model), recipe["revision"], config.dtype, self.device, self.offline, canonical(recipe)
        )
        return Work(
            origin, tokens=self.tokens.path, rule=config.rows, batch=self.batch, lease=lease,
            stores=tuple((point, self.writer(point).path) for point in self.points),
            threads=max(1, torch.get_num_threads() // cluster.size) if cluster.is_local else None,
        )  # fmt: skip

    @contextmanager
    def _lease(self, writers: dict[Point, ActivationWriter]) -> Iterator[Path]:
        """The file that lets workers write; then, what workers that died left half written is removed
        (what they kept of unfinished windows is not)."""
        folders = [writer.path for writer in writers.values()]
        lease = folders[0] / f"lease-{secrets.token_hex(8)}{PARTIAL}"
        write_atomic(lease, b"while this file is here, workers may write")
        try:
            yield lease
        finally:
            lease.unlink(missing_ok=True)
        for folder in folders:
            for name in listing(folder):
                if is_temporary(name) and not scratch.is_wanted(name, 0):
                    (folder / name).unlink(missing_ok=True)

    def _rows_there(self, point: Point, wanted: int) -> int:
        """Rows of a point's store. Raises SaeError where it has ended with fewer than are wanted."""
        path = self.writer(point).path
        if not (path / "recipe.json").exists():
            return 0
        store = ActivationStore(path)
        if store.closed and store.n_rows < wanted:
            raise SaeError(
                f"{store.key}: has ended, with a short window at row {store.n_rows:,}, and cannot grow to {wanted:,}; "
                "harvest without harvest.rows.last_window=short, or remove it first (`sae cache rm`)"
            )
        return store.n_rows

    def _tokens_per_second(self) -> float:
        """Speed of the forward pass, from the second of two small batches."""
        contexts = max(1, min(self.batch, self.tokens.n_contexts, ESTIMATE_TOKENS // self.tokens.context_length))
        tokens = torch.from_numpy(self.tokens.contexts(0, contexts))
        self.model.activations(tokens, self.points)
        begun = time.perf_counter()
        for activations in self.model.activations(tokens, self.points).values():
            activations.flatten()[0].item()  # waits for the device
        return tokens.numel() / (time.perf_counter() - begun)
