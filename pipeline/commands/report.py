"""`sae report`: a run folder to a page to look at."""

from pathlib import Path
from typing import Annotated

from sae.pipeline.commands.described import count_option, option
from sae.pipeline.commands.options import (
    CacheRoot,
    ConfigFile,
    Device,
    Json,
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
from sae.pipeline.commands.words import whole


def report(
    run: Annotated[str | None, RunName] = None,
    latents: Annotated[str | None, option("report.latents", metavar="N,...")] = None,
    rows: Annotated[str | None, count_option("report.rows")] = None,
    activations: TrainingStore = None,
    device: Device = "auto", threads: Threads = None, cache: CacheRoot = None, runs: RunsRoot = Path("runs"),
    preset: Preset = None, config: ConfigFile = None, set_: Set = None, json: Json = False,
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
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.progress import said_if_slow

    root, bars = cache_root(cache), Bars()
    found = catalogue.find_run(folder("--runs", runs), run)
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.interpret.features import FeaturesConfig
        from sae.pipeline.report.stage import report as stage
        from sae.pipeline.runtime import devices

    values = settings("report", FeaturesConfig, preset, config, set_, latents=whole("--latents", latents), rows=rows)
    bars.note(f"run: {found.path}")
    devices.take_threads(threads, bars.note)
    path = stage(found, root, bars, config=values, activations=activations, device=device)
    if json:
        console.as_json({"run": str(found.path), "report": str(path)})
    else:
        console.say(f"report: {path}")
