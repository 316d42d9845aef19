"""`sae study`: questions that take many dictionaries, a command each. Every one leaves a table, a plot and JSON.

The commands are made of what the classes of the studies say: name, help, and an option for every setting.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sae.pipeline.commands.described import Described, DescribedStudy, count_option, studies, study_option
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
from sae.pipeline.commands.words import Command, numbers, several, whole

# One option a line: this is the manual.
# fmt: off
Store = Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activation store: key, beginning of a key, or path. Default: what the last harvest made.")]
Rows = Annotated[str | None, count_option("train.rows")]
NoCe = Annotated[bool, typer.Option("--no-ce", metavar="", help="Leave out cross-entropy: no language model is needed.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default=False, help="Folder of table.csv, plot.png and results.json. Default: `studies/` and the study's name, here.")]
# fmt: on


READERS: dict[str, Callable[[str, str | None], Any]] = {
    "list of int": whole, "list of float": numbers, "list of str": several,
}  # fmt: skip


class Studies(TyperGroup):
    """The commands of `sae study`: whatever studies there are."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {**self.commands, **{study.name: command_of(study) for study in studies()}}


app = typer.Typer(
    cls=Studies,
    help="Train and judge the dictionaries that a question takes, and put them in a table and a plot. Runs are named by "
    "their settings: said again, a study trains and judges only what is missing.",
    no_args_is_help=True,
)


@app.callback()
def group() -> None:
    pass


def carry_out(
    study: DescribedStudy,
    own: Mapping[str, Any],
    arch: Arch = None, k: ActiveLatents = None, d_sae: Latents = None, steps: Steps = None, rows: Rows = None,
    seeds: Seeds = None, activations: Store = None, no_ce: NoCe = False, out: Out = None, device: Device = "auto",
    threads: Threads = None, cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False,
    preset: Preset = None, config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Carry out a study, given the options of its own settings as text and those that all studies have."""
    from sae.pipeline.commands import console
    from sae.pipeline.commands.study_lab import dataset_of, finish, lab, results_folder, settings_of_study, training
    from sae.pipeline.studies.study import Setup

    chosen = settings_of_study(study.name, own, preset, config, set_)
    sizes = {name: value for name, value in {"arch": arch, "k": k, "d_sae": d_sae}.items() if value is not None}
    base = training(chosen, preset, config, set_, steps, rows, {} if chosen.architectures else sizes)
    where = lab(cache, runs, preset, config, set_, no_ce, device, threads, offline)
    folder = results_folder(out, study.name)
    dataset = dataset_of(where, activations, any_of_the_last=chosen.any_store)
    result = chosen.run(Setup(base, dataset, where, seeds, sizes if chosen.architectures else {}))
    finish(result, folder, json, chosen.lines(result, plain=console.out.options.ascii_only))


def command_of(study: DescribedStudy) -> Any:
    """The command of a study: its own options first, then those that all studies have."""
    own = {name: _parameter(study.name, name, setting) for name, setting in study.settings.items()}
    shared = dict(list(inspect.signature(carry_out).parameters.items())[2:])
    for name in {"arch", "k", "d_sae"} - {*study.dictionary}:
        del shared[name]
    assert not own.keys() & shared.keys(), f"study {study.name}: {own.keys() & shared.keys()} is every study's option"

    def command(**given: Any) -> None:
        said = {name: _read(name, study.settings[name], given.pop(name)) for name in own}
        carry_out(study, said, **given)

    command.__signature__ = inspect.Signature([*own.values(), *shared.values()])  # type: ignore[attr-defined]
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    alone.command(study.name, cls=Command, help=study.help)(command)
    return typer.main.get_command(alone)


def _parameter(study: str, name: str, setting: Described) -> inspect.Parameter:
    """The option of a setting: text, but for flags and numbers."""
    kinds: dict[str, Any] = {"bool": bool, "int": int | None, "float": float | None}
    default = study_option(study, name, setting)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=default, annotation=kinds.get(setting.kind, str | None))


def _read(name: str, setting: Described, given: Any) -> Any:
    """What was typed, a list as its items; None where nothing was."""
    if setting.kind == "bool":
        return not setting.default if given else None
    reader = READERS.get(setting.kind)
    return given if reader is None else reader("--" + name.replace("_", "-"), given)
