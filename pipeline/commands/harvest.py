"""`sae harvest`: rows of any source to activation stores."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.options import Here, Json, Said, Scheduler, complete_store, here_with, said_of, team
from sae.pipeline.commands.shown import show_stores


def harvest(
    *,
    said: Annotated[Said, said_of(
        "harvest.model", "harvest.layer", "harvest.site", "harvest.codec", "harvest.table FILE", "harvest.source",
        "harvest.tokens",
    )],
    tokens_from: Annotated[str | None, typer.Option(metavar="STORE", autocompletion=complete_store, help="Token store: key, beginning of a key, or path. Default: the last one made.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", metavar="", help="Only say how many rows, bytes and minutes it would take.")] = False,
    wait: Annotated[bool, typer.Option("--wait", metavar="", help="Wait where another process is writing the same store.")] = False,
    workers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that run the model, each with a copy of it and its share of the cores. Default: 1, this one alone.")] = None,
    scheduler: Scheduler = None,
    here: Annotated[Here, here_with("device", "threads", "cache", "offline")], json: Json = False,
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

    root, together = here.cache, team(workers, scheduler, 1)
    if tokens_from is not None:  # before the seconds that torch takes
        catalogue.find(root, TokenStore, tokens_from)
    with here.loading_torch():
        from sae.pipeline.harvest.sources import SOURCES, settings_of_sources
        from sae.pipeline.harvest.stage import harvest as stage
        from sae.pipeline.runtime.origins import Origins

    source = said.options.get("harvest.source")
    if "harvest.table" in said.options:
        said.options["harvest.source"] = "table"
    values = said.settings("harvest", settings_of_sources())
    if source is not None and source != values.source:
        raise SaeError(f"--source {source}: --table says otherwise; give one of the two")
    if tokens_from is not None and values.source != "language_model":
        raise SaeError(f"--tokens-from {tokens_from}: the rows of {values.source} come from no tokens; leave it out")
    origins = Origins(root, tokens=tokens_from, device=here.device, offline=here.offline)
    rows = SOURCES[values.source].of_settings(values, origins, here.progress)
    result = stage(rows, root, here.progress, dry_run=dry_run, wait=wait, workers=together, scheduler=scheduler)
    if dry_run:
        show_plans([asdict(plan) for plan in result.plans], json)
        return
    catalogue.remember(root, "activations", [store.key for store in result.stores["train"]][: rows.remembered])
    if not here.progress.worked:
        here.progress.note("nothing to do: the rows asked for were there already")
    every = [store for split in result.stores.values() for store in split]
    show_stores(every, json, "width", lambda store: store.d, result.about())


def show_plans(plans: list[dict[str, Any]], json: bool) -> None:
    """Show the plan of a harvest, as a table or JSON."""
    from sae.pipeline.commands import console

    if json:
        console.as_json({"plans": plans})
        return
    rows = [[p["split"], p["rows"], p["rows_to_do"], console.size(p["stored_bytes"]), p["seconds"] or 0] for p in plans]
    console.table("what harvest would do", ["split", "rows", "rows to write", "size", "seconds"], rows)
