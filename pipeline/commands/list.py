"""`sae list`: what there is to choose from."""

from pathlib import Path
from typing import TYPE_CHECKING

from sae.pipeline.commands.options import (
    Json,
    RunsRoot,
    folder,
)
from sae.pipeline.commands.shown import report_damage

if TYPE_CHECKING:
    pass


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
