"""`sae match`: dictionaries against each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.pipeline.commands.options import Here, Json, Said, complete_run, here_with, said_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae.pipeline.studies.tables import Result


def match(
    *,
    matched: Annotated[list[str], typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folders or their names, two or more.")],
    said: Annotated[Said, said_of("match.correlate", "match.living", "match.rows")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default=False, help="Folder of table.csv, plot.png and results.json. Default: `studies/match`, here.")] = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs")], json: Json = False,
) -> None:  # fmt: skip
    """How alike dictionaries are, each with each: seeds, layers, architectures.

    The decoder rows of one are matched with those of the other, each with its best (MMCS, both ways) and one to one
    (Hungarian), beside what random directions give; of several runs, which latents all of them found. `--correlate`
    compares when latents fire, also where directions do not compare.

    Examples:

        sae match seed-0 seed-1
        sae match seed-0 seed-1 seed-2 --living --json
        sae match layer-4 transcoder-4 --correlate --rows 50k
    """
    from sae.cache import catalogue
    from sae.pipeline.commands.study_lab import results_folder, tell

    found = [catalogue.find_run(here.runs, name) for name in matched]
    folder = results_folder(out, "match")
    with here.loading_torch():
        from sae.pipeline.matching.config import MatchConfig
        from sae.pipeline.matching.pairs import MEANINGS
        from sae.pipeline.matching.stage import match as stage

    result = stage(said.settings("match", MatchConfig), found, here)
    tell(result, folder, json, lambda: _show(result, MEANINGS))


def _show(result: "Result", meanings: "Mapping[str, str]") -> None:
    from sae.pipeline.commands import console

    for row in result.table:
        figures = {name: value for name, value in row.items() if name not in result.labels}
        console.figures(f"{row['a']} (a) and {row['b']} (b)", figures, meanings)
    stable = result.extra["stability"]
    if len(stable) > 2:
        console.table(
            "latents that all others have found, too", ["run", "mean", "above 0.7", "above 0.9"],
            [[name, one["mean"], one["in_all_07"], one["in_all_09"]] for name, one in stable.items()],
        )  # fmt: skip
