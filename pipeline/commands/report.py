"""`sae report`: a run folder to a page to look at."""

from typing import Annotated

from sae.pipeline.commands.options import Here, Json, RunName, Said, TrainingStore, here_with, said_of


def report(
    *,
    run: Annotated[str | None, RunName] = None,
    said: Annotated[Said, said_of("report.latents", "report.rows")],
    activations: TrainingStore = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs")], json: Json = False,
) -> None:  # fmt: skip
    """Write a page to look at: losses, densities, cross-entropies and the text that latents fire on. One HTML file.

    Needs no language model; shows what `sae eval` found, where it has run.

    Examples:

        sae report
        sae report l1-first --latents 3,17,256
        sae report --set report.top=16 --set report.before=40
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    found = catalogue.find_run(here.runs, run)
    with here.loading_torch():
        from sae.pipeline.interpret.features import FeaturesConfig
        from sae.pipeline.report.stage import report as stage

    values = said.settings("report", FeaturesConfig)
    here.progress.note(f"run: {found.path}")
    path = stage(found, here.cache, here.progress, config=values, activations=activations, device=here.device)
    if json:
        console.as_json({"run": str(found.path), "report": str(path)})
    else:
        console.say(f"report: {path}")
