"""`sae demo`: the four stages and the report on what is embedded."""

from pathlib import Path
from typing import Annotated

import typer

from sae.pipeline.commands.options import CacheRoot, Device, Json, RunsRoot, Set, Threads, cache_root, folder


def demo(
    workers: Annotated[int, typer.Option(metavar="N", min=1, show_default=False, help="Processes that encode text. Default: 1.")] = 1,
    device: Device = "auto", threads: Threads = None, cache: CacheRoot = None, runs: RunsRoot = Path("runs"), set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """All four stages and a report on the embedded default: real text, a small real model, no network, two minutes.

    The `tiny` preset through the same stages that the commands run. Repeated, it does not do finished ones again.

    Examples:

        sae demo
        sae demo --set train.steps=4000 --json
    """
    from sae.pipeline.commands import console
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.progress import said_if_slow

    root, bars = cache_root(cache), Bars()
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.commands.all_stages import all_stages
        from sae.pipeline.runtime import devices

    devices.resolve_device(device)
    devices.take_threads(threads, bars.note)
    result = all_stages(root, folder("--runs", runs), bars, overrides=set_ or [], device=device, workers=workers)
    if json:
        console.as_json(result)
        return
    console.evaluation(result, f"run {result['run']}")
    console.table("seconds", list(result["seconds"]), [list(result["seconds"].values())])
    console.say(f"report: {result['report']}")
