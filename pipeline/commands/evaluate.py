"""`sae eval`: a run folder to figures on held-out data."""

from pathlib import Path
from typing import Annotated

import typer

from sae.pipeline.commands.described import count_option
from sae.pipeline.commands.options import (
    CacheRoot,
    ConfigFile,
    Device,
    Json,
    Offline,
    Preset,
    RunName,
    RunsRoot,
    Set,
    Threads,
    TrainingStore,
    cache_root,
    folder,
    settings,
)


def evaluate(
    run: Annotated[str | None, RunName] = None,
    rows: Annotated[str | None, count_option("eval.rows")] = None,
    tokens: Annotated[str | None, count_option("eval.tokens")] = None,
    activations: TrainingStore = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Where the language model is now. Default: where harvest found it.")] = None,
    replace: Annotated[bool, typer.Option("--replace", metavar="", help="Write the figures in the place of ones that were judged on more.")] = False,
    device: Device = "auto", threads: Threads = None, cache: CacheRoot = None, runs: RunsRoot = Path("runs"), offline: Offline = False,
    preset: Preset = None, config: ConfigFile = None, set_: Set = None, json: Json = False,
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
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.progress import said_if_slow

    root, bars = cache_root(cache), Bars()
    found = catalogue.find_run(folder("--runs", runs), run)
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.evaluate.stage import EvalConfig
        from sae.pipeline.evaluate.stage import evaluate as stage
        from sae.pipeline.runtime import devices

    values = settings("eval", EvalConfig, preset, config, set_, rows=rows, tokens=tokens)
    bars.note(f"run: {found.path}")
    devices.take_threads(threads, bars.note)
    result = stage(
        values, found, root, bars, activations=activations, model=model, device=device, offline=offline,
        replace_larger=replace,
    )  # fmt: skip
    if json:
        console.as_json(result.as_json())
    else:
        console.evaluation(result.as_json(), f"run {found.path}")
