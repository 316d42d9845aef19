"""`sae tokenize`: text to token stores."""

import os
from typing import Annotated

import typer

from sae.pipeline.commands.described import count_option, option
from sae.pipeline.commands.options import (
    CacheRoot,
    ConfigFile,
    Json,
    Offline,
    Preset,
    Scheduler,
    Set,
    cache_root,
    settings,
    team,
)
from sae.pipeline.commands.shown import show_stores


def tokenize(
    source: Annotated[str | None, option("tokenize.source", metavar="SOURCE")] = None,
    tokenizer: Annotated[str | None, option("tokenize.tokenizer")] = None,
    context: Annotated[int | None, option("tokenize.context")] = None,
    tokens: Annotated[str | None, count_option("tokenize.tokens")] = None,
    packing: Annotated[str | None, option("tokenize.packing", metavar="RULE")] = None,
    validation: Annotated[float | None, option("tokenize.validation", metavar="SHARE")] = None,
    seed: Annotated[int | None, option("tokenize.seed")] = None,
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
    from sae.pipeline.commands.bars import Bars
    from sae.pipeline.tokenize.stage import TokenizeConfig
    from sae.pipeline.tokenize.stage import tokenize as stage

    values = settings(
        "tokenize", TokenizeConfig, preset, config, set_,
        source=source, tokenizer=tokenizer, context=context, tokens=tokens, packing=packing, validation=validation,
        seed=seed,
    )  # fmt: skip
    root, bars = cache_root(cache), Bars()
    together = team(workers, scheduler, os.cpu_count() or 1)
    result = stage(values, root, bars, workers=together, scheduler=scheduler, offline=offline)
    catalogue.remember(root, "tokens", [result.stores["train"].key])
    if not bars.worked:
        enough = values.tokens == "all" or result.stores["train"].n_tokens >= values.tokens
        there = "the tokens asked for were" if enough else "all that the source has was"
        bars.note(f"nothing to do: {there} there already")
    show_stores(list(result.stores.values()), json, "tokens", lambda store: store.n_tokens)
