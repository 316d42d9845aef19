"""`sae analyze`: one dictionary, looked at from several sides."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, ModelNow, Said, TrainingStore, complete_run, here_with, said_of


def analyze(
    *,
    run: Annotated[str | None, typer.Argument(metavar="RUN", autocompletion=complete_run, show_default=False, help="Run folder or its name. Default: the newest finished run.")] = None,
    analyses: Annotated[list[str] | None, typer.Argument(metavar="ANALYSIS", show_default=False, help="Which analyses; `sae list` explains each. Default: those that take rows alone.")] = None,
    said: Annotated[Said, said_of("analyze.rows", "analyze.top", "analyze.clusters", "analyze.measure")],
    activations: TrainingStore = None,
    model: ModelNow = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Look at a dictionary from several sides: sparsity, reconstruction, geometry, frequency, latent space, and more.

    Each leaves `analysis/NAME.json` and a plot, `analysis/NAME.png`, in the run folder. Rows are held-out ones of the
    cache. Those that take more than rows are done where they are named: `attribution` (the language model), `emergence`
    (snapshots that training kept, `--set train.snapshots=12`), `clusters` and `map` (scikit-learn, UMAP).

    Examples:

        sae analyze
        sae analyze l1-first sparsity latent_space --rows 10k
        sae analyze l1-first similarity --top 50 --json
        sae analyze l1-first clusters map --clusters 20
        sae analyze l1-first attribution --measure logit
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    found = catalogue.find_run(here.runs, run)
    with here.loading_torch():
        from sae.pipeline.analyses.analysis import AnalyzeConfig
        from sae.pipeline.analyses.stage import analyze as stage
        from sae.pipeline.metrics.figures import meanings

    config = said.settings("analyze", AnalyzeConfig)
    here.progress.note(f"run: {found.path}")
    written = stage(
        found,
        here.cache,
        here.progress,
        analyses or (),
        config=config,
        activations=activations,
        device=here.device,
        model=model,
        offline=here.offline,
    )
    if json:
        told = {
            name: {**one.finding.as_json(), "json": str(one.json), "plot": str(one.plot)}
            for name, one in written.items()
        }
        console.as_json({"run": str(found.path), "analyses": told})
        return
    for name, one in written.items():
        console.figures(name, one.finding.figures, meanings() | one.meanings)
        console.say(f"plot: {one.plot}")
