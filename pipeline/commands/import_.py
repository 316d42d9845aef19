"""`sae import`: another tool's dictionary to a run folder."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, complete_store, here_with
from sae.pipeline.commands.train import expect_name


def import_(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", show_default=False, help="Folder or file of the dictionary, or one on the Hugging Face hub: owner/name/folder, with @revision behind it if need be.")],
    name: Annotated[str, typer.Option(metavar="NAME", show_default=False, help="Name of the run folder.")],
    activations: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Activations it is judged on: key, beginning of a key, or path. Default: those of the model and hook point that its files name.")] = None,
    target: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="What a transcoder is to predict: likewise. Default: that of the hook point its files name.")] = None,
    here: Annotated[Here, here_with("cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Make a run of a dictionary that another tool trained; `sae eval`, `compare`, `report` and `export` take it from there.

    Read are folders of SAELens, dictionary_learning, sparsify, OpenMOSS, Gemma Scope and Qwen-Scope (`sae list`: formats).
    Nothing is unpickled but weights, and nothing is run. Its activations are in the cache already, harvested at its hook
    point.

    Examples:

        sae import ./gpt2-sae --name theirs
        sae import jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre --name jb-8
        sae import ae_folder --name learned --activations gpt2-8.resid_pre
    """
    from sae.pipeline.commands import console

    expect_name(name)
    with here.loading_torch():
        from sae.pipeline.formats.trained import Described
        from sae.pipeline.train.imported import adopt

    run = adopt(
        source, name, here.cache, here.runs, here.progress, activations=activations, target=target, offline=here.offline
    )  # fmt: skip
    found = Described.of(run)
    said = {
        "run": str(run.path),
        "format": (run.imported or {})["format"],
        **found._asdict(),
        "activations": run.seen.key,
    }
    if json:
        console.as_json(said)
    else:
        console.table(f"run {run.path}", ["what", "value"], [[key, value] for key, value in said.items()])
