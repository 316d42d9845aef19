"""The commands that make stores: `sae tokenize`, `sae harvest`, `sae synthesize`."""

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sae.cache.errors import SaeError
from sae.pipeline.commands.looking import show_stores
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
    unfinished,
)
from sae.pipeline.commands.words import count, several, whole


def tokenize(
    source: Annotated[str | None, typer.Option(metavar="SOURCE", help="fineweb, python (the text that ships with Python), org/name on the hub, or local parquet, arrow, jsonl, json, csv, tsv, txt files, folders, globs. Default: fineweb.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="NAME", help="gpt2 or another tiktoken encoding, tiny (embedded), a Hugging Face folder, or hf:org/name. Default: gpt2.")] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="Tokens in a context. Default: 128.")] = None,
    tokens: Annotated[str | None, count("Training tokens wanted, rounded up to a whole window. Default: 10M.")] = None,
    packing: Annotated[str | None, typer.Option(metavar="RULE", help="concat: documents end to end; document: none shares a context with another. Default: concat.")] = None,
    validation: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of the documents, chosen by hash, that is kept for validation. Default: 0.05.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the document shuffle. Default: 0.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that encode; 1: this one alone. Default: one a core.")] = None,
    scheduler: Scheduler = None,
    cache: CacheRoot = None, offline: Offline = False, preset: Preset = None, config: ConfigFile = None,
    set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Turn text into token stores: training and validation, no document in both.

    FineWeb through GPT-2's encoding, 10 million tokens in contexts of 128, unless options, a preset or a file say
    otherwise. An interrupted run continues where it was; a second call with more `--tokens` grows the same store.

    Examples:

        sae tokenize --tokens 100M
        sae tokenize --source "texts/*.jsonl.gz" --context 256 --tokens all
        sae tokenize --preset tiny        # offline
    """
    from sae.cache import catalogue
    from sae.pipeline.commands import console
    from sae.pipeline.tokenize.stage import TokenizeConfig
    from sae.pipeline.tokenize.stage import tokenize as stage

    values = settings(
        "tokenize", TokenizeConfig, preset, config, set_,
        source=source, tokenizer=tokenizer, context=context, tokens=tokens, packing=packing, validation=validation,
        seed=seed,
    )  # fmt: skip
    root, bars = cache_root(cache), console.Bars()
    together = team(workers, scheduler, os.cpu_count() or 1)
    result = stage(values, root, bars, workers=together, scheduler=scheduler, offline=offline)
    catalogue.remember(root, "tokens", [result.stores["train"].key])
    if not bars.worked:
        enough = values.tokens == "all" or result.stores["train"].n_tokens >= values.tokens
        there = "the tokens asked for were" if enough else "all that the source has was"
        bars.note(f"nothing to do: {there} there already")
    show_stores(list(result.stores.values()), json, "tokens", lambda store: store.n_tokens)


def harvest(
    model: Annotated[str | None, typer.Option(metavar="NAME", help="gpt2, any hub model transformer_lens boots, a local Hugging Face folder, or tiny (embedded). Default: gpt2.")] = None,
    layer: Annotated[str | None, typer.Option(metavar="N,...", help="Layers, from 0: one, or several as 4,6,8 or 0-3. Default: 6.")] = None,
    site: Annotated[str | None, typer.Option(metavar="NAME,...", help="Sites: one, or several as resid_post,mlp_out; `sae list` explains each. Default: mlp_out.")] = None,
    codec: Annotated[str | None, typer.Option(metavar="NAME", help="int8, bfloat16, float16 or float32; with settings as int8:step=0.11. Default: int8.")] = None,
    tokens: Annotated[str | None, count("Training tokens to run. Default: all.")] = None,
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

    Examples:

        sae harvest --layer 6 --site mlp_out --dry-run
        sae harvest --layer 4,6,8 --site resid_post,mlp_out --codec bfloat16
        sae harvest --model my-llama/ --layer 2 --site resid_post --offline
        sae harvest --set harvest.dtype=bfloat16 --set "harvest.rows.positions=[1,64]"
        sae harvest --scheduler tcp://10.0.0.7:8786
    """
    from sae.cache import catalogue
    from sae.cache.tokens import TokenStore
    from sae.pipeline.commands import console
    from sae.pipeline.runtime.progress import said_if_slow

    root, bars, together = cache_root(cache), console.Bars(), team(workers, scheduler, 1)
    if tokens_from is not None:  # before the seconds that torch takes
        catalogue.find(root, TokenStore, tokens_from, "--tokens-from", "sae tokenize")
    with said_if_slow(bars, "loading torch"):
        from sae.pipeline.harvest.stage import HarvestConfig
        from sae.pipeline.harvest.stage import harvest as stage
        from sae.pipeline.runtime import devices

    values = settings(
        "harvest", HarvestConfig, preset, config, set_,
        model=model, layer=whole("--layer", layer), site=several("--site", site), codec=codec, tokens=tokens,
    )  # fmt: skip
    devices.take_threads(threads, bars.note)
    train = catalogue.find(root, TokenStore, tokens_from, "--tokens-from", "sae tokenize")
    validation = catalogue.sibling_of(root, train, "validation")
    bars.note(f"tokens: {train.key}{unfinished(train)}")
    stores = [train, *([validation] if validation is not None and validation.n_contexts else [])]
    result = stage(
        values, stores, root, bars, device=device, offline=offline, dry_run=dry_run, wait=wait,
        workers=together, scheduler=scheduler,
    )  # fmt: skip
    if dry_run:
        show_plans([asdict(plan) for plan in result.plans], json)
        return
    catalogue.remember(root, "activations", [store.key for store in result.stores["train"]])
    if not bars.worked:
        bars.note("nothing to do: the rows asked for were there already")
    show_stores([s for split in result.stores.values() for s in split], json, "width", lambda store: store.d)


def synthesize(
    rows: Annotated[str | None, count("Training rows, rounded up to a whole window. Default: 1M.")] = None,
    d: Annotated[int | None, typer.Option("--d", metavar="N", help="Width of a row. Default: 256.")] = None,
    features: Annotated[int | None, typer.Option(metavar="N", help="True features: random directions of length 1. Default: 512.")] = None,
    mode: Annotated[str | None, typer.Option(metavar="NAME", help="groups: a row has some members of one group of features; iid: each feature is in a row or not, independently. Default: groups.")] = None,
    groups: Annotated[int | None, typer.Option(metavar="N", help="Groups the features are divided into. Default: 12.")] = None,
    active: Annotated[int | None, typer.Option(metavar="N", help="Members of its group in a row. Default: 32.")] = None,
    probability: Annotated[float | None, typer.Option(metavar="P", help="With `--mode iid`: that a feature is in a row. Default: 0.015625.")] = None,
    noise: Annotated[float | None, typer.Option(metavar="X", help="Standard deviation of noise on each value. Default: 0.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the features and the samples. Default: 0.")] = None,
    codec: Annotated[str | None, typer.Option(metavar="NAME", help="int8, bfloat16, float16 or float32; with settings as int8:step=0.11. Default: int8.")] = None,
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
    from sae.pipeline.commands import console
    from sae.pipeline.harvest.synthesize import synthesize as stage
    from sae.pipeline.harvest.synthetic import SyntheticConfig

    if rows == "all":
        raise SaeError("--rows all: synthetic rows have no end; say how many, as 1M")
    values = settings(
        "synthesize", SyntheticConfig, preset, config, set_,
        presence={"mode": mode, "groups": groups, "active": active, "probability": probability},
        rows=rows, d=d, features=features, noise=noise, seed=seed, codec=codec,
    )  # fmt: skip
    root, bars = cache_root(cache), console.Bars()
    stores = stage(values, root, bars, wait=wait)
    catalogue.remember(root, "activations", [stores["train"].key])
    if not bars.worked:
        bars.note("nothing to do: the rows asked for were there already")
    show_stores(list(stores.values()), json, "width", lambda store: store.d)


def team(workers: int | None, scheduler: str | None, usual: int) -> int:
    """How many processes are to work on this machine, where no scheduler says who works."""
    if workers is not None and scheduler is not None:
        raise SaeError(f"--workers {workers}: a scheduler brings its own workers; give --workers or --scheduler")
    return workers or usual


def show_plans(plans: list[dict[str, Any]], json: bool) -> None:
    """What a harvest would do: a table or JSON."""
    from sae.pipeline.commands import console

    if json:
        console.as_json({"plans": plans})
        return
    rows = [[p["split"], p["rows"], p["rows_to_do"], console.size(p["stored_bytes"]), p["seconds"] or 0] for p in plans]
    console.table("what harvest would do", ["split", "rows", "rows to write", "size", "seconds"], rows)
