"""`sae harvest`: rows of any source to activation stores."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.described import count_option, option
from sae.pipeline.commands.options import (
    CacheRoot,
    ConfigFile,
    Device,
    Json,
    Offline,
    Preset,
    Scheduler,
    Set,
    Threads,
    cache_root,
    complete_store,
    settings,
    team,
)
from sae.pipeline.commands.shown import show_stores
from sae.pipeline.commands.words import several, whole


def harvest(
    model: Annotated[str | None, option("harvest.model")] = None,
    layer: Annotated[str | None, option("harvest.layer", metavar="N,...")] = None,
    site: Annotated[str | None, option("harvest.site", metavar="NAME,...")] = None,
    codec: Annotated[str | None, option("harvest.codec")] = None,
    table: Annotated[str | None, option("harvest.table", metavar="FILE")] = None,
    source: Annotated[str | None, typer.Option(metavar="NAME", help="Where rows come from, with settings by `--set`; `sae list` explains each. Default: language_model.")] = None,
    tokens: Annotated[str | None, count_option("harvest.tokens")] = None,
    tokens_from: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Token store: key, beginning of a key, or path. Default: the last one made.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only say how many rows, bytes and minutes it would take.")] = False,
    wait: Annotated[bool, typer.Option("--wait", metavar="", help="Wait where another process is writing the same store.")] = False,
    workers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that run the model, each with a copy of it and its share of the cores. Default: 1, this one alone.")] = None,
    scheduler: Scheduler = None,
    device: Device = "auto", threads: Threads = None, cache: CacheRoot = None, offline: Offline = False, preset: Preset = None,
    config: ConfigFile = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Run the model over a token store and keep its activations: one pass, one store for each layer and site.

    GPT-2 small, MLP output of block 6, over the tokens made last, unless options, a preset or a file say otherwise. The
    validation tokens beside them are harvested as well. An interrupted run continues where it was; a second call for
    more tokens grows the same stores.

    `--table` takes rows [n, d] of anything instead, and holds out a share of them. They are read twice and never held in
    memory; the same rows, in whatever format, are the same store.

    Examples:

        sae harvest --layer 6 --site mlp_out --dry-run
        sae harvest --layer 4,6,8 --site resid_post,mlp_out --codec bfloat16
        sae harvest --model my-llama/ --layer 2 --site resid_post --offline
        sae harvest --set harvest.dtype=bfloat16 --set "harvest.rows.positions=[1,64]"
        sae harvest --scheduler tcp://10.0.0.7:8786
        sae harvest --table embeddings.parquet --codec float32 --set harvest.validation=0.1
    """
    from sae.cache import catalogue
    from sae.cache.tokens import TokenStore
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.runtime.progress import said_if_slow

    root, bars, together = cache_root(cache), Bars(), team(workers, scheduler, 1)
    if tokens_from is not None:  # before the seconds that torch takes
        catalogue.find(root, TokenStore, tokens_from)
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.harvest.sources import SOURCES, settings_of_sources
        from sae.pipeline.harvest.stage import harvest as stage
        from sae.pipeline.runtime import devices
        from sae.pipeline.runtime.origins import Origins

    values = settings(
        "harvest", settings_of_sources(), preset, config, set_,
        source=source if table is None else "table", table=table, codec=codec, tokens=tokens,
        model=model, layer=whole("--layer", layer), site=several("--site", site),
    )  # fmt: skip
    if source is not None and source != values.source:
        raise SaeError(f"--source {source}: --table says otherwise; give one of the two")
    if tokens_from is not None and values.source != "language_model":
        raise SaeError(f"--tokens-from {tokens_from}: the rows of {values.source} come from no tokens; leave it out")
    devices.take_threads(threads, bars.note)
    origins = Origins(root, tokens=tokens_from, device=device, offline=offline)
    rows = SOURCES[values.source].of_settings(values, origins, bars)
    result = stage(rows, root, bars, dry_run=dry_run, wait=wait, workers=together, scheduler=scheduler)
    if dry_run:
        show_plans([asdict(plan) for plan in result.plans], json)
        return
    catalogue.remember(root, "activations", [store.key for store in result.stores["train"]])
    if not bars.worked:
        bars.note("nothing to do: the rows asked for were there already")
    show_stores([s for split in result.stores.values() for s in split], json, "width", lambda store: store.d)


def show_plans(plans: list[dict[str, Any]], json: bool) -> None:
    """What a harvest would do: a table or JSON."""
    from sae.pipeline.commands import console

    if json:
        console.as_json({"plans": plans})
        return
    rows = [[p["split"], p["rows"], p["rows_to_do"], console.size(p["stored_bytes"]), p["seconds"] or 0] for p in plans]
    console.table("what harvest would do", ["split", "rows", "rows to write", "size", "seconds"], rows)
