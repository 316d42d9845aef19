"""`sae study`: questions that take many dictionaries, a command each. Every one leaves a table, a plot and JSON.

The commands are made of what the classes of the studies say: name, help, and an option for every setting.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sae.pipeline.commands.described import studies
from sae.pipeline.commands.options import Here, Json, NoCe, Said, Seeds, complete_store, expanded, here_with, said_of
from sae.pipeline.commands.words import Command
from sae.pipeline.declared import Declared

# One option a line: this is the manual.
# fmt: off
Store = Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activation store: key, beginning of a key, or path. Default: what the last harvest made.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default=False, help="Folder of table.csv, plot.png and results.json. Default: `studies/` and the study's name, here.")]
# fmt: on


class Studies(TyperGroup):
    """The commands of `sae study`: whatever studies there are."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {**self.commands, **{name: command_of(name, study) for name, study in studies().items()}}


app = typer.Typer(
    cls=Studies,
    help="Train and judge the dictionaries that a question takes, and put them in a table and a plot. Runs are named by "
    "their settings: said again, a study trains and judges only what is missing.",
    no_args_is_help=True,
)


@app.callback()
def group() -> None:
    pass


def command_of(name: str, study: Declared) -> Any:
    """The command of a study: its own options first, then those that all studies have."""
    own = [f"study.{name}.{key}" for key in study.settings]
    sizes = [f"train.sae.{key}" for key in study.values.get("dictionary", ("arch", "k", "d_sae"))]

    def command(
        *,
        said: Annotated[Said, said_of(*own, *sizes, "train.steps", "train.rows")], seeds: Seeds = None, activations: Store = None,
        no_ce: NoCe = False, out: Out = None,
        here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
    ) -> None:  # fmt: skip
        from sae.pipeline.commands import console
        from sae.pipeline.commands.study_lab import dataset_of, finish, lab, results_folder, settings_of_study, training
        from sae.pipeline.studies.study import Setup

        chosen = settings_of_study(name, said)
        base, sae = training(chosen, said)
        where = lab(here, said, cross_entropy=not no_ce)
        folder = results_folder(out, name)
        dataset = dataset_of(where, activations, any_of_the_last=chosen.any_store)
        result = chosen.run(Setup(base, dataset, where, seeds, sae))
        finish(result, folder, json, chosen.lines(result, plain=console.out.options.ascii_only))

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
    alone.command(name, cls=Command, help=study.help)(expanded(command))
    return typer.main.get_command(alone)
