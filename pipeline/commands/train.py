"""`sae train`: rows to run folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.cache.errors import NotFound, SaeError
from sae.pipeline.commands.options import (
    PLACES,
    Here,
    Json,
    Said,
    Seeds,
    complete_run,
    complete_store,
    here_with,
    said_of,
)
from sae.pipeline.commands.rows import Rows, announce, split_axes
from sae.pipeline.commands.shown import show_runs
from sae.pipeline.commands.words import several
from sae.pipeline.runtime.interrupts import remedied

if TYPE_CHECKING:
    from sae.cache.loader.dataset import Dataset
    from sae.cache.runs import Run
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.train.stage import TrainConfig

LONGEST = 200  # bytes in the name of a run: files in it and locks beside it have longer ones


def train(
    *,
    activations: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activation store: key, beginning of a key, or path. Default: what the last harvest made.")] = None,
    input_: Annotated[str | None, typer.Option("--input", metavar="STORE,...", autocompletion=complete_store, help="What is read, with `--target`: a point as 6.mlp_in, or a store; several for a crosscoder, as 2.resid_post,3.resid_post. Default: that of `--activations`.")] = None,
    target: Annotated[str | None, typer.Option(metavar="STORE,...", autocompletion=complete_store, help="What is reconstructed, for a transcoder: a point as 6.mlp_out, or a store (several for a cross-layer transcoder), of the same tokens as what is read. Default: what is read.")] = None,
    layer: Annotated[str | None, typer.Option(metavar="N,...", help="Layers, as 3,9,15 or 0-3: a dictionary for each, of the stores that were harvested with `--activations`. Default: that of the store.")] = None,
    site: Annotated[str | None, typer.Option(metavar="NAME,...", help="Sites, as resid_post: likewise. Default: that of the store.")] = None,
    said: Annotated[Said, said_of(
        "train.sae.arch", "train.sae.k", "train.sae.target_l0", "train.sae.d_sae", "train.lr", "train.batch", "train.steps",
        "train.rows", "train.seed", "train.align.by WHAT",
    )],
    name: Annotated[str | None, typer.Option(metavar="NAME", autocompletion=complete_run, help="Name of the run folder. Default: made from the settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", metavar="", help="Continue a run from its last checkpoint: the one `--name` says, or the one these settings made, or, without any, the one that is not finished.")] = False,
    sweep: Annotated[list[str] | None, typer.Option(metavar="KEY=V,V", help="Train one dictionary for each value, all on the same batches, as in `--sweep k=16,32,64 --sweep lr=1e-4,3e-4`. Repeatable: every combination. Said again, it trains what is missing.")] = None,
    seeds: Seeds = None,
    log: Annotated[str | None, typer.Option(metavar="NAME,...", help="Also log to `wandb` or `tensorboard` (extras of those names). A resumed run goes on there by itself. Default: metrics.jsonl of the run folder alone.")] = None,
    devices: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=PLACES, show_default=False, help="Processes that share every batch, a GPU each (or cores: `--device cpu`). Default: 1. Several machines: `torchrun -m sae.cli train`.")] = 1,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs")], json: Json = False,
) -> None:  # fmt: skip
    """Train a sparse autoencoder on a store of activations, or a transcoder on two; no language model is loaded.

    A TopK dictionary of 8192 latents, 32 of them active, on what the last harvest made, unless options, a preset or a
    file say otherwise. Ctrl-C writes a checkpoint; `--resume` continues it bit for bit.

    Examples:

        sae train --k 64 --d-sae 16384 --lr 2e-4
        sae train --arch jumprelu --target-l0 40 --rows 50M --name jumprelu-first
        sae train --resume
        sae train --sweep k=16,32,64 --sweep arch=topk,batchtopk --seeds 3
        sae train --align dec --seeds 3
        sae train --devices 4 --batch 16384
        sae train --log wandb,tensorboard
        sae train --input 6.mlp_in --target 6.mlp_out
        sae train --arch crosscoder --input 2.resid_post,3.resid_post
        sae train --layer 3,9,15 --site resid_post
    """
    axes, swept = split_axes(sweep or [])
    read = Rows.of(activations, input_, target, layer, site, swept)
    many = sweep is not None or seeds is not None or read.several
    if many and (resume or name is not None):
        what = "--layer and --site" if sweep is None and seeds is None else "--sweep"
        raise SaeError(f"{what}: names its runs itself and continues what is there; leave out --name and --resume")
    if activations is not None or read.beyond_activations:  # these names before the seconds that torch takes
        read.stores(here.cache)
    anything = said or read.beyond_activations
    before = run_to_resume(here.runs, name) if resume and (name is not None or not anything) else None
    with here.loading_torch():
        from sae.pipeline.formats.trained import dataset_of
        from sae.pipeline.loggers.base import expect
        from sae.pipeline.train.config import settings_of
        from sae.pipeline.train.stage import TrainConfig, open_run
        from sae.pipeline.train.sweep import combinations, fill_in_align_seeds, of_seeds

    loggers = expect(several("--log", log) or [])
    if took_part(here.device):
        return
    configs = [said.settings("train", TrainConfig, axes=one) for one in combinations(axes)]
    say_rows(configs, here.progress)
    runs = here.runs
    if before is not None:
        runs, name = before.path.parent, before.name
        configs = configs if anything else [settings_of(before)]
    elif name is not None:
        expect_name(name)
    if before is not None and not read.beyond_activations:
        datasets = [dataset_of(before, here.cache, activations)]
    else:
        datasets = read.datasets(here.cache, configs[0].store_rows)
    for dataset in datasets:
        announce(dataset, here.progress)
    if many:
        configs = configs if seeds is None else of_seeds(configs, seeds)
        train_every([(configs, dataset) for dataset in datasets], here, devices, loggers, json)
        return
    if not resume:
        fill_in_align_seeds(configs)  # one that is to agree with others has none here
    train_one(open_run(configs[0], datasets[0], runs, name, resume=resume), datasets[0], here, devices, loggers, json)


def expect_name(name: str) -> None:
    """Raise SaeError where a run's folder cannot, or should not, be called so."""
    if name == ".." or Path(name).name != name:
        raise SaeError(f"--name {name}: is not the name of a folder; where the folder goes is said by --runs")
    if not name.isprintable() or name != name.strip() or len(name.encode()) > LONGEST:
        raise SaeError(f"--name {name!r}: take a name of at most {LONGEST} letters, no blanks around them")


def say_rows(every: "Iterable[TrainConfig]", bars: "Bars") -> None:
    """Say how many rows are seen where what was asked for is not a whole number of batches."""
    for rows, batch in dict.fromkeys((one.rows, one.batch) for one in every if isinstance(one.rows, int)):
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


def train_one(run: "Run", dataset: "Dataset", here: Here, processes: int, loggers: "Sequence[str]", json: bool) -> None:
    """Train (or continue) one dictionary and show its last figures."""
    from sae.pipeline.commands import console
    from sae.pipeline.train.sweep import sweep

    here.progress.note(f"run: {run.path}{'; nothing to do, it is finished' if run.finished else ''}")
    with remedied(f"continue with `sae train --resume --name {run.name}`"):
        sweep([run], dataset, here.progress, device=here.device, processes=processes, loggers=loggers)
    result = [{}, *run.metrics()][-1]
    if json:
        console.as_json({"run": str(run.path), **result})
    else:
        console.table(f"run {run.path}", ["figure", "last value"], list(result.items()))


def train_every(
    plans: "list[tuple[list[TrainConfig], Dataset]]", here: Here, processes: int, loggers: "Sequence[str]", json: bool
) -> None:
    """Train the dictionaries of a sweep on each dataset, each in a folder of its own, and show them side by side."""
    from sae.pipeline.report.compare import compare as rows_of
    from sae.pipeline.train.sweep import open_each, sweep_each
    from sae.pipeline.train.trainer import Diverged

    opened = open_each(plans, here.runs)
    runs = [run for its, _ in opened for run in its]
    try:
        sweep_each(opened, here.progress, device=here.device, processes=processes, loggers=loggers)
    except Diverged:
        if finished := [run for run in runs if run.finished]:
            show_runs(rows_of(finished), f"{len(finished)} of {len(runs)} runs in {here.runs}", json)
        raise
    show_runs(rows_of(runs), f"{len(runs)} runs in {here.runs}", json)


def run_to_resume(runs: Path, name: str | None) -> "Run":
    """The run `--resume` means where no settings tell: the one named, else the only one that is not finished."""
    from sae.cache import catalogue

    if name is not None:
        try:
            return catalogue.find_run(runs, name)
        except NotFound as error:
            raise NotFound(f"--name {error}") from error
    waiting = [run for run in catalogue.runs(runs) if not run.finished and run.imported is None]
    if not waiting:
        raise SaeError(f"--resume: no unfinished run in {runs}; `sae list` shows the runs, `sae train` starts one")
    if len(waiting) > 1:
        raise SaeError(f"--resume: ambiguous; give --name: {', '.join(run.name for run in waiting)}")
    return waiting[0]
