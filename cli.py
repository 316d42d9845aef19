"""sae: run a language model once, keep its activations, train and judge sparse autoencoders from them.

Each command opens what it needs, calls one stage, and prints. Heavy imports happen inside the commands.
"""

import os
import sys
import traceback
from dataclasses import asdict
from enum import IntEnum
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any

import typer

import cli_cache
import cli_runs
import cli_studies
import cli_synthetic
from cache.errors import SaeError
from cache.places import outage
from cli_cache import show_stores
from cli_options import (
    CacheRoot,
    ConfigFile,
    Device,
    Json,
    Offline,
    Preset,
    RunName,
    RunsRoot,
    Scheduler,
    Set,
    TrainingStore,
    cache_root,
    complete_store,
    count,
    folder,
    settings,
    several,
    unfinished,
)

app = typer.Typer(
    help="Run a language model once, keep its activations in a compact, shuffled, crash-safe cache, and train and judge "
    "any number of sparse autoencoders from it.\n\nFour stages: `tokenize`, `harvest`, `train`, `eval`. Each takes up "
    "what the one before it left on disk and says what it picked, so their names alone are enough:\n\n"
    "    sae tokenize && sae harvest && sae train && sae eval\n\n"
    "That is GPT-2 small on FineWeb. Offline and curious? `sae demo`. What there is to choose from: `sae list`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_studies.app, name="study")


class Exit(IntEnum):
    """Exit codes: 2 the user's input (and SaeError), 3 damaged data (DamagedStore), 1 our bug, 130 Ctrl-C."""

    BUG = 1
    USAGE = 2
    INTERRUPTED = 130


@app.command()
def tokenize(
    source: Annotated[str | None, typer.Option(metavar="SOURCE", help="fineweb, python (the text that ships with Python), org/name on the hub, or local parquet, jsonl, txt files, folders, globs. Default: fineweb.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="gpt2 or another tiktoken encoding, tiny (embedded), a Hugging Face folder, or hf:org/name. Default: gpt2.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens in a context. Default: 128.")] = None,
    tokens: Annotated[str | None, count("Training tokens wanted, rounded up to a whole window. Default: 10M.")] = None,
    packing: Annotated[str | None, typer.Option(metavar="RULE", help="concat: documents end to end; document: none shares a context with another. Default: concat.")] = None,
    validation: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of the documents, chosen by hash, that is kept for validation. Default: 0.05.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the document shuffle. Default: 0.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that encode; 1: this one alone. Default: one a core.")] = None,
    scheduler: Scheduler = None,
    cache: CacheRoot = None, offline: Offline = False, preset: Preset = None, config: ConfigFile = None,
    set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Turn text into token stores: training and validation, no document in both.

    FineWeb through GPT-2's encoding, 10 million tokens in contexts of 128, unless options, a preset or a file say
    otherwise. An interrupted run continues where it was; a second call with more `--tokens` grows the same store.

    Examples:

        sae tokenize --tokens 100M
        sae tokenize --source "texts/*.jsonl.gz" --context 256 --tokens all
        sae tokenize --preset tiny        # offline
    """
    import console
    from cache import catalogue
    from pipeline.tokenize import TokenizeConfig
    from pipeline.tokenize import tokenize as stage

    values = settings(
        "tokenize", TokenizeConfig, preset, config, set_,
        source=source, tokenizer=tokenizer, context=context, tokens=tokens, packing=packing, validation=validation,
        seed=seed,
    )  # fmt: skip
    root, bars = cache_root(cache), console.Bars()
    together = team(workers, scheduler, os.cpu_count() or 1)
    result = stage(values, root, bars, workers=together, scheduler=scheduler, offline=offline)
    catalogue.remember(root, "tokens", [result.stores["train"].key])
    if not bars.worked:
        bars.note("nothing to do: the tokens asked for were there already")
    show_stores(list(result.stores.values()), json, "tokens", lambda store: store.n_tokens)


@app.command()
def harvest(
    model: Annotated[str | None, typer.Option(metavar="NAME", help="gpt2, any hub model transformer_lens boots, a local Hugging Face folder, or tiny (embedded). Default: gpt2.")] = None,
    layer: Annotated[str | None, typer.Option(metavar="N,...", help="Layers, from 0: one, or several as 4,6,8. Default: 6.")] = None,
    site: Annotated[str | None, typer.Option(metavar="NAME,...", help="Sites: one, or several as resid_post,mlp_out; `sae list` explains each. Default: mlp_out.")] = None,
    codec: Annotated[str | None, typer.Option(metavar="NAME", help="int8, bfloat16, float16 or float32; with settings as int8:step=0.11. Default: int8.")] = None,
    tokens: Annotated[str | None, count("Training tokens to run. Default: all.")] = None,
    tokens_from: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Token store: key, beginning of a key, or path. Default: the last one made.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only say how many rows, bytes and minutes it would take.")] = False,
    wait: Annotated[bool, typer.Option("--wait", metavar="", help="Wait where another process is writing the same store.")] = False,
    workers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that run the model, each with a copy of it and its share of the cores. Default: 1, this one alone.")] = None,
    scheduler: Scheduler = None,
    device: Device = "auto", cache: CacheRoot = None, offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Run the model over a token store and keep its activations: one pass, one store for each layer and site.

    GPT-2 small, MLP output of block 6, over the tokens made last, unless options, a preset or a file say otherwise. The
    validation tokens beside them are harvested as well. An interrupted run continues where it was; a second call for
    more tokens grows the same stores.

    Examples:

        sae harvest --layer 6 --site mlp_out --dry-run
        sae harvest --layer 4,6,8 --site resid_post,mlp_out --codec bfloat16
        sae harvest --model my-llama/ --layer 2 --site resid_post --offline
        sae harvest --set harvest.dtype=bfloat16 --set "harvest.rows.positions=[1,64]"
        sae harvest --scheduler tcp://10.0.0.7:8786
    """
    import console
    from cache import catalogue
    from cache.tokens import TokenStore
    from pipeline.harvest import HarvestConfig
    from pipeline.harvest import harvest as stage

    values = settings(
        "harvest", HarvestConfig, preset, config, set_,
        model=model, layer=several(layer), site=several(site), codec=codec, tokens=tokens,
    )  # fmt: skip
    together = team(workers, scheduler, 1)
    root, bars = cache_root(cache), console.Bars()
    train = catalogue.find(root, TokenStore, tokens_from, "--tokens-from", "sae tokenize")
    validation = catalogue.sibling_of(root, train, "validation")
    bars.note(f"tokens: {train.key}{unfinished(train)}")
    stores = [train, *([validation] if validation is not None and validation.n_contexts else [])]
    result = stage(
        values, stores, root, bars, device=device, offline=offline, dry_run=dry_run, wait=wait,
        workers=together, scheduler=scheduler,
    )  # fmt: skip
    if dry_run:
        show_plans([asdict(plan) for plan in result.plans], json)
        return
    catalogue.remember(root, "activations", [store.key for store in result.stores["train"]])
    if not bars.worked:
        bars.note("nothing to do: the rows asked for were there already")
    show_stores([s for split in result.stores.values() for s in split], json, "width", lambda store: store.d)


app.command()(cli_synthetic.synthesize)
app.command()(cli_runs.train)


@app.command("eval")
def evaluate(
    run: Annotated[str | None, RunName] = None,
    rows: Annotated[str | None, count("Held-out rows to judge reconstruction on. Default: all.")] = None,
    tokens: Annotated[str | None, count("Held-out tokens to judge cross-entropy on. Default: 65536.")] = None,
    activations: TrainingStore = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model is now. Default: where harvest found it.")] = None,
    device: Device = "auto", cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False,
    preset: Preset = None, config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Judge a trained dictionary on held-out documents: reconstruction, cross-entropy when spliced in, dead latents.

    Prints the figures with what each means, and writes them into the run folder (`eval/eval.json`). On rows of
    `sae synthesize`, which no language model made, it says instead how many of the true features were found.

    Examples:

        sae eval
        sae eval l1-first --tokens 500k --json
    """
    import console
    from cache import catalogue
    from pipeline.evaluate import EvalConfig
    from pipeline.evaluate import evaluate as stage

    values = settings("eval", EvalConfig, preset, config, set_, rows=rows, tokens=tokens)
    root, bars = cache_root(cache), console.Bars()
    found = catalogue.find_run(folder("--runs", runs), run)
    bars.note(f"run: {found.path}")
    result = stage(values, found, root, bars, activations=activations, model=model, device=device, offline=offline)
    if json:
        console.as_json(result.as_json())
    else:
        console.evaluation(result.as_json(), f"run {found.path}")


@app.command()
def report(
    run: Annotated[str | None, RunName] = None,
    latents: Annotated[str | None, typer.Option(metavar="N,...", help="Latents to show, as 3,17,256. Default: the strongest few and a sample of the others.")] = None,
    rows: Annotated[str, count("Rows to search for contexts. Default: 262144.")] = "262144",
    activations: TrainingStore = None,
    device: Device = "auto", cache: CacheRoot = None, runs: RunsRoot = Path("runs"), json: Json = False,
) -> None:  # fmt: skip
    """Write a page to look at: losses, densities, cross-entropies and the text that latents fire on. One HTML file.

    Needs no language model; shows what `sae eval` found, where it has run.

    Examples:

        sae report
        sae report l1-first --latents 3,17,256
    """
    import console
    from cache import catalogue
    from pipeline.report.features import FeaturesConfig
    from pipeline.report.stage import report as stage

    values = settings("report", FeaturesConfig, None, None, None, latents=several(latents), rows=rows)
    root, bars = cache_root(cache), console.Bars()
    found = catalogue.find_run(folder("--runs", runs), run)
    bars.note(f"run: {found.path}")
    path = stage(found, root, bars, config=values, activations=activations, device=device)
    if json:
        console.as_json({"run": str(found.path), "report": str(path)})
    else:
        console.say(f"report: {path}")


app.command()(cli_runs.compare)


@app.command()
def demo(
    workers: Annotated[int, typer.Option(metavar="N", min=1, show_default=False, help="Processes that encode text. Default: 1.")] = 1,
    device: Device = "auto", cache: CacheRoot = None, runs: RunsRoot = Path("runs"), set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """All four stages and a report on the embedded default: real text, a small real model, no network, two minutes.

    The `tiny` preset through the same stages that the commands run. Repeated, it does not do finished ones again.

    Examples:

        sae demo
        sae demo --set train.steps=4000 --json
    """
    import console
    from pipeline import devices
    from pipeline.demo import demo as stage

    devices.device(device)
    root, bars = cache_root(cache), console.Bars()
    result = stage(root, folder("--runs", runs), bars, overrides=set_ or [], device=device, workers=workers)
    if json:
        console.as_json(result)
        return
    console.evaluation(result, f"run {result['run']}")
    console.table("seconds", list(result["seconds"]), [list(result["seconds"].values())])
    console.say(f"report: {result['report']}")


@app.command("list")
def list_(runs: RunsRoot = Path("runs"), json: Json = False) -> None:
    """What there is to choose from: runs, architectures, codecs, sites, sources, presets.

    Example: `sae list --json`.
    """
    import console
    from pipeline.choices import choices

    found = choices(folder("--runs", runs))
    if json:
        console.as_json(found)
        return
    for title, entries in found.items():
        rows = [[entry["name"], entry["help"]] for entry in entries] or [["none yet", f"{runs} is where they would be"]]
        console.table(title, ["name", "what it is"], rows, prose=title != "runs")


def team(workers: int | None, scheduler: str | None, usual: int) -> int:
    """How many processes are to work on this machine, where no scheduler says who works."""
    if workers is not None and scheduler is not None:
        raise SaeError(f"--workers {workers}: a scheduler brings its own workers; give --workers or --scheduler")
    return workers or usual


def show_plans(plans: list[dict[str, Any]], json: bool) -> None:
    """What a harvest would do: a table or JSON."""
    import console

    if json:
        console.as_json({"plans": plans})
        return
    rows = [[p["split"], p["rows"], p["rows_to_do"], console.size(p["stored_bytes"]), p["seconds"] or 0] for p in plans]
    console.table("what harvest would do", ["split", "rows", "rows to write", "size", "seconds"], rows)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if not wanted:
        return
    try:
        typer.echo(f"sae {package_version('sae-cache')}")
    except PackageNotFoundError:
        typer.echo("sae, run from its source without being installed")
    raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def misused(error: typer.TyperException) -> str:
    """What is wrong with a command line, in one line: the option, the value, what to try."""
    context, param = getattr(error, "ctx", None), getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and param is not None and error.message:
        problems: list[Any] = getattr(error.__cause__, "errors", list)()  # pydantic's, where it is typer that refused
        value = f"{problems[0]['input']}: " if problems else ""
        names = [name for name in param.opts if name.startswith("--")] or [param.name]
        variable = f" (or {param.envvar})" if param.envvar else ""
        return f"{names[0]}{variable} {value}{error.message[:1].lower()}{error.message[1:]}"
    if similar := getattr(error, "possibilities", None):
        return f"{error.message[:1].lower()}{error.message[1:]}; did you mean {' or '.join(similar)}?"
    wrong = error.format_message().strip().rstrip(".").replace(". Did", "; did")
    command = context.command_path if context is not None else "sae"
    return f"{wrong[:1].lower()}{wrong[1:]}" + ("" if wrong.endswith("?") else f"; `{command} --help` tells more")


def out_of_memory(error: Exception) -> bool:
    """Whether Python, torch or CUDA ran out of memory."""
    torch_says = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or torch_says


def main() -> None:
    """Entry point of the `sae` command: runs it and turns every error into one line and an exit code."""
    import console

    try:
        code = app(standalone_mode=False, prog_name="sae")
        if code == Exit.INTERRUPTED:  # typer's own answer to Ctrl-C
            raise KeyboardInterrupt
    except SaeError as error:
        console.complain(str(error))
        sys.exit(error.exit_code)
    except typer.TyperException as error:
        if error.format_message().strip():  # without one, the help was shown instead
            console.complain(misused(error))
        sys.exit(Exit.USAGE)
    except KeyboardInterrupt:
        console.complain(
            "interrupted; what was committed is safe, repeat the command (`sae train` with --resume) to continue"
        )
        sys.exit(Exit.INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the last resort: show it whole and say what to do
        if (said := outage(error)) is not None:
            console.complain(f"the remote filesystem failed ({said}); what was committed is safe, repeat the command")
            sys.exit(Exit.USAGE)
        if out_of_memory(error):
            console.complain("not enough memory; ask for less at once, as with --batch, --d-sae or --device cpu")
            sys.exit(Exit.USAGE)
        traceback.print_exc()
        console.complain("this is a bug; please report the lines above with the command that caused them")
        sys.exit(Exit.BUG)
    sys.exit(code)


if __name__ == "__main__":
    main()
