"""`sae tokenize`: text to token stores."""

import os
from typing import TYPE_CHECKING, Annotated

import typer

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
from sae.pipeline.commands.words import count

if TYPE_CHECKING:
    pass


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
