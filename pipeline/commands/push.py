"""`sae push`: a run or a store to a repository of the Hugging Face hub."""

from typing import Annotated

import typer

from sae.cache.errors import NotFound
from sae.pipeline.commands.options import Here, Json, complete_run, here_with


def push(
    *,
    what: Annotated[str, typer.Argument(metavar="RUN|STORE", autocompletion=complete_run, show_default=False, help="Run folder or its name; or a store: key, the beginning of a key, or a path.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", show_default=False, help="Repository on the hub. It is made where it is not there: of models for runs, of data sets for stores.")],
    private: Annotated[bool, typer.Option("--private", metavar="", help="Make a new repository private.")] = False,
    here: Annotated[Here, here_with("cache", "runs", "offline")], json: Json = False,
) -> None:  # fmt: skip
    """Put a run or a store into a repository of the Hugging Face hub, with a page that says what it is.

    A run becomes a folder that `SAE.from_pretrained(OWNER/NAME, RUN)` of SAELens opens; a store is sent chunk by chunk,
    each compared with its checksum before. Repeated after an interruption, it sends what is missing. Log in first:
    `hf auth login`.

    Examples:

        sae push my-run me/gpt2-saes
        sae push gpt2-6.mlp_out me/gpt2-activations --private
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console

    with here.loading_torch():
        from sae.pipeline.sharing.push import push_run, push_store
    try:
        made = push_run(
            catalogue.find_run(here.runs, what), repository, here.progress, private=private, offline=here.offline
        )
    except NotFound as no_run:
        try:
            store = catalogue.any_store(here.cache, what)
        except NotFound:
            raise no_run from None
        made = push_store(store, repository, here.progress, private=private, offline=here.offline)
    if json:
        console.as_json(made._asdict())
    else:
        console.say(f"{made.page}: {made.files} files, {console.size(made.bytes)}, {console.size(made.sent)} of it new")
