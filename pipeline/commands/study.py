"""`sae study`: questions that take many dictionaries, a command each. Every one leaves a table, a plot and JSON."""

from pathlib import Path
from typing import Annotated

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.described import count_option
from sae.pipeline.commands.options import (
    ActiveLatents,
    Arch,
    CacheRoot,
    ConfigFile,
    Device,
    Json,
    Latents,
    Offline,
    Preset,
    RunsRoot,
    Seeds,
    Set,
    Steps,
    Threads,
    complete_store,
)
from sae.pipeline.commands.study_lab import dataset_of, finish, lab, results_folder, store_of, training
from sae.pipeline.commands.words import grid, several, whole

app = typer.Typer(
    help="Train and judge the dictionaries that a question takes, and put them in a table and a plot. Runs are named by "
    "their settings: said again, a study trains and judges only what is missing.",
    no_args_is_help=True,
)

# One option a line: this is the manual.
# fmt: off
Store = Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activation store: key, beginning of a key, or path. Default: what the last harvest made.")]
Rows = Annotated[str | None, count_option("train.rows")]
NoCe = Annotated[bool, typer.Option("--no-ce", metavar="", help="Leave out cross-entropy: no language model is needed.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default=False, help="Folder of table.csv, plot.png and results.json. Default: `studies/` and the study's name, here.")]
# fmt: on


@app.command()
def coefficients(
    l1: Annotated[str | None, typer.Option("--l1", metavar="X,...", help="L1 coefficients, also those of the hybrid. Default: 0.01,0.03,0.1,0.3,1.")] = None,
    jl: Annotated[str | None, typer.Option("--jl", metavar="X,...", help="Johnson-Lindenstrauss coefficients. Default: 0.05,0.15,0.5,1.5,5.")] = None,
    hybrid_jl: Annotated[str | None, typer.Option("--hybrid-jl", metavar="X,...", help="Johnson-Lindenstrauss coefficients of the hybrid, each beside every L1 one. Default: 0.5.")] = None,
    d_sae: Latents = None, steps: Steps = None, rows: Rows = None, seeds: Seeds = None, activations: Store = None,
    no_ce: NoCe = False, out: Out = None, device: Device = "auto", threads: Threads = None, cache: CacheRoot = None,
    runs: RunsRoot = Path("runs"), offline: Offline = False, preset: Preset = None, config: ConfigFile = None,
    set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """What a penalty's weight buys: L1, Johnson-Lindenstrauss and both, over grids of coefficients, at equal rows.

    Examples:

        sae study coefficients --rows 50M
        sae study coefficients --l1 0.03,0.1,0.3 --jl 0.5,5 --hybrid-jl 0.05,0.5,5 --seeds 3
    """
    from sae.pipeline.studies import coefficients as stage

    grids = {
        "l1": grid("--l1", l1, stage.L1_GRID),
        "jl": grid("--jl", jl, stage.JL_GRID),
        "hybrid_jl": grid("--hybrid-jl", hybrid_jl, stage.HYBRID_JL),
    }
    base = training(preset, config, set_, steps, rows, itself=stage.ITSELF, of=stage.ARCHITECTURES)
    where = lab(cache, runs, preset, config, set_, no_ce, device, threads, offline)
    folder_ = results_folder(out, "coefficients")
    dataset = dataset_of(where, activations)
    finish(stage.coefficients(base, dataset, where, **grids, d_sae=d_sae, seeds=seeds or 1), folder_, json)


@app.command("activations")
def activation_functions(
    match_l0: Annotated[bool, typer.Option("--match-l0", metavar="", help="Give the penalised ones the coefficients with which L0 is k, found by training.")] = False,
    k: ActiveLatents = None, d_sae: Latents = None, steps: Steps = None, rows: Rows = None, seeds: Seeds = None,
    activations: Store = None, no_ce: NoCe = False, out: Out = None, device: Device = "auto", threads: Threads = None,
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Activation functions side by side: ReLU, shifted ReLU, JumpReLU, TopK, BatchTopK; same data, seed and steps.

    As they come, their L0s differ, and so little else can be said; `--match-l0` brings them together.

    Examples:

        sae study activations --rows 50M --k 32
        sae study activations --match-l0 --k 32 --seeds 3 --json
    """
    from sae.pipeline.commands import console
    from sae.pipeline.studies import activations as stage

    base = training(preset, config, set_, steps, rows, of=[kind.arch for kind in stage.KINDS.values()])
    where = lab(cache, runs, preset, config, set_, no_ce, device, threads, offline)
    folder_ = results_folder(out, "activations")
    dataset = dataset_of(where, activations)
    result = stage.activations(base, dataset, where, k=k, d_sae=d_sae, match_l0=match_l0, seeds=seeds or 1)
    finish(result, folder_, json, stage.box(result, plain=console.out.options.ascii_only))


@app.command()
def rates(
    ratios: Annotated[str | None, typer.Option("--ratios", metavar="X,...", help="Learning rates of the decoder over the encoder's. Default: 1,2,4,8.")] = None,
    encoder_decay: Annotated[str | None, typer.Option("--encoder-decay", metavar="NAME,...", help="How the encoder's learning rate falls: none, cosine, or both. Default: none,cosine.")] = None,
    arch: Arch = None, k: ActiveLatents = None, d_sae: Latents = None, steps: Steps = None, rows: Rows = None,
    seeds: Seeds = None, activations: Store = None, no_ce: NoCe = False, out: Out = None, device: Device = "auto", threads: Threads = None,
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """A decoder that learns faster than its encoder, with and without the encoder slowing down.

    Examples:

        sae study rates --rows 50M
        sae study rates --arch l1 --ratios 1,4 --encoder-decay cosine
    """
    from sae.pipeline.studies import rates as stage

    chosen = grid("--ratios", ratios, stage.RATIOS)
    if 0 in chosen:
        raise SaeError(f"--ratios {ratios}: a decoder at rate 0 learns nothing; give numbers above 0")
    decays = several("--encoder-decay", encoder_decay) or list(stage.DECAYS)
    if wrong := [decay for decay in decays if decay not in stage.DECAYS]:
        raise SaeError(f"--encoder-decay {wrong[0]}: there is no such one; use {', '.join(stage.DECAYS)}")
    known = [decay for decay in stage.DECAYS if decay in decays]
    base = training(preset, config, set_, steps, rows, itself=stage.ITSELF, arch=arch, k=k, d_sae=d_sae)
    where = lab(cache, runs, preset, config, set_, no_ce, device, threads, offline)
    folder_ = results_folder(out, "rates")
    dataset = dataset_of(where, activations)
    finish(stage.rates(base, dataset, where, ratios=chosen, decays=known, seeds=seeds or 1), folder_, json)


@app.command()
def layers(
    layers: Annotated[str, typer.Option("--layers", metavar="N,...", help="Layers, from 0, as 0,4,8 or 0-3; a store of each must be there.")],
    site: Annotated[str | None, typer.Option(metavar="NAME", help="Site, as resid_post. Default: that of the store.")] = None,
    arch: Arch = None, k: ActiveLatents = None, d_sae: Latents = None, steps: Steps = None, rows: Rows = None,
    seeds: Seeds = None, activations: Store = None, no_ce: NoCe = False, out: Out = None, device: Device = "auto", threads: Threads = None,
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """The same dictionary on several layers of one model: norms, errors, dead latents, likeness of neighbours.

    The layers' stores are found by what `--activations` names: same model, tokens and codec.

    Examples:

        sae study layers --layers 0,4,8,11 --site resid_post --rows 50M
        sae study layers --layers 5,6 --arch batchtopk --k 64
    """
    from sae.pipeline.studies import layers as stage

    numbers = sorted(whole("--layers", layers) or ())
    base = training(preset, config, set_, steps, rows, arch=arch, k=k, d_sae=d_sae)
    where = lab(cache, runs, preset, config, set_, no_ce, device, threads, offline)
    folder_ = results_folder(out, "layers")
    reference = store_of(where, activations, any_of_the_last=True)
    if "tokens" not in reference.recipe:
        raise SaeError(
            f"--activations {reference.key}: is of no layer of a model; name a store that `sae harvest` made"
        )
    chosen = site or str(reference.recipe["site"])
    finish(stage.layers(base, reference, where, layers=numbers, site=chosen, seeds=seeds or 1), folder_, json)


@app.command()
def alignment(
    by: Annotated[str | None, typer.Option("--by", metavar="WHAT,...", help="What is to agree: dec (decoder rows), hid (activations), x_hat (reconstructions), or several. Default: dec.")] = None,
    weights: Annotated[str | None, typer.Option("--weights", metavar="X,...", help="Weights of the pull; 0 is none. Default: 0,0.01,0.1,1.")] = None,
    arch: Arch = None, k: ActiveLatents = None, d_sae: Latents = None, steps: Steps = None, rows: Rows = None,
    seeds: Seeds = None,
    activations: Store = None, no_ce: NoCe = False, out: Out = None, device: Device = "auto", threads: Threads = None,
    cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Dictionaries of several seeds pulled towards each other: how far they agree, what it costs, whether it is true.

    Three dictionaries for every weight, unless `--seeds` says otherwise.
    On rows of `sae synthesize` the true features are known, and each latent's agreement is set against its truth.

    Examples:

        sae study alignment --rows 50M --weights 0,0.1
        sae study alignment --preset synthetic --by dec,hid --seeds 5
    """
    from sae.pipeline.studies import mfr as stage
    from sae.pipeline.train.alignment import BY

    chosen = several("--by", by) or ["dec"]
    if wrong := [what for what in chosen if what not in BY]:
        raise SaeError(f"--by {wrong[0]}: there is no such one; use {', '.join(BY)}")
    pulls = grid("--weights", weights, stage.WEIGHTS)
    base = training(preset, config, set_, steps, rows, itself=stage.ITSELF, arch=arch, k=k, d_sae=d_sae)
    where = lab(cache, runs, preset, config, set_, no_ce, device, threads, offline)
    folder_ = results_folder(out, "alignment")
    known = [what for what in BY if what in chosen]
    dataset = dataset_of(where, activations)
    finish(stage.alignment(base, dataset, where, by=known, weights=pulls, seeds=seeds or 3), folder_, json)
