"""One set of settings -> every combination of swept values and seeds, trained over as few streams as they allow.

`--sweep k=16,32 --sweep lr=1e-4,3e-4 --seeds 3` is twelve dictionaries. Those that agree on batch, length and order of
the rows see the same batches in one pass over the dataset; the others take turns, as datasets do where there are
several. Each has a run folder of its own, named by its settings, so a repeated sweep trains only what is missing and
continues what was interrupted.
"""

import itertools
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import canonical
from sae.cache.disk.paths import parse_path
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.run_folder import discarding
from sae.cache.runs import Run
from sae.configs import parsed
from sae.configs.base import WHOLE
from sae.pipeline.loggers.base import ask
from sae.pipeline.parallel.launcher import launch
from sae.pipeline.parallel.ranks import Ranks, SingleRank
from sae.pipeline.parallel.torch_distributed import (
    DistributedRanks,
    ProcessInfo,
    assign_devices,
    together,
    torchrun_process,
)
from sae.pipeline.runtime import cores
from sae.pipeline.runtime.progress import Progress, Silent
from sae.pipeline.train.config import REVISION, settings_of
from sae.pipeline.train.stage import STREAM, TrainConfig, begun, on_rows, open_run, run_name, share, train
from sae.pipeline.train.trainer import Diverged

MOST = 10_000  # dictionaries of one sweep
Plan = tuple[Sequence[Run], Dataset]
"""Runs, and the dataset that they are trained on."""
SHORT = {
    "arch": "sae.arch",
    "k": "sae.k",
    "target_l0": "sae.target_l0",
    "d_sae": "sae.d_sae",
}  # settings the command has short options for


def combinations(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the axes `KEY=VALUE,VALUE,...`, each as {"sae.k": 16, "lr": 1e-4}.

    A key is a setting of the train section (`lr`, `sae.k`), one of the architecture (`arch.k`), or the name of a short
    option (`k`, `d_sae`, `arch`). Raises SaeError for an axis that is not written so, or is there twice.
    """
    spread: dict[str, list[Any]] = {}
    for axis in axes:
        key, _, text = axis.partition("=")
        path = SHORT.get(key, key).removeprefix("train.")
        path = "sae." + path.removeprefix("arch.") if path.startswith("arch.") else path
        try:
            found: list[Any] = [] if text.rstrip().endswith(",") else parsed(f"[{text}]")
        except ValueError:
            found = []
        if not found or not all(path.split(".")):
            raise SaeError(f"sweep = {axis}: write it as KEY=VALUE,VALUE, for example k=16,32,64 or lr=1e-4,3e-4")
        if path in spread:
            raise SaeError(f"sweep = {axis}: {key} is swept twice; give all its values at once")
        if any(value in found[:i] for i, value in enumerate(found)):
            raise SaeError(f"sweep = {axis}: a value stands there twice")
        spread[path] = found
    _expect_few(math.prod(map(len, spread.values())))
    return [dict(zip(spread, values, strict=True)) for values in itertools.product(*spread.values())]


def of_seeds(configs: Sequence[TrainConfig], seeds: int) -> list[TrainConfig]:
    """Each configuration with its own seed and the following ones, as many as `seeds` says."""
    _expect_few(len(configs) * seeds)
    if len({config.seed for config in configs}) > 1:
        raise SaeError(f"seeds = {seeds}: the seed is swept already; give `seeds` or `sweep = seed=...`")
    first = configs[0].seed
    if first + seeds > WHOLE:
        raise SaeError(f"seeds = {seeds}: from seed {first} on they do not fit into 64 bits")
    return [one.model_copy(update={"seed": seed}) for one in configs for seed in range(first, first + seeds)]


def _expect_few(dictionaries: int) -> None:
    if dictionaries > MOST:
        raise SaeError(f"sweep = ...: that is {dictionaries:,} dictionaries; at most {MOST:,} are trained at once")


def fill_in_align_seeds(configs: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Fill in `align.seeds` for configurations that differ only in their seed.

    Raises SaeError where only one seed is left to agree with.
    """
    seeds: dict[str, list[int]] = {}
    for config in configs:
        seeds.setdefault(config.model_dump_json(exclude={"seed"}), []).append(config.seed)
    known = []
    for config in configs:
        if config.align is not None:
            others = tuple(seeds[config.model_dump_json(exclude={"seed"})])
            if len(others) < 2:
                raise SaeError("align = ...: takes dictionaries of two or more seeds; say how many with `seeds`")
            config = config.model_copy(update={"align": config.align.model_copy(update={"seeds": others})})
        known.append(config)
    return known


def open_all(configs: Sequence[TrainConfig], dataset: Dataset, root: Path) -> list[Run]:
    """The run folder of each configuration, begun or taken up. Raises SaeError where two configurations are one.

    Where some were interrupted and the store has grown since, all are trained on as many rows as those. What is unset
    is what it is today, so that dictionaries side by side are trained alike: a run of before is one of these where it
    has the same.
    """
    there = [run for run in catalogue.readable_runs(root)[0] if _named_here(run, dataset)]
    configs = [one.model_copy(update={"betas": one.decay_rates}) for one in fill_in_align_seeds(configs)]
    waiting = [run.seen.rows for config in configs for run in begun(config, dataset, there) if not run.finished]
    if waiting:
        configs = [one.model_copy(update={"store_rows": one.store_rows or max(waiting)}) for one in configs]
    configs = [on_rows(config, dataset) for config in configs]
    if len({run_name(config, dataset) for config in configs}) < len(configs):
        raise SaeError(
            "sweep = ...: two of the combinations are the same settings; does another option fix a swept key?"
        )
    runs: list[Run] = []
    with discarding(runs):
        for config in configs:
            known = begun(config, dataset, there)
            runs.append(known[0] if known else open_run(config, dataset, root, None, resume=False))
    return runs


def _named_here(run: Run, dataset: Dataset) -> bool:
    """Return True if a run on a store has the name that its settings give it; one that a user named is the user's."""
    if run.imported is not None or run.seen.recipes != dataset.recipes:
        return False
    name = run_name(settings_of(run), dataset)
    if run.revision < REVISION:  # the name's last part is a hash of settings that had fewer fields
        return run.name.rpartition("-")[0] == name.rpartition("-")[0]
    return run.name == name


def open_each(plans: Sequence[tuple[Sequence[TrainConfig], Dataset]], root: Path) -> list[Plan]:
    """The run folders of the configurations of each dataset, all of them before any is trained; see `open_all`."""
    opened: list[Plan] = []
    with ExitStack() as stack:
        for configs, dataset in plans:
            runs = open_all(configs, dataset, root)
            stack.enter_context(discarding(runs))
            opened.append((runs, dataset))
    return opened


def sweep(
    runs: Sequence[Run], dataset: Dataset, progress: Progress, *, device: str = "auto", processes: int = 1,
    loggers: Sequence[str] = (),
) -> None:  # fmt: skip
    """As `sweep_each`, on one dataset."""
    sweep_each([(runs, dataset)], progress, device=device, processes=processes, loggers=loggers)


def sweep_each(
    plans: Sequence[Plan], progress: Progress, *, device: str = "auto", processes: int = 1, loggers: Sequence[str] = ()
) -> None:
    """Train what is not finished of the runs of each dataset, all that share a stream of batches in one pass.

    With several processes of this machine, or several that torchrun has started, each takes its share of every batch.
    Of torchrun's, only rank 0 calls this: the others call `run_as_worker_rank`. Raises Diverged, once the others are
    finished, where a dictionary diverged. A run folder that was made for this is removed where nothing came of it.
    loggers: where what is not finished is logged to as well, from now on.
    """
    with discarding(every := [run for runs, _ in plans for run in runs]):
        for run in every:
            if not run.finished:
                ask(run, loggers)
        _sweep(plans, progress, device, processes)


def _sweep(plans: Sequence[Plan], progress: Progress, device: str, processes: int) -> None:
    seat = torchrun_process(device)
    if seat is not None and processes > 1:
        raise SaeError(f"devices = {processes}: torchrun has started the processes already; leave out `devices`")
    every = [run for runs, _ in plans for run in runs]
    for run in every:
        share(settings_of(run), processes)  # said before anything is started
    task = json.dumps([
        {
            "runs": [str(run.path) for run in runs], "rows": dataset.n_rows,
            "inputs": [str(store.path) for store in dataset.inputs],
            "targets": [str(store.path) for store in dataset.targets],
        }
        for runs, dataset in plans
    ])  # fmt: skip
    if processes > 1 and not all(run.finished for run in every):
        if "cpu" in assign_devices(processes, device):
            cores.expect_few(processes, "devices =", progress.note)
        launch(processes, device, _train_as_rank, task, progress)
    elif seat is not None:
        with together(seat) as ranks:
            _train_as_rank(ranks, seat.device, ranks.broadcast_text(task), progress)
    else:
        _each(plans, progress, device, SingleRank())


def run_as_worker_rank(seat: ProcessInfo) -> None:
    """Do the part of a torchrun process other than rank 0: train what rank 0 trains, and write nothing."""
    with together(seat) as ranks:
        _train_as_rank(ranks, seat.device, ranks.broadcast_text(""), Silent())


def _train_as_rank(ranks: DistributedRanks, device: str, task: str, progress: Progress) -> None:
    """One rank's part of the training that a task tells of."""
    plans: list[Plan] = []
    try:
        for named in json.loads(task):
            runs = [Run(Path(path)) for path in named["runs"]]
            sides = [tuple(ActivationStore(parse_path(path)) for path in named[side]) for side in ("inputs", "targets")]
            plans.append((runs, Dataset.of(*sides, rows=named["rows"])))
    except NotFound as error:
        raise NotFound(f"{error} (rank {ranks.rank}); all machines need the same cache and runs") from error
    _each(plans, progress if ranks.rank == 0 else Silent(), device, ranks)


def _each(plans: Sequence[Plan], progress: Progress, device: str, ranks: Ranks) -> None:
    """Train what is not finished, dataset by dataset."""
    diverged = []
    for runs, dataset in plans:
        try:
            _passes(runs, dataset, progress, device, ranks)
        except Diverged as error:
            diverged.append(str(error))
    if diverged:
        raise Diverged("; ".join(diverged))


def _passes(runs: Sequence[Run], dataset: Dataset, progress: Progress, device: str, ranks: Ranks) -> None:
    """Train what is not finished, pass by pass."""
    waiting = [run for run in runs if not run.finished]
    ranks.barrier()  # so that all have looked before the first is finished
    # what is pulled together ends together: the finished ones of such a group are needed by the others
    pulled = {_group(run) for run in waiting if settings_of(run).align is not None}
    streams: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        if run in waiting or _group(run) in pulled:
            agreed = (run.seen.limits, *(getattr(settings_of(run), name) for name in STREAM))
            streams.setdefault(agreed, []).append(run)
    if len(runs) > 1:
        done = len(runs) - len(waiting)
        progress.note(f"{len(runs)} dictionaries, {done} finished before, {len(streams)} passes for the others")
    diverged = []
    for stream in streams.values():
        try:
            train(stream, dataset, progress, device=device, ranks=ranks)
        except Diverged as error:
            diverged.append(str(error))
    if diverged:
        raise Diverged("; ".join(diverged))


def _group(run: Run) -> str:
    """Return what is the same for dictionaries that are pulled together, and for no others."""
    return canonical({name: value for name, value in run.settings.items() if name != "seed"})
