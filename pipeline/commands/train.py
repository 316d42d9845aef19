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
from sae.pipeline.commands.rows import Rows, announce, split_axes
from sae.pipeline.commands.shown import show_runs
from sae.pipeline.runtime.interrupts import remedied

if TYPE_CHECKING:
    from sae.cache.loader.dataset import Dataset
    from sae.cache.runs import Run
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.train.stage import TrainConfig

LONGEST = 200  # bytes in the name of a run: files in it and locks beside it have longer ones


def train(
    activations: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activation store: key, beginning of a key, or path. Default: what the last harvest made.")] = None,
    input_: Annotated[str | None, typer.Option("--input", metavar="STORE", autocompletion=complete_store, help="What is read, with `--target`: a point as 6.mlp_in, or a store. Default: that of `--activations`.")] = None,
    target: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="What is reconstructed, for a transcoder: a point as 6.mlp_out, or a store, of the same tokens as what is read. Default: what is read.")] = None,
    layer: Annotated[str | None, typer.Option(metavar="N,...", help="Layers, as 3,9,15 or 0-3: a dictionary for each, of the stores that were harvested with `--activations`. Default: that of the store.")] = None,
    site: Annotated[str | None, typer.Option(metavar="NAME,...", help="Sites, as resid_post: likewise. Default: that of the store.")] = None,
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
    """Train a sparse autoencoder on a store of activations, or a transcoder on two; no language model is loaded.

    A TopK dictionary of 8192 latents, 32 of them active, one pass over what the last harvest made, unless options, a
    preset or a file say otherwise. Ctrl-C writes a checkpoint; `--resume` continues it bit for bit.

    Examples:

        sae train --k 64 --d-sae 16384 --lr 2e-4
        sae train --arch l1 --rows 50M --name l1-first --set train.sae.coefficient=3
        sae train --resume
        sae train --sweep k=16,32,64 --sweep arch=topk,batchtopk --seeds 3
        sae train --align dec --seeds 3
        sae train --devices 4 --batch 16384
        sae train --input 6.mlp_in --target 6.mlp_out
        sae train --layer 3,9,15 --site resid_post
    """
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.progress import said_if_slow

    root, runs, bars = cache_root(cache), folder("--runs", runs), Bars()
    axes, swept = split_axes(sweep or [])
    read = Rows.of(activations, input_, target, layer, site, swept)
    if activations is not None or read.beyond_activations:  # these names before the seconds that torch takes
        read.stores(root)
    if resume and name is not None:
        run_to_resume(runs, name)
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.runtime.devices import take_threads
        from sae.pipeline.train.alignment import BY
        from sae.pipeline.train.config import settings_of
        from sae.pipeline.train.stage import TrainConfig, open_run
        from sae.pipeline.train.sweep import combinations, fill_in_align_seeds, of_seeds
        from sae.pipeline.train.trained import dataset_of

    take_threads(threads, bars.note)
    if align is not None and align not in BY:
        raise SaeError(f"--align {align}: there is no such one; use {', '.join(BY)}")
    if took_part(device):
        return
    freed, length = length_of(steps, rows)
    datasets: list[Dataset] = []

    def configured(axes: dict[str, Any]) -> TrainConfig:
        return settings(
            "train", TrainConfig, preset, config, set_, axes=axes, freed=freed,
            sae={"arch": arch, "k": k, "d_sae": d_sae}, lr=lr, batch=batch, **length, seed=seed, align={"by": align},
        )  # fmt: skip

    many = sweep is not None or seeds is not None or read.several
    if many and (resume or name is not None):
        what = "--sweep" if sweep is not None or seeds is not None else "--layer and --site"
        raise SaeError(f"{what}: names its runs itself and continues what is there; leave out --name and --resume")
    every = [configured(one) for one in combinations(axes)]
    say_rows(every, bars)
    options = [preset, config, set_ or None, arch, k, d_sae, lr, batch, steps, rows, seed, align]
    said = any(option is not None for option in options) or read.beyond_activations
    if resume and (name is not None or not said):
        before = run_to_resume(runs, name)
        runs, name = before.path.parent, before.name
        every = every if said else [settings_of(before)]
        if not read.beyond_activations:
            datasets = [dataset_of(before, root, activations)]
            announce(datasets[0], bars)
    elif name is not None:
        expect_name(name)
    if not many and not resume:
        fill_in_align_seeds(every)  # one that is to agree with others has none here
    datasets = datasets or read.datasets(root, every[0].store_rows, bars)
    if many:
        every = every if seeds is None else of_seeds(every, seeds)
        train_every([(every, dataset) for dataset in datasets], runs, bars, device, devices, json)
        return
    train_one(open_run(every[0], datasets[0], runs, name, resume=resume), datasets[0], bars, device, devices, json)


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


def took_part(device: str) -> bool:
    """Return True if this is a torchrun worker with rank > 0, after running its part of the training.

    Rank 0 alone opens run folders, prints and writes. A worker whose training another process ended says nothing.
    """
    from sae.pipeline.parallel.torch_distributed import LostRank, torchrun_process
    from sae.pipeline.train.sweep import run_as_worker_rank

    seat = torchrun_process(device)
    if seat is None or seat.rank == 0:
        return False
    try:
        run_as_worker_rank(seat)
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
    plans: "list[tuple[list[TrainConfig], Dataset]]", root: Path, bars: "Bars", device: str, processes: int, json: bool
) -> None:
    """Train the dictionaries of a sweep on each dataset, each in a folder below `root`, and show them side by side."""
    from sae.pipeline.report.compare import compare as rows_of
    from sae.pipeline.train.sweep import open_each, sweep_each
    from sae.pipeline.train.trainer import Diverged

    opened = open_each(plans, root)
    runs = [run for its, _ in opened for run in its]
    try:
        sweep_each(opened, bars, device=device, processes=processes)
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
