"""`sae synthesize`: rows whose true features are known."""

from typing import Annotated

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Json, Said, here_with, said_of
from sae.pipeline.commands.shown import show_stores


def synthesize(
    *,
    said: Annotated[Said, said_of(
        "synthesize.rows", "synthesize.d", "synthesize.features", "synthesize.presence.mode", "synthesize.presence.groups",
        "synthesize.presence.active", "synthesize.presence.probability P", "synthesize.noise", "synthesize.seed",
        "synthesize.codec",
    )],
    wait: Annotated[bool, typer.Option("--wait", metavar="", help="Wait where another process is writing the same store.")] = False,
    here: Annotated[Here, here_with("cache")], json: Json = False,
) -> None:  # fmt: skip
    """Make rows whose true features are known, in the place of a language model's activations.

    A row is a sparse sum of random directions with coefficients between 0 and 1. `sae train` takes the rows up as it
    does a harvest's, and `sae eval` says how many of the directions a dictionary found. Held-out rows are made as well.
    An interrupted run continues where it was; a second call for more rows grows the same store.

    Examples:

        sae synthesize --preset synthetic
        sae synthesize --rows 10M --d 64 --features 256 --active 4 --groups 8
        sae synthesize --mode iid --probability 0.02 --noise 0.01 --codec float32
        sae synthesize --set synthesize.presence.decay=0.9 --set synthesize.validation_rows=16384
    """
    from sae.cache import catalogue
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig, SyntheticSource
    from sae.pipeline.harvest.stage import harvest

    if said.options.get("synthesize.rows") == "all":
        raise SaeError("--rows all: synthetic rows have no end; say how many, as 1M")
    source = SyntheticSource(said.settings("synthesize", SyntheticConfig))
    stores = harvest(source, here.cache, here.progress, wait=wait).stores
    catalogue.remember(here.cache, "activations", [store.key for store in stores["train"]])
    if not here.progress.worked:
        here.progress.note("nothing to do: the rows asked for were there already")
    show_stores([store for split in stores.values() for store in split], json, "width", lambda store: store.d)
