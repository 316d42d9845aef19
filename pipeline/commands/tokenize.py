"""`sae tokenize`: text to token stores."""

from typing import Annotated

import typer

from sae.pipeline.commands.options import Here, Json, Said, Scheduler, here_with, said_of, team
from sae.pipeline.commands.shown import show_stores
from sae.pipeline.runtime import cores


def tokenize(
    *,
    said: Annotated[Said, said_of(
        "tokenize.source SOURCE", "tokenize.tokenizer", "tokenize.context", "tokenize.tokens", "tokenize.packing RULE",
        "tokenize.validation SHARE", "tokenize.seed",
    )],
    workers: Annotated[int | None, typer.Option(metavar="N", min=1, help="Processes that encode; 1: this one alone. Default: one for each core that it may use.")] = None,
    scheduler: Scheduler = None,
    here: Annotated[Here, here_with("cache", "offline")], json: Json = False,
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
    from sae.pipeline.tokenize.stage import TokenizeConfig
    from sae.pipeline.tokenize.stage import tokenize as stage

    values = said.settings("tokenize", TokenizeConfig)
    together = team(workers, scheduler, cores.usable())
    result = stage(values, here.cache, here.progress, workers=together, scheduler=scheduler, offline=here.offline)
    catalogue.remember(here.cache, "tokens", [result.stores["train"].key])
    if not here.progress.worked:
        enough = values.tokens == "all" or result.stores["train"].n_tokens >= values.tokens
        there = "the tokens asked for were" if enough else "all that the source has was"
        here.progress.note(f"nothing to do: {there} there already")
    show_stores(list(result.stores.values()), json, "tokens", lambda store: store.n_tokens)
