"""Activation store -> run folders: any number of dictionaries over one stream of batches.

Every dictionary sees identical batches, so the first of many equals a solo run. Everything that must survive a restart
is in the checkpoint: weights, optimiser, dead counters, loader position; a resumed run equals one that was never
stopped, bit for bit on CPU.
"""

import re
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import digest, readable
from sae.cache.disk.locks import reading
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.loader import Loader
from sae.cache.outliers import expect_kept, largest_norm
from sae.cache.runs import CONFIG, FAILURE, Run
from sae.cache.store.space import expect_room
from sae.pipeline.formats.base import Metadata
from sae.pipeline.parallel.ranks import Alone, Ranks
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.interrupts import Interrupted, interruptible
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Clock
from sae.pipeline.train.config import STREAM, TrainConfig, settings_of
from sae.pipeline.train.coupled import Group, grouped
from sae.pipeline.train.trainer import Diverged, Member

SHOWN = ("loss", "fvu", "l0", "dead", "agreement", "recovery")  # beside the progress bar

__all__ = ["STREAM", "TrainConfig", "begun", "on_rows", "open_run", "run_name", "share", "train"]


def run_name(config: TrainConfig, store: ActivationStore) -> str:
    """The name of a configuration's run folder on a store, where none is given: what usually varies, and a hash of all.

    The number of rows is part of it: on a store that has grown the same settings are another run.
    """
    config = on_rows(config, store)
    point = f"{store.recipe['layer']}.{store.recipe['site']}" if "layer" in store.recipe else readable(store.slug)
    sparsity = [
        f"{letter}{_short(getattr(config.sae, name))}"
        for letter, name in (("k", "k"), ("c", "coefficient"), ("jl", "jl_coefficient"))
        if hasattr(config.sae, name)
    ]
    identity = {"train": config.model_dump(mode="json"), "activations": store.recipe}
    parts = [config.sae.arch, str(config.sae.d_sae), *sparsity, f"lr{_short(config.lr)}", f"s{config.seed}", point]
    return "-".join([*parts, digest(identity)])


def _short(value: float) -> str:
    """A number as one types it: 0.001, 3e-5."""
    return re.sub(r"e([+-])0?", lambda sign: "e-" if sign[1] == "-" else "e", f"{value:g}")


def on_rows(config: TrainConfig, store: ActivationStore) -> TrainConfig:
    """The configuration with the number of rows that it means on a store as it is now: all, where it says none.

    Raises SaeError where it wants more than there are.
    """
    rows = config.store_rows or store.n_rows
    if rows > store.n_rows:
        raise SaeError(f"train.store_rows = {rows}: {store.key} has {store.n_rows:,} rows; lower it, or harvest more")
    return config.model_copy(update={"store_rows": rows})


def begun(config: TrainConfig, store: ActivationStore, runs: Sequence[Run]) -> list[Run]:
    """The runs that have a configuration and a store; where it says no number of rows, with any."""
    return [run for run in runs if run.seen.recipe == store.recipe and not _differing(run, config)]


def _differing(run: Run, config: TrainConfig) -> list[str]:
    """The settings in which a run differs from a configuration."""
    saved, given = settings_of(run).model_dump(mode="json"), config.model_dump(mode="json")
    saved["store_rows"] = run.seen.rows  # in version 0.1.0 it was said there alone
    given["store_rows"] = given["store_rows"] or run.seen.rows
    return sorted(name for name in saved if saved[name] != given[name])


def open_run(config: TrainConfig, store: ActivationStore, root: Path, name: str | None, *, resume: bool) -> Run:
    """The run folder for a configuration: new, or with `resume` the one that has the same configuration.

    Raises SaeError where a new one exists, where there is none to resume, or where its configuration differs.
    """
    if resume:
        return _continued(config, store, root, name)
    config = on_rows(config, store)
    rows = config.store_rows
    assert rows is not None
    if config.batch > rows:
        raise SaeError(f"--batch {config.batch}: {store.key} has {rows:,} rows; lower it, or harvest more")
    activations: dict[str, Any] = {"key": store.key, "rows": rows, "recipe": store.recipe}
    if config.outliers is not None:
        activations["largest_norm"] = largest_norm(store, config.outliers)
        expect_kept(store, config.batch, activations["largest_norm"], "--batch")
    content = {"train": config.model_dump(mode="json"), "activations": activations}
    return Run.create(root / (name or run_name(config, store)), content)


def _continued(config: TrainConfig, store: ActivationStore, root: Path, name: str | None) -> Run:
    if name is None:
        found = begun(config, store, catalogue.readable_runs(root)[0])
        waiting = [run for run in found if not run.finished] or found
        if not waiting:
            raise NotFound(
                f"--resume: no run {run_name(config, store)} in {root}; `sae list` shows the runs, without --resume it "
                "is started"
            )
        if len(waiting) > 1:
            raise SaeError(f"--resume: which one? Give --name: {', '.join(run.name for run in waiting)}")
        return waiting[0]
    if not (root / name / CONFIG).exists():
        raise NotFound(f"--resume: no run {name} in {root}; `sae list` shows the runs, without --resume it is started")
    run = Run(root / name)
    saved, given = run.seen.recipe, store.recipe
    differs = sorted(key for key in {*saved, *given} if saved.get(key) != given.get(key)) or _differing(run, config)
    if differs:
        raise SaeError(f"--resume: {run.path} was started with other settings ({', '.join(differs)}); repeat those")
    return run


@dataclass
class TrainState:
    """Everything that must survive a restart."""

    groups: list[Group]
    loader: Loader
    total: int
    step: int = 0
    started: float = field(default_factory=time.monotonic)
    diverged: list[Diverged] = field(default_factory=list)

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]

    def save(self, ranks: Ranks) -> None:
        """Write the checkpoints, but for those that are ahead: they have a later one."""
        for group in [*self.groups]:
            if group.done == self.step:
                try:
                    group.save(self.loader.state_dict(), ranks)
                except Diverged as error:
                    self.end(group, error, ranks)

    def end(self, group: Group, error: Diverged, ranks: Ranks) -> None:
        """Go on without a group that diverged; its run folders say why they are not finished."""
        self.groups.remove(group)
        self.diverged.append(error)
        if ranks.rank == 0:
            for member in group.members:
                member.run.write_json(FAILURE, {"step": member.done, "error": str(error)})

    def restore(self, ranks: Ranks) -> None:
        """Take up the checkpoints. A kill may have caught some before theirs was written: the others wait."""
        states = [group.restore(ranks) for group in self.groups]
        last, state = min(zip(self.groups, states, strict=True), key=lambda pair: pair[0].done)
        self.step = last.done
        if state is not None:
            self.loader.load_state_dict(state)


def train(
    runs: Sequence[Run], store: ActivationStore, progress: Progress, *, device: str = "auto", ranks: Ranks | None = None
) -> list[dict[str, Any]]:
    """Train (or continue) the dictionaries of `runs` over one stream of `store`'s rows; their last metrics (of rank 0).

    With several ranks each calls this and takes its share of every batch; what is written is written by rank 0.
    Raises Diverged, once the others are finished, where a dictionary diverged.
    """
    ranks = Alone() if ranks is None else ranks
    where = devices.device(device)
    with ExitStack() as stack:
        if ranks.rank == 0:
            for run in runs:
                stack.enter_context(run.lock())
            stack.enter_context(reading(store.path))
        state = _begin(runs, store, where, progress, ranks)
        stack.enter_context(state.loader)
        stopping = stack.enter_context(interruptible())
        progress.start("train", state.total, "steps", done=state.step)
        stack.callback(progress.finish)
        for x in state.loader if state.step < state.total else ():
            shown = _step(state, x, ranks)
            progress.advance(1, **shown)
            if not state.groups:
                break
            stop = ranks.any(bool(stopping) or ranks.asked)
            every = min(member.config.checkpoint_every for member in state.members)
            if state.step % every == 0 or stop or state.step == state.total:
                state.save(ranks)
            if stop:
                number = stopping[0] if stopping else signal.SIGINT  # or whoever told another rank
                raise Interrupted(number, f"checkpoint at step {state.step:,}")
            if state.step == state.total:
                break
        if ranks.rank == 0:
            for member in state.members:
                member.finish(_metadata(store.recipe))
        ranks.wait()
        if state.diverged:
            raise Diverged("; ".join(map(str, state.diverged)))
        return [run.metrics()[-1] for run in runs] if ranks.rank == 0 else []


def _step(state: TrainState, x: Tensor, ranks: Ranks) -> dict[str, float]:
    """One step of every group that has not taken it yet; the figures worth showing, where there are some."""
    shown: dict[str, float] = {}
    for group in [*state.groups]:
        if group.done > state.step:
            continue
        try:
            logged = group.step(x, Clock(state.step, state.total), ranks)
        except Diverged as error:
            state.end(group, error, ranks)
            continue
        for member, metrics in zip(group.members, logged, strict=True):
            if metrics is None:
                continue
            if ranks.rank == 0 and member.logs(state.total):
                took = {"seconds": round(time.monotonic() - state.started, 3), **member.cost()}
                member.run.log({**metrics, **took})
            shown = {name: metrics[name] for name in SHOWN if name in metrics}
    state.step += 1
    return shown


def _begin(
    runs: Sequence[Run], store: ActivationStore, device: torch.device, progress: Progress, ranks: Ranks
) -> TrainState:
    """Fresh or restored state for the runs, which must share their stream."""
    configs = [settings_of(run) for run in runs]
    for name in STREAM:
        if len({getattr(config, name) for config in configs}) > 1:
            raise SaeError(f"train.{name}: dictionaries trained together must agree on it")
    first, rows, largest = configs[0], runs[0].seen.rows, runs[0].largest_norm
    loader = Loader(
        store, share(first, ranks.world), seed=first.data_seed, rows=rows, device=device, outliers=first.outliers,
        largest=largest, rank=ranks.rank, world=ranks.world,
    )  # fmt: skip
    members = []
    for run, config in zip(runs, configs, strict=True):
        if run.seen.recipe != store.recipe or run.seen.rows != rows:
            raise SaeError(f"{run.path}: is for {run.seen.rows:,} rows of {run.seen.key}, not {rows:,} of {store.key}")
        members.append(Member.begin(run, config, store, rows, device))
    for member in members:
        ranks.copy(member.sae.state_dict().values())  # to the bit, however each device rounds a mean
    if any(not run.has_checkpoint for run in runs) and ranks.rank == 0:
        expect_room(runs[0].path, sum(member.on_disk() for member in members), "what training writes")
    state = TrainState(grouped(members), loader, first.total_steps(rows))
    threads = torch.get_num_threads()
    state.restore(ranks)
    if torch.get_num_threads() != threads:
        progress.note(f"threads: {torch.get_num_threads()}, as before; --threads N says otherwise")
    if ranks.rank == 0:
        for run in runs:
            run.clear_failure()
    if any(run.has_checkpoint for run in runs):
        progress.note(f"{runs[0].name}: continuing at step {state.step:,} of {state.total:,}")
    return state


def share(config: TrainConfig, world: int) -> int:
    """Rows of a batch for each of `world` processes. Raises SaeError where those are uneven or too few."""
    batch, parts = config.batch, config.accumulate
    if batch % world:
        near = batch - batch % world or world
        raise SaeError(f"--batch {batch}: cannot be shared equally by {world} processes; try {near}")
    rows = batch // world
    least = 2 if config.sae.reduction == "fvu" else 1  # one row has no variance
    if rows < least * parts:
        raise SaeError(
            f"--batch {batch}: too small for train.accumulate = {parts}, train.sae.reduction = {config.sae.reduction} "
            f"and {world} process{'es' if world > 1 else ''}; give {least * parts * world} or more"
        )
    return rows


def _metadata(recipe: dict[str, Any]) -> Metadata:
    """Where a dictionary trained on rows of this recipe belongs."""
    if "tokens" not in recipe:  # rows of no language model
        return Metadata(dataset=recipe["source"]["source"])
    tokens = recipe["tokens"]
    return Metadata(
        model=recipe["model"]["model"],
        hook=recipe["hook"],
        context_length=tokens["context_length"],
        begin_token=tokens.get("begin") == "context",
        dataset=tokens["source"].get("dataset"),  # of the hub; other sources have none
    )
