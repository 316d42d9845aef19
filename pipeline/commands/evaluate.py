"""`sae eval`: a run folder to figures on held-out data."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, RunName, Said, TrainingStore, here_with, said_of


def evaluate(
    *,
    run: Annotated[str | None, RunName] = None,
    said: Annotated[Said, said_of("eval.rows", "eval.tokens")],
    activations: TrainingStore = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model is now. Default: where harvest found it.")] = None,
    replace: Annotated[bool, typer.Option("--replace", metavar="", help="Write the figures in the place of ones that were judged on more.")] = False,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Judge a trained dictionary on held-out documents: reconstruction, cross-entropy when spliced in, dead latents.

    Prints the figures with what each means, and writes them into the run folder (`eval/eval.json`), unless the ones
    there were judged on more. On rows of
    `sae synthesize`, which no language model made, it says instead how many of the true features were found.

    Examples:

        sae eval
        sae eval l1-first --tokens 500k --json
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    found = catalogue.find_run(here.runs, run)
    with here.loading_torch():
        from sae.pipeline.evaluate.stage import EvalConfig
        from sae.pipeline.evaluate.stage import evaluate as stage

    values = said.settings("eval", EvalConfig)
    here.progress.note(f"run: {found.path}")
    result = stage(
        values, found, here.cache, here.progress, activations=activations, model=model, device=here.device,
        offline=here.offline, replace_larger=replace,
    )  # fmt: skip
    if json:
        console.as_json(result.as_json())
    else:
        console.evaluation(result.as_json(), f"run {found.path}")
