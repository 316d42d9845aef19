"""`sae report`: a run folder to a page to look at."""

from typing import Annotated

from sae.pipeline.commands.options import Here, Json, RunNames, Said, TrainingStore, here_with, said_of


def report(
    *,
    names: Annotated[list[str] | None, RunNames] = None,
    said: Annotated[Said, said_of("report.latents", "report.rows")],
    activations: TrainingStore = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs")], json: Json = False,
) -> None:  # fmt: skip
    """Write a page to look at: losses, densities, cross-entropies and a browser of all latents. One HTML file.

    Needs no language model; where that is on this machine, latents are shown with the tokens that they make likelier.
    Shows what `sae eval` and `sae explain` found, where they have run. Several runs come side by side, in one page
    beside their folders.

    Examples:

        sae report
        sae report l1-first --latents 3,17,256
        sae report topk-8192 batchtopk-8192
        sae report --set report.top=16 --set report.before=40
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    found = [catalogue.find_run(here.runs, name) for name in (dict.fromkeys(names) if names else [None])]
    with here.loading_torch():
        from sae.pipeline.interpret.features import FeaturesConfig
        from sae.pipeline.report.stage import report as stage

    values = said.settings("report", FeaturesConfig)
    for one in found:
        here.progress.note(f"run: {one.path}")
    path = stage(found, here.cache, here.progress, config=values, activations=activations, device=here.device)
    if json:
        console.as_json({"run": str(found[0].path), "runs": [one.name for one in found], "report": str(path)})
    else:
        console.say(f"report: {path}")
