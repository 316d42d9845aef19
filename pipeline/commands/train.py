"""`sae train`: rows to run folders."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.commands.described import count_option, option
from sae.pipeline.commands.options import (
    PLACES,
    ActiveLatents,
    Arch,
    CacheRoot,
    ConfigFile,
    Device,
    Json,
    Latents,
    Preset,
    RunsRoot,
    Seeds,
    Set,
    Steps,
    Threads,
    cache_root,
    complete_run,
    complete_store,
    folder,
    length_of,
    settings,
)
from sae.pipeline.commands.shown import show_runs
from sae.pipeline.runtime.interrupts import remedied

if TYPE_CHECKING:
    from sae.cache.activations import ActivationStore
    from sae.cache.loader.dataset import Dataset
    from sae.cache.runs import Run
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.train.stage import TrainConfig

LONGEST = 200  # bytes in the name of a run: files in it and locks beside it have longer ones


def train(
    activations: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activation store: key, beginning of a key, or path. Default: what the last harvest made.")] = None,
    arch: Arch = None,
    k: ActiveLatents = None,
    d_sae: Latents = None,
    lr: Annotated[float | None, option("train.lr")] = None,
    batch: Annotated[int | None, option("train.batch")] = None,
    steps: Steps = None,
    rows: Annotated[str | None, count_option("train.rows")] = None,
    seed: Annotated[int | None, option("train.seed")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=complete_run, help="Name of the run folder. Default: made from the settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", metavar="", help="Continue a run from its last checkpoint: the one `--name` says, or the one these settings made, or, without any, the one that is not finished.")] = False,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=V,V", help="Train one dictionary for each value, all on the same batches, as in `--sweep k=16,32,64 --sweep lr=1e-4,3e-4`. Repeatable: every combination. Said again, it trains what is missing.")] = None,
    seeds: Seeds = None,
    align: Annotated[str | None, option("train.align.by", "--align", metavar="WHAT", unsaid="nothing")] = None,
    devices: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=PLACES, show_default=False, help="Processes that share every batch, a GPU each (or cores: `--device cpu`). Default: 1. Several machines: `torchrun -m sae.cli train`.")] = 1,
    device: Device = "auto", threads: Threads = None, cache: CacheRoot = None, runs: RunsRoot = Path("runs"), preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Train a sparse autoencoder on a store of activations; no language model is loaded.

    A TopK dictionary of 8192 latents, 32 of them active, one pass over what the last harvest made, unless options, a
    preset or a file say otherwise. Ctrl-C writes a checkpoint; `--resume` continues it bit for bit.

    Examples:

        sae train --k 64 --d-sae 16384 --lr 2e-4
        sae train --arch l1 --rows 50M --name l1-first --set train.sae.coefficient=3
        sae train --resume
        sae train --sweep k=16,32,64 --sweep arch=topk,batchtopk --seeds 3
        sae train --align dec --seeds 3
        sae train --devices 4 --batch 16384
    """
    from sae.cache import catalogue
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.progress import said_if_slow

    root, runs, bars = cache_root(cache), folder("--runs", runs), Bars()
    if activations is not None:  # these names before the seconds that torch takes
        store_named(root, activations)
    if resume and name is not None:
        run_to_resume(runs, name)
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.runtime.devices import take_threads
        from sae.pipeline.train.alignment import BY
        from sae.pipeline.train.config import settings_of
        from sae.pipeline.train.stage import TrainConfig, open_run
        from sae.pipeline.train.sweep import acquainted, combinations, of_seeds

    take_threads(threads, bars.note)
    if align is not None and align not in BY:
        raise SaeError(f"--align {align}: there is no such one; use {', '.join(BY)}")
    if took_part(device):
        return
    freed, length = length_of(steps, rows)

    def configured(axes: dict[str, Any]) -> TrainConfig:
        return settings(
            "train", TrainConfig, preset, config, set_, axes=axes, freed=freed,
            sae={"arch": arch, "k": k, "d_sae": d_sae}, lr=lr, batch=batch, **length, seed=seed, align={"by": align},
        )  # fmt: skip

    if sweep is not None or seeds is not None:
        if resume or name is not None:
            raise SaeError("--sweep: names its runs itself and continues what is there; leave out --name and --resume")
        every = [configured(axes) for axes in combinations(sweep or [])]
        say_rows(every, bars)
        train_every(
            every if seeds is None else of_seeds(every, seeds),
            activations_of(root, activations, bars),
            runs,
            bars,
            device,
            devices,
            json,
        )
        return
    values = configured({})
    say_rows([values], bars)
    options = [preset, config, set_ or None, arch, k, d_sae, lr, batch, steps, rows, seed, align]
    said = any(option is not None for option in options)
    if resume and (name is not None or not said):
        before = run_to_resume(runs, name)
        runs, name = before.path.parent, before.name
        activations = activations or str(catalogue.trained_on(root, before.seen.inputs[0], before.name, None).path)
        values = values if said else settings_of(before)
    elif name is not None:
        expect_name(name)
    if not resume:
        acquainted([values])  # one that is to agree with others has none here
    dataset = activations_of(root, activations, bars)
    train_one(open_run(values, dataset, runs, name, resume=resume), dataset, bars, device, devices, json)


def expect_name(name: str) -> None:
    """Raise SaeError where a run's folder cannot, or should not, be called so."""
    if name == ".." or Path(name).name != name:
        raise SaeError(f"--name {name}: is not the name of a folder; where the folder goes is said by --runs")
    if not name.isprintable() or name != name.strip() or len(name.encode()) > LONGEST:
        raise SaeError(f"--name {name!r}: take a name of at most {LONGEST} letters, no blanks around them")


def say_rows(every: "Iterable[TrainConfig]", bars: "Bars") -> None:
    """Say how many rows are seen where what was asked for is no whole number of batches."""
    for rows, batch in dict.fromkeys((one.rows, one.batch) for one in every if one.rows is not None):
        steps = max(1, rows // batch)
        if steps * batch != rows:
            bars.note(f"rows {rows:,}: steps see {batch:,} each, so {steps * batch:,} are seen in {steps:,}")


def activations_of(root: Path, name: str | None, bars: "Bars") -> "Dataset":
    """The rows to train on, said on stderr."""
    from sae.cache import catalogue
    from sae.cache.loader.dataset import Dataset

    store = store_named(root, name)
    bars.note(f"activations: {store.key}{catalogue.unfinished(store)}")
    return Dataset.of(store)


def store_named(root: Path, name: str | None) -> "ActivationStore":
    """The store that `--activations` names; without a name, what the last harvest made."""
    from sae.cache import catalogue
    from sae.cache.activations import ActivationStore

    return catalogue.find(root, ActivationStore, name, "--activations", "sae harvest")


def took_part(device: str) -> bool:
    """Whether torchrun has made this process another than its first, which alone opens, prints and writes.

    If so, it has done its share of the training on return. Where another process ended that, it is quiet about it.
    """
    from sae.pipeline.parallel.torch_distributed import LostRank, torchrun_seat
    from sae.pipeline.train.sweep import follow

    seat = torchrun_seat(device)
    if seat is None or seat.rank == 0:
        return False
    try:
        follow(seat)
    except LostRank as error:
        raise typer.Exit(error.exit_code) from error
    return True


def train_one(run: "Run", dataset: "Dataset", bars: "Bars", device: str, processes: int, json: bool) -> None:
    """Train (or continue) one dictionary and show its last figures."""
    from sae.pipeline.commands import console
    from sae.pipeline.train.sweep import sweep

    bars.note(f"run: {run.path}{'; nothing to do, it is finished' if run.finished else ''}")
    with remedied(f"continue with `sae train --resume --name {run.name}`"):
        sweep([run], dataset, bars, device=device, processes=processes)
    result = [{}, *run.metrics()][-1]
    if json:
        console.as_json({"run": str(run.path), **result})
    else:
        console.table(f"run {run.path}", ["figure", "last value"], list(result.items()))


def train_every(
    every: list["TrainConfig"],
    dataset: "Dataset",
    root: Path,
    bars: "Bars",
    device: str,
    processes: int,
    json: bool,
) -> None:
    """Train the dictionaries of a sweep, each in a folder below `root`, and show them side by side."""
    from sae.pipeline.report.compare import compare as rows_of
    from sae.pipeline.train.sweep import open_all, sweep
    from sae.pipeline.train.trainer import Diverged

    runs = open_all(every, dataset, root)
    try:
        sweep(runs, dataset, bars, device=device, processes=processes)
    except Diverged:
        if finished := [run for run in runs if run.finished]:
            show_runs(rows_of(finished), f"{len(finished)} of {len(runs)} runs in {root}", json)
        raise
    show_runs(rows_of(runs), f"{len(runs)} runs in {root}", json)


def run_to_resume(runs: Path, name: str | None) -> "Run":
    """The run `--resume` means where no settings tell: the one named, else the only one that is not finished."""
    from sae.cache import catalogue

    if name is not None:
        try:
            return catalogue.find_run(runs, name)
        except NotFound as error:
            raise NotFound(f"--name {error}") from error
    waiting = [run for run in catalogue.runs(runs) if not run.finished]
    if not waiting:
        raise SaeError(f"--resume: no unfinished run in {runs}; `sae list` shows the runs, `sae train` starts one")
    if len(waiting) > 1:
        raise SaeError(f"--resume: which one? Give --name: {', '.join(run.name for run in waiting)}")
    return waiting[0]
