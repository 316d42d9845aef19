"""`sae cache gc`: finds what nobody needs and removes it."""

import re
from pathlib import Path
from typing import Annotated

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import CacheRoot, Json, RunsRoot, Yes, cache_root, folder
from sae.pipeline.commands.shown import report_damage

SPANS = {"h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}


def span(text: str) -> float:
    """A length of time in seconds: 12h, 30d, 2w."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]+)?)([hdw])", text)
    if found is None:
        raise typer.BadParameter(f"{text}: is not a length of time; write 12h, 30d or 2w")
    return float(found[1]) * SPANS[found[2]]


def gc(
    older_than: Annotated[float, typer.Option(parser=span, metavar="TIME", show_default=False, help="Age from which a store that no run uses is not needed. Write 12h, 30d or 2w. Default: 30d.")] = "30d",  # type: ignore[assignment]
    yes: Yes = False, cache: CacheRoot = None, runs: RunsRoot = Path("runs"), json: Json = False,
) -> None:  # fmt: skip
    """List what nothing needs, and with `--yes` remove it.

    That is what crashes left (temporary files of stores and runs, chunks that were never committed, folders without a
    recipe, halves of exports), and stores
    that no run in `--runs` was trained on, that no last command made, on which no needed store is built, and that are
    old, or were never completed and not continued for a day. A store somebody is writing is never touched. Where there
    is no folder of runs, nobody knows which stores are needed: then none is listed.

    Examples:

        sae cache gc
        sae cache gc --older-than 2w --runs experiments --yes
    """
    from sae.cache import catalogue
    from sae.cache.upkeep import garbage, loose, removing
    from sae.pipeline.commands import console
    from sae.pipeline.commands.bars import Bars

    root, runs, bars = cache_root(cache), folder("--runs", runs), Bars()
    removing.finish(root)
    used, damage = catalogue.readable_runs(runs, all_tools=True, decompositions=True) if runs.is_dir() else (None, [])
    if damage:
        used = None
        bars.note("a run cannot be read, so which stores are needed is not known, and only remains are looked for")
    elif used is None:
        bars.note(
            f"--runs {runs}: is not there, so which stores are needed is not known, and only remains are looked for"
        )
    found = [*garbage.survey(root, used, older_than), *loose.survey(root, runs if runs.is_dir() else None)]
    busy = []
    freed = 0
    for one in found if yes else ():
        try:
            freed += one.remove()
        except SaeError as error:
            busy.append(str(error))
    total = sum(one.bytes for one in found)
    if json:
        console.as_json({"garbage": [one.as_json() for one in found], "bytes": total, "freed": freed, "busy": busy})
        report_damage(damage)
        return
    if found:
        rows = [
            [one.path.name, len(one.files) if one.files else "all", console.size(one.bytes), one.why] for one in found
        ]
        console.table(str(root), ["folder", "files", "size", "why"], rows)
    if not found:
        console.say("nothing to remove")
    elif yes:
        console.say(f"freed {console.size(freed)}")
    else:
        console.say(f"{console.size(total)} nobody needs; --yes removes them")
    for line in busy:
        bars.note(line)
    report_damage(damage)
