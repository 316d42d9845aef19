"""`sae compare`: runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from sae.cache.disk.durable import expect_writable, write_atomic
from sae.pipeline.commands.options import Json, RunsRoot, as_csv_file, complete_run, folder
from sae.pipeline.commands.shown import report_damage, show_runs
from sae.pipeline.commands.words import several


def compare(
    names: Annotated[list[str] | None, typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folders or their names. Default: all under `--runs` that have figures.")] = None,
    over_seeds: Annotated[bool, typer.Option("--over-seeds", metavar="", help="One row for runs that differ in the seed alone: mean and standard deviation.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", show_default=False, help="Where the plot goes: .png, .svg or .pdf. Default: `compare.png` beside the runs.")] = None,
    x: Annotated[str, typer.Option(metavar="COST", show_default=False, help="What the plot's figures are set against: l0, active_parameters or bits. Default: l0.")] = "l0",
    y: Annotated[str | None, typer.Option(metavar="FIGURE,...", show_default=False, help="What the plot sets against that. Default: fvu,ce_degradation.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", show_default=False, help="Write the table as CSV, too.")] = None,
    runs: RunsRoot = Path("runs"), json: Json = False,
) -> None:  # fmt: skip
    """Runs side by side: the settings they differ in, their figures, and L0 against FVU and cross-entropy as a plot.

    Of kinds whose L0 says different things, `--x active_parameters` counts the parameters that a row brings into play,
    and `--x bits` what its codes cost; decompositions have both with their active components alone.
    Figures on held-out documents are those `sae eval` found, with the amounts they were judged on where those differ;
    the ones of the last training batch have names of their own (`train_fvu`).

    Examples:

        sae compare
        sae compare topk-8192 batchtopk-8192 --plot front.svg
        sae compare --x bits
        sae compare --over-seeds --csv table.csv --json
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console
    from sae.pipeline.report import compare as stage
    from sae.pipeline.report.plots import absent, expect_drawn, expect_plot, panels_of, pareto

    root = folder("--runs", runs)
    csv = None if csv is None else as_csv_file("--csv", csv)
    names = list(dict.fromkeys(names or ()))
    found, damage = (
        ([catalogue.find_run(root, name, decompositions=True) for name in names], [])
        if names
        else catalogue.readable_runs(root, decompositions=True)
    )
    chosen = found if names else [run for run in found if run.finished]
    if not chosen:
        report_damage(damage)
    path, drawn = plot or root / "compare.png", several("--y", y)
    expect_plot(path)
    expect_drawn(drawn or (), x)
    for wanted in (path, csv):
        if wanted is not None:
            expect_writable(wanted)
    rows = stage.compare(chosen)
    pareto(rows, path, drawn, x)
    left_out = absent(rows, panels_of(rows, drawn, x))
    notes = [
        *stage.notes(rows),
        *stage.outdated(chosen),
        *([f"not in all of the plot: {left_out}"] if left_out else []),
    ]
    rows = stage.over_seeds(rows) if over_seeds else rows
    if csv is not None:
        write_atomic(csv, stage.as_csv(rows).encode())
    for note in notes:
        console.note(note)
    show_runs(rows, f"{len(chosen)} runs in {root}", json, plot=str(path))
    report_damage(damage)
