"""sae: run a language model once, keep its activations, train and judge sparse autoencoders from them.

Puts the commands together, and turns every error into one line and an exit code.
"""

import signal
import traceback
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sae.cache.disk.paths import outage
from sae.cache.errors import SaeError
from sae.pipeline.commands import cache, study, synthesize
from sae.pipeline.commands.analyze import analyze
from sae.pipeline.commands.compare import compare
from sae.pipeline.commands.decompose import decompose
from sae.pipeline.commands.demo import demo
from sae.pipeline.commands.described import studies
from sae.pipeline.commands.evaluate import evaluate
from sae.pipeline.commands.explain import explain
from sae.pipeline.commands.export import export
from sae.pipeline.commands.harvest import harvest
from sae.pipeline.commands.import_ import import_
from sae.pipeline.commands.list import list_
from sae.pipeline.commands.match import match
from sae.pipeline.commands.options import expanded
from sae.pipeline.commands.probe import probe
from sae.pipeline.commands.pull import pull
from sae.pipeline.commands.push import push
from sae.pipeline.commands.report import report
from sae.pipeline.commands.show import show
from sae.pipeline.commands.steer import steer
from sae.pipeline.commands.tokenize import tokenize
from sae.pipeline.commands.train import train
from sae.pipeline.commands.voice import options_here
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
app.add_typer(cache.app, name="cache")
app.add_typer(study.app, name="study")
app.add_typer(synthesize.app, name="synthesize")


LESS = ("--batch", "--d-sae", "--devices", "--workers", "--device cpu")
"""What takes less memory, where a command has it."""


class Exit(IntEnum):
    """Exit codes: 2 the user's input (and SaeError), 3 damaged data (DamagedStore), 1 our bug, 128 and its number a signal."""

    BUG = 1
    USAGE = 2
    INTERRUPTED = 130


VERBS: dict[str, Callable[..., None]] = {
    "tokenize": tokenize,
    "harvest": harvest,
    "train": train,
    "decompose": decompose,
    "eval": evaluate,
    "analyze": analyze,
    "probe": probe,
    "match": match,
    "report": report,
    "show": show,
    "steer": steer,
    "explain": explain,
    "compare": compare,
    "import": import_,
    "export": export,
    "push": push,
    "pull": pull,
    "demo": demo,
    "list": list_,
}
for verb, command in VERBS.items():
    app.command(verb)(expanded(command))


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
    """Return what is wrong with a command line, in one line: the option, the value, what to try."""
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
    """Return True if Python, torch or CUDA ran out of memory."""
    torch_says = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or torch_says


def less_at_once() -> str:
    """Return what to try where memory ran out: options that the command has."""
    here = options_here()
    *others, last = ["", *(one for one in LESS if one.partition(" ")[0] in here)]
    how = f"{', '.join(others[1:])}{' or ' if others[1:] else ''}{last}"
    return "ask for less at once" + (f", as with {how}" if how else "")


for group in (app, cache.app, synthesize.app):
    for registered in group.registered_commands:
        registered.cls = Command


def tree() -> Any:
    """Return all commands as typer makes them of their functions: once, and anew when a study has been registered."""
    return _tree(tuple(studies()))


@lru_cache(maxsize=1)
def _tree(studies: tuple[str, ...]) -> Any:
    return typer.main.get_command(app)


def run() -> int:
    """Do what the command line says; every error becomes one line. Returns the exit code; Interrupted passes through."""
    from sae.pipeline.commands import console

    console.spell_what_has_no_letter()
    try:
        code = tree()(standalone_mode=False, prog_name="sae")
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
            console.complain(f"not enough memory; {less_at_once()}")
            return Exit.USAGE
        traceback.print_exc()
        console.complain("this is a bug; please report the lines above with the command that caused them")
        return Exit.BUG
    return int(code or 0)
