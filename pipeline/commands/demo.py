"""`sae demo`: the four stages and the report on what is embedded."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, Set, here_with


def demo(
    *,
    workers: Annotated[int, typer.Option(metavar="N", min=1, show_default=False, help="Processes that encode text. Default: 1.")] = 1,
    here: Annotated[Here, here_with("device", "threads", "cache", "runs")], set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """All four stages and a report on the embedded default: real text, a small real model, no network, two minutes.

    The `tiny` preset through the same stages that the commands run. Repeated, it does not do finished ones again.

    Examples:

        sae demo
        sae demo --set train.steps=4000 --json
    """
    from sae.pipeline.commands import console

    with here.loading_torch():
        from sae.pipeline.commands.all_stages import all_stages
        from sae.pipeline.runtime import devices

    devices.resolve_device(here.device)
    result = all_stages(here, overrides=set_ or [], workers=workers)
    if json:
        console.as_json(result)
        return
    console.evaluation(result, f"run {result['run']}")
    console.table("seconds", list(result["seconds"]), [list(result["seconds"].values())])
    console.say(f"report: {result['report']}")
