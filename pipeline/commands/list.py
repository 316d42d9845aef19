"""`sae list`: what there is to choose from."""

from pathlib import Path
from typing import Annotated

import typer

from sae.pipeline.commands.options import Json, RunsRoot, folder
from sae.pipeline.commands.shown import report_damage
from sae.pipeline.commands.voice import typed

HEADINGS = ["name", "default", "what it is"]


def list_(
    settings: Annotated[bool, typer.Option("--settings", metavar="", help="Instead, every setting of a YAML file and of `--set`: its name, default and meaning.")] = False,
    runs: RunsRoot = Path("runs"), json: Json = False,
) -> None:  # fmt: skip
    """What there is to choose from: runs, architectures, metrics, studies, formats, sources, codecs, sites, presets.

    Exit code 3 where a run cannot be read; the others are listed all the same.

    Examples: `sae list`, `sae list --settings`, `sae list --json`.
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console
    from sae.pipeline.commands.registry_listing import choices, every_setting

    if settings:
        every = every_setting()
        rows = [[one["name"], one["default"], typed(one["help"])] for one in every]
        console.as_json({"settings": every}) if json else console.table("settings", HEADINGS, rows, prose=True)
        return
    there, damage = catalogue.readable_runs(folder("--runs", runs), decompositions=True)
    found = choices(there)
    if json:
        console.as_json(found)
    for title, entries in {} if json else found.items():
        rows = [[entry["name"], entry["help"]] for entry in entries] or [["none yet", f"{runs} is where they would be"]]
        console.table(title, ["name", "what it is"], rows, prose=True)
    report_damage(damage)
