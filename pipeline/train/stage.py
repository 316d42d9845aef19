"""Dataset -> run folders: any number of dictionaries over one stream of batches.

Every dictionary sees identical batches, so the first of many equals a solo run. Everything that must survive a restart
is in the checkpoint: weights, optimiser, dead counters, loader position; a resumed run equals one that was never
stopped, bit for bit on CPU.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch

from sae.cache.activations import ActivationStore
from sae.cache.disk.locks import reading
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch, Batches
from sae.cache.massive import MEDIANS, beyond_usual, far_rows
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.runs import FAILURE, Run
from sae.cache.store.space import expect_room
from sae.pipeline.formats.base import Metadata
from sae.pipeline.loggers.base import RunLoggers
from sae.pipeline.parallel.ranks import Ranks, SingleRank
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.interrupts import Interrupted, interruptible
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Clock, Config, kernels
from sae.pipeline.saes.steering import CoefficientConfig
from sae.pipeline.train.config import STREAM, TrainConfig, expect_same_meaning, settings_of
from sae.pipeline.train.coupled import CoupledTrainers, grouped
from sae.pipeline.train.opening import begun, on_rows, open_run, run_name
from sae.pipeline.train.stacked import Turn, in_turns, taken
from sae.pipeline.train.trainer import Diverged, Trainer

MISSED = 1.5  # times its target, or less than the target over that: an L0 that is told of
RARELY = 10.0  # times what a checkpoint took to write, before a card is held up by the next
SHOWN = ("loss", "fvu", "l0", "dead", "agreement", "recovery")  # beside the progress bar

__all__ = ["STREAM", "TrainConfig", "begun", "on_rows", "open_run", "run_name", "share", "train"]


@dataclass
class TrainState:
    """Everything that must survive a restart."""

    groups: list[CoupledTrainers]
    loader: Batches
    total: int
    batch: int
    step: int = 0
    started: float = field(default_factory=time.monotonic)
    diverged: list[Diverged] = field(default_factory=list)

    _rested: float = 0.0
    _due: list[CoupledTrainers] = field(default_factory=list)
    _turns: list[Turn] = field(default_factory=list)

    @property
    def members(self) -> list[Trainer]:
        return [member for group in self.groups for member in group.members]

    def turns(self, rows: int) -> list[Turn]:
        """What takes the next step on a batch of so many rows: all groups but those that are ahead."""
        due = [group for group in self.groups if group.done <= self.step]
        if [*map(id, due)] != [*map(id, self._due)]:
            self._due, self._turns = due, in_turns(due, rows)
        return self._turns

    def due(self, ranks: Ranks) -> bool:
        """Return True if a checkpoint is due, on a card not sooner than it is worth where nobody said how often.

        All ranks ask, and agree.
        """
        configs = [member.config for member in self.members]
        if self.step % min(config.steps_to_checkpoint for config in configs):
            return False
        as_said = self.loader.device.type == "cpu" or any(config.checkpoint_every for config in configs)
        return as_said or ranks.any(time.monotonic() >= self._rested)

    def save(self, ranks: Ranks) -> None:
        """Write the checkpoints, but for those that are ahead: they have a later one."""
        begun = time.monotonic()
        for group in [*self.groups]:
            if group.done == self.step:
                try:
                    group.save(self.loader.state_dict(), ranks)
                except Diverged as error:
                    self.end(group, error, ranks)
        self._rested = time.monotonic() + RARELY * (time.monotonic() - begun)

    def end(self, group: CoupledTrainers, error: Diverged, ranks: Ranks) -> None:
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
    runs: Sequence[Run], dataset: Dataset, progress: Progress, *, device: str = "auto", ranks: Ranks | None = None
) -> list[dict[str, Any]]:
    """Train (or continue) the dictionaries of `runs` over one stream of batches; their last metrics (of rank 0).

    With several ranks each calls this and takes its share of every batch; what is written is written by rank 0.
    Raises Diverged, once the others are finished, where a dictionary diverged.
    """
    ranks = SingleRank() if ranks is None else ranks
    where = devices.resolve_device(device)
    with ExitStack() as stack:
        if ranks.rank == 0:
            for run in runs:
                stack.enter_context(run.lock())
            for store in dataset.stores:
                stack.enter_context(reading(store.path))
        state = _begin(runs, dataset, where, progress, ranks)
        stack.enter_context(state.loader)
        for member in state.members if ranks.rank == 0 else ():
            member.loggers = stack.enter_context(closing(RunLoggers(member.run, member.done)))
        stopping = stack.enter_context(interruptible())
        progress.start("train", state.total, "steps", done=state.step)
        stack.callback(progress.finish)
        first, began = state.step, time.monotonic()
        for batch in state.loader if state.step < state.total else ():
            shown = _step(state, batch, ranks)
            if shown:
                shown["rows/s"] = (state.step - first) * state.batch / max(time.monotonic() - began, 1e-9)
            progress.advance(1, **shown)
            if not state.groups:
                break
            stop = ranks.any(bool(stopping) or ranks.stop_requested)
            if state.due(ranks) or stop or state.step == state.total:
                state.save(ranks)
            if stop:
                number = stopping[0] if stopping else signal.SIGINT  # or whoever told another rank
                raise Interrupted(number, f"checkpoint at step {state.step:,}")
            if state.step == state.total:
                break
        if ranks.rank == 0:
            for member in state.members:
                member.finish(_metadata(dataset))
                if (line := _missed(member)) is not None:
                    progress.note(line)
        ranks.barrier()
        if state.diverged:
            raise Diverged("; ".join(map(str, state.diverged)))
        return [run.metrics()[-1] for run in runs] if ranks.rank == 0 else []


def _step(state: TrainState, batch: Batch, ranks: Ranks) -> dict[str, float]:
    """One step of every group that has not taken it yet; the figures worth showing, where there are some."""
    shown: dict[str, float] = {}
    clock = Clock(state.step, state.total, state.batch)
    for groups, turn in state.turns(len(batch.x)):
        for group, logged in zip(groups, taken(turn, batch, clock, ranks), strict=True):
            if isinstance(logged, Diverged):
                state.end(group, logged, ranks)
                continue
            for member, metrics in zip(group.members, logged, strict=True):
                if metrics is None:
                    continue
                if ranks.rank == 0 and member.logs(state.total):
                    took = {"seconds": round(time.monotonic() - state.started, 3), **member.cost()}
                    member.log({**metrics, **took})
                shown = {name: metrics[name] for name in SHOWN if name in metrics}
    state.step += 1
    return shown


def _begin(runs: Sequence[Run], dataset: Dataset, device: torch.device, progress: Progress, ranks: Ranks) -> TrainState:
    """Fresh or restored state for the runs, which must share their stream."""
    configs = [settings_of(run) for run in runs]
    for name in STREAM:
        if len({getattr(config, name) for config in configs}) > 1:
            raise SaeError(f"train.{name}: dictionaries trained together must agree on it")
    first, rows = configs[0], runs[0].seen.rows
    for run, config in zip(runs, configs, strict=True):
        if not run.finished:
            expect_same_meaning(run, config)
        if run.seen.recipes != dataset.recipes or run.seen.rows != rows:
            raise SaeError(
                f"{run.path}: is for {run.seen.rows:,} rows of {run.seen.key}, not {rows:,} of {dataset.key}"
            )
    dataset = dataset.first(rows).kept_up_to(runs[0].seen.limits)
    if ranks.rank == 0:
        for line in _far_rows(dataset):
            progress.note(line)
    loader = dataset.batches(
        share(first, ranks.world), seed=first.data_seed, device=device, rank=ranks.rank, world=ranks.world,
        outliers=None if first.outliers == "auto" else first.outliers,
    )  # fmt: skip
    members = [Trainer.begin(run, config, dataset, device) for run, config in zip(runs, configs, strict=True)]
    for member in members:
        ranks.broadcast(member.sae.state_dict().values())  # to the bit, however each device rounds a mean
    if any(not run.has_checkpoint for run in runs) and ranks.rank == 0:
        expect_room(runs[0].path, sum(member.on_disk() for member in members), "what training writes")
    state = TrainState(grouped(members), loader, first.total_steps(rows), first.batch)
    threads = torch.get_num_threads()
    state.restore(ranks)
    if torch.get_num_threads() != threads:
        progress.note(f"threads: {torch.get_num_threads()}, as before; `threads = N` says otherwise")
    if ranks.rank == 0:
        for run in runs:
            run.clear_failure()
    wanted = device.type == "cuda" and any(config.kernels == "auto" for config in configs)
    if wanted and (hindrance := kernels.hindrance(device)) is not None:
        progress.note(f"kernels: {hindrance}; torch's own operations take their place")
    found = {one.config.precision for one, config in zip(members, configs, strict=True) if config.precision == "auto"}
    if found and found != {"float32"}:
        progress.note("precision: products in bfloat16; `train.precision = float32` says otherwise")
    if any(run.has_checkpoint for run in runs):
        progress.note(f"{runs[0].name}: continuing at step {state.step:,} of {state.total:,}")
    else:
        _say(configs, members, rows, state.total, progress)
    for length in sorted({one for config in configs for one in config.unfinished(state.total)}):
        progress.note(f"{length}: is not over, or never due, within the {state.total:,} steps of this training")
    return state


def _far_rows(dataset: Dataset) -> Iterator[str]:
    """Yield lines about the rows that are left out, and about those that hold much of the variance and are not."""
    for store, most in zip(dataset.stores, dataset.limits or (None,) * len(dataset.stores), strict=True):
        if most is not None and (found := far_rows(store, most, dataset.n_rows)) is not None:
            yield f"{store.key}: {found}; they are left out"
        elif most is None and (found := beyond_usual(store, dataset.n_rows)) is not None and found.notable:
            yield f"{store.key}: {found}; they are trained on, `train.outliers = {MEDIANS:g}` leaves them out"


def _say(configs: Sequence[TrainConfig], members: Sequence[Trainer], rows: int, steps: int, progress: Progress) -> None:
    """Say what settings that follow from the store and the width have become."""
    clock = Clock(0, steps, configs[0].batch)
    rates = ", ".join(sorted({f"{config.rate:g}" for config in configs}))
    said = {one.sae.dead_after for one in configs if isinstance(one.sae, Config)}
    windows = ", ".join(f"{n:,}" for n in sorted(map(clock.rows, said)))
    others = sorted({group["times"] for one in members for group in one.optimiser.param_groups} - {1.0})
    faster = f" (thresholds {', '.join(f'{times:.3g}' for times in others)} times)" if others else ""
    dead = f"; a latent counts as dead after {windows} rows without firing" if windows else ""
    passes = steps * clock.batch / rows
    progress.note(
        f"train: {steps:,} steps of {clock.batch:,} rows, {passes:.2g} passes over {rows:,}; lr {rates}{faster}{dead}"
    )


def _missed(member: Trainer) -> str | None:
    """What to say where L0 did not come to its target."""
    config = member.config.sae
    if not isinstance(config, CoefficientConfig) or config.target_l0 is None or "target_l0" in config.idle:
        return None
    layers = config.latents_of(len(member.run.seen.inputs)) // config.latents
    l0 = member.run.metrics()[-1]["l0"] / layers
    if config.target_l0 / MISSED <= l0 <= MISSED * config.target_l0:
        return None
    return (
        f"{member.run.name}: L0 is {l0:.4g}{' a layer' if layers > 1 else ''} at the end, not near train.sae.target_l0 "
        f"= {config.target_l0:g}; train longer, or say beside it which train.sae.coefficient to start at"
    )


def share(config: TrainConfig, world: int) -> int:
    """Rows of a batch for each of `world` processes. Raises SaeError where those are uneven or too few."""
    batch, parts = config.batch, config.accumulate
    if batch % world:
        near = batch - batch % world or world
        raise SaeError(f"batch = {batch}: cannot be shared equally by {world} processes; try {near}")
    rows = batch // world
    least = 2 if config.sae.reduction == "fvu" else 1  # one row has no variance
    if rows < least * parts:
        raise SaeError(
            f"batch = {batch}: too small for train.accumulate = {parts}, train.sae.reduction = {config.sae.reduction} "
            f"and {world} process{'es' if world > 1 else ''}; give {least * parts * world} or more"
        )
    return rows


def _metadata(dataset: Dataset) -> Metadata:
    """Return where a dictionary trained on a dataset belongs."""
    source = dataset.provenance
    if not isinstance(source, LanguageModelRows):
        return Metadata(dataset=source.kind)
    reads, writes = (_hooks(stores) for stores in (dataset.inputs, dataset.targets))
    return Metadata(
        model=source.model,
        hook=source.hook,
        hook_out=writes[0] if writes else None,
        context_length=source.text.context_length,
        begin_token=source.text.begins_contexts,
        dataset=source.text.dataset,
        positions=source.positions,
        left_out=source.left_out,
        beside=reads[1:],
        beside_out=writes[1:],
    )


def _hooks(stores: Sequence[ActivationStore]) -> tuple[str, ...]:
    """The hook points of stores, those that are of a language model."""
    origins = (provenance(store.recipe) for store in stores)
    return tuple(origin.hook for origin in origins if isinstance(origin, LanguageModelRows))
