"""`sae synthesize`: rows whose true features are known."""

from typing import Annotated

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.described import count_option, option
from sae.pipeline.commands.options import (
    CacheRoot,
    ConfigFile,
    Json,
    Preset,
    Set,
    cache_root,
    settings,
)
from sae.pipeline.commands.shown import show_stores


def synthesize(
    rows: Annotated[str | None, count_option("synthesize.rows")] = None,
    d: Annotated[int | None, option("synthesize.d")] = None,
    features: Annotated[int | None, option("synthesize.features")] = None,
    mode: Annotated[str | None, typer.Option(metavar="NAME", help="groups: a row has some members of one group of features; iid: each feature is in a row or not, independently. Default: groups.")] = None,
    groups: Annotated[int | None, option("synthesize.presence.groups")] = None,
    active: Annotated[int | None, option("synthesize.presence.active")] = None,
    probability: Annotated[float | None, option("synthesize.presence.probability", metavar="P")] = None,
    noise: Annotated[float | None, option("synthesize.noise")] = None,
    seed: Annotated[int | None, option("synthesize.seed")] = None,
    codec: Annotated[str | None, option("synthesize.codec")] = None,
    wait: Annotated[bool, typer.Option("--wait", metavar="", help="Wait where another process is writing the same store.")] = False,
    cache: CacheRoot = None, preset: Preset = None, config: ConfigFile = None, set_: Set = None, json: Json = False,
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
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.harvest.sources.synthetic import SyntheticConfig, SyntheticSource
    from sae.pipeline.harvest.stage import harvest

    if rows == "all":
        raise SaeError("--rows all: synthetic rows have no end; say how many, as 1M")
    values = settings(
        "synthesize", SyntheticConfig, preset, config, set_,
        presence={"mode": mode, "groups": groups, "active": active, "probability": probability},
        rows=rows, d=d, features=features, noise=noise, seed=seed, codec=codec,
    )  # fmt: skip
    root, bars = cache_root(cache), Bars()
    stores = harvest(SyntheticSource(values), root, bars, wait=wait).stores
    catalogue.remember(root, "activations", [store.key for store in stores["train"]])
    if not bars.worked:
        bars.note("nothing to do: the rows asked for were there already")
    show_stores([store for split in stores.values() for store in split], json, "width", lambda store: store.d)
