"""`sae pull`: a run or a store from a repository of the Hugging Face hub."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, here_with
from sae.pipeline.commands.train import expect_name


def pull(
    *,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", show_default=False, help="Repository on the hub that `sae push` put something into.")],
    what: Annotated[str | None, typer.Argument(metavar="FOLDER", show_default=False, help="Which run or store of it. Default: the only one.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", show_default=False, help="Name of the run folder. Default: as it was called.")] = None,
    here: Annotated[Here, here_with("cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Fetch a run or a store that was pushed, check every byte of it, and put it where it would be had it been made here.

    Repeated after an interruption, it fetches what is missing. Nothing takes its place before it is whole.

    Examples:

        sae pull me/gpt2-saes my-run
        sae pull me/gpt2-activations
    """
    from sae.pipeline.commands import console

    if name is not None:
        expect_name(name)
    with here.loading_torch():
        from sae.pipeline.sharing.pull import pull as fetch
    found = fetch(repository, what, here.cache, here.runs, here.progress, name=name, offline=here.offline)
    if json:
        console.as_json({"path": str(found.path), "kind": found.kind, "bytes": found.bytes})
    else:
        console.say(f"{found.path}: {found.kind}, {console.size(found.bytes)}, every byte as it was pushed")
