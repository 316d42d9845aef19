"""sae: run a language model once, keep its activations, train and judge sparse autoencoders from them.

Puts the commands together, and turns every error into one line and an exit code.
"""

import signal
import traceback
from enum import IntEnum
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sae.cache.disk.paths import outage
from sae.cache.errors import SaeError
from sae.pipeline.commands import judging, looking, making, runs, studies
from sae.pipeline.commands.options import CacheRoot, Device, Json, RunsRoot, Set, Threads, cache_root, folder
from sae.pipeline.commands.upkeep import report_damage
from sae.pipeline.commands.words import Command
from sae.pipeline.runtime.interrupts import Interrupted


class Commands(TyperGroup):
    """The commands. An interruption is what they return: raised, typer would keep no more of it than that it came."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as stop:
            return stop


app = typer.Typer(
    cls=Commands,
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
app.add_typer(looking.app, name="cache")
app.add_typer(studies.app, name="study")


class Exit(IntEnum):
    """Exit codes: 2 the user's input (and SaeError), 3 damaged data (DamagedStore), 1 our bug, 128 and its number a signal."""

    BUG = 1
    USAGE = 2
    INTERRUPTED = 130


app.command()(making.tokenize)
app.command()(making.harvest)
app.command()(making.synthesize)
app.command()(runs.train)
app.command("eval")(judging.evaluate)
app.command()(judging.report)
app.command()(runs.compare)


@app.command()
def demo(
    workers: Annotated[int, typer.Option(metavar="N", min=1, show_default=False, help="Processes that encode text. Default: 1.")] = 1,
    device: Device = "auto", threads: Threads = None, cache: CacheRoot = None, runs: RunsRoot = Path("runs"), set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """All four stages and a report on the embedded default: real text, a small real model, no network, two minutes.

    The `tiny` preset through the same stages that the commands run. Repeated, it does not do finished ones again.

    Examples:

        sae demo
        sae demo --set train.steps=4000 --json
    """
    from sae.pipeline.commands import console
    from sae.pipeline.runtime.progress import said_if_slow

    root, bars = cache_root(cache), console.Bars()
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.commands.demo import demo as stage
        from sae.pipeline.runtime import devices

    devices.device(device)
    devices.take_threads(threads, bars.note)
    result = stage(root, folder("--runs", runs), bars, overrides=set_ or [], device=device, workers=workers)
    if json:
        console.as_json(result)
        return
    console.evaluation(result, f"run {result['run']}")
    console.table("seconds", list(result["seconds"]), [list(result["seconds"].values())])
    console.say(f"report: {result['report']}")


@app.command("list")
def list_(runs: RunsRoot = Path("runs"), json: Json = False) -> None:
    """What there is to choose from: runs, architectures, codecs, formats, sites, sources, presets.

    Exit code 3 where a run cannot be read; the others are listed all the same.

    Example: `sae list --json`.
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console
    from sae.pipeline.commands.registry_listing import choices

    there, damage = catalogue.readable_runs(folder("--runs", runs))
    found = choices(there)
    if json:
        console.as_json(found)
    for title, entries in {} if json else found.items():
        rows = [[entry["name"], entry["help"]] for entry in entries] or [["none yet", f"{runs} is where they would be"]]
        console.table(title, ["name", "what it is"], rows, prose=True)
    report_damage(damage)


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
        names = [name for name in param.opts if name.startswith("--")] or [param.metavar or param.name]
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


for group in (app, looking.app, studies.app):
    for registered in group.registered_commands:
        registered.cls = Command


def run() -> int:
    """Do what the command line says; every error becomes one line. Returns the exit code; Interrupted passes through."""
    from sae.pipeline.commands import console

    try:
        code = app(standalone_mode=False, prog_name="sae")
        if isinstance(code, Interrupted):
            raise code
        if code == Exit.INTERRUPTED:  # typer's own answer, where it came before any command
            raise Interrupted(signal.SIGINT)
    except SaeError as error:
        console.complain(str(error))
        return error.exit_code
    except typer.TyperException as error:
        if error.format_message().strip():  # without one, the help was shown instead
            console.complain(misused(error))
        return Exit.USAGE
    except Exception as error:  # noqa: BLE001 - the last resort: show it whole and say what to do
        if (said := outage(error)) is not None:
            console.complain(f"the remote filesystem failed ({said}); what was committed is safe, repeat the command")
            return Exit.USAGE
        if out_of_memory(error):
            console.complain("not enough memory; ask for less at once, as with --batch, --d-sae or --device cpu")
            return Exit.USAGE
        traceback.print_exc()
        console.complain("this is a bug; please report the lines above with the command that caused them")
        return Exit.BUG
    return int(code or 0)
