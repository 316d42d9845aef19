"""`sae probe`: what labels of texts a few latents tell."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sae.pipeline.commands.options import Here, Json, Said, complete_run, here_with, said_of
from sae.pipeline.commands.words import several

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae.pipeline.studies.tables import Result


def probe(
    *,
    probed: Annotated[list[str] | None, typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folders or their names. Default: the newest finished run.")] = None,
    data: Annotated[list[Path] | None, typer.Option(metavar="FILE", show_default=False, help="Labelled texts: CSV, JSON lines or parquet. Repeatable.")] = None,
    sae_probes: Annotated[Path | None, typer.Option("--sae-probes", metavar="PATH", show_default=False, help="The sets of the package sae-probes, in its wheel or a folder; its data is read, nothing of it is run.")] = None,
    sets: Annotated[str | None, typer.Option(metavar="NAME,...", show_default=False, help="Which of these, by name or number. Default: all whose labels are classes.")] = None,
    said: Annotated[Said, said_of("probe.text_column", "probe.label_column", "probe.pool", "probe.ks", "probe.splits", "probe.texts", "probe.max_tokens")],
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model is now. Default: where harvest found it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="Where its tokenizer is now. Default: where tokenize found it.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", show_default=False, help="Folder of table.csv, plot.png and results.json. Default: `studies/probing`, here.")] = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """What labels of texts k latents tell (k-sparse probing), beside the activations themselves, random latents and the
    majority class.

    The language model that the run's rows came from reads the texts; latents are chosen and a logistic regression is
    fitted on training texts, and scored on others. Several runs of one model share its pass. Takes scikit-learn
    (`pip install "sae-cache[probing]"`).

    Examples:

        sae probe --data reviews.csv --label-column sentiment
        sae probe topk-8192 batchtopk-8192 --data topics.jsonl --ks 1,5 --pool last
        sae probe topk-8192 --sae-probes sae_probes-0.4.2-py3-none-any.whl --sets 96_spam_is,105 --json
    """
    from sae.cache import catalogue
    from sae.cache.errors import SaeError
    from sae.pipeline.commands.study_lab import results_folder, tell

    found = [catalogue.find_run(here.runs, name) for name in probed or (None,)]
    if sets is not None and sae_probes is None:
        raise SaeError(f"sets = {sets}: are those of `sae_probes`, which is not given")
    if not data and sae_probes is None:
        raise SaeError("data: no labelled texts; name a file with `data`, or the wheel with `sae_probes`")
    folder = results_folder(out, "probing")
    with here.loading_torch():
        from sae.pipeline.probing import labelled
        from sae.pipeline.probing.config import ProbeConfig
        from sae.pipeline.probing.probes import FIGURES
        from sae.pipeline.probing.stage import probe as stage

    config = said.settings("probe", ProbeConfig)
    chosen = several("--sets", sets)
    texts = labelled.sets_of(data or (), sae_probes, chosen, (config.text_column, config.label_column))
    for run in found:
        here.progress.note(f"run: {run.path}")
    result = stage(
        config, found, texts, here, model=model, tokenizer=tokenizer,
        leave_out_numbers=sae_probes is not None and chosen is None,
    )  # fmt: skip
    tell(result, folder, json, lambda: _show(result, FIGURES))


def _show(result: "Result", figures: "Sequence[str]") -> None:
    from sae.pipeline.commands import console

    several_sets = len({row["set"] for row in result.table}) > 1
    rows = result.extra["means"] if several_sets else result.table
    for dictionary in dict.fromkeys(row["dictionary"] for row in rows):
        its = [row for row in rows if row["dictionary"] == dictionary]
        on = f"mean over {its[0]['sets']} sets" if several_sets else f"{its[0]['texts']:,} texts of {its[0]['set']}"
        cells = [
            [row["probe"], row["k"], *(_shown(row[name], row.get(f"{name}_sd")) for name in figures)] for row in its
        ]
        console.table(f"{dictionary}: {on}", ["probe", "k", *figures], cells)


def _shown(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"
