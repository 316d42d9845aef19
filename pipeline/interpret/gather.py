"""A dictionary and rows -> what is known of its latents: two passes over the rows, no language model."""

from typing import Any

import numpy as np
import torch
from pydantic import Field

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import VOCABULARY, TokenStore
from sae.configs.base import Amount, Settings
from sae.pipeline.interpret.best import first_of_run, rank_in_run
from sae.pipeline.interpret.contexts import chosen, with_text, words
from sae.pipeline.interpret.directions import nearest
from sae.pipeline.interpret.statistics import Statistics, Tokens
from sae.pipeline.interpret.survey import Dictionary, Survey, judging, survey
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.saes import dictionary

FREQUENT, PARTNERS, NEAREST = 6, 8, 8  # tokens and latents told of each latent


class StatisticsConfig(Settings):
    """Settings of what is gathered about latents."""

    top: int = Field(8, ge=1, description="top contexts of a latent, one a document")
    weaker: int = Field(2, ge=0, description="contexts from each quarter of a latent's activations")
    sample: int = Field(64, ge=4, description="random firings of a latent the quarters are estimated from")
    before: int = Field(20, ge=0, description="tokens shown before the one that fired")
    after: int = Field(8, ge=0, description="tokens shown after it")
    rows: Amount = Field(262_144, description="rows of the store that are searched for contexts")
    seed: int = Field(0, ge=0, description="seed of every random choice")

    def gathered(self) -> dict[str, Any]:
        """The settings that decide what is found, but for `rows`."""
        return {name: getattr(self, name) for name in StatisticsConfig.model_fields if name != "rows"}


def rows_of(dataset: Dataset, config: StatisticsConfig) -> int:
    """How many rows are looked at."""
    return dataset.n_rows if config.rows == "all" else min(config.rows, dataset.n_rows)


def gather(
    sae: Dictionary, dataset: Dataset, tokens: TokenStore | None, config: StatisticsConfig, progress: Progress, *,
    device: torch.device | str = "cpu",
) -> Statistics:  # fmt: skip
    """Survey what a dictionary on `device` reads of a dataset, and the text around the firings worth showing.

    `tokens` is the token store the rows came from; None where they come from no text. Rows that are not kept, which
    training left out, are not looked at: they are shown like tokens that never became rows. Equal inputs give equal
    results. Raises SaeError for a token store the rows did not come from.
    """
    text = dataset.provenance.text
    if tokens is not None and (text is None or text.recipe != tokens.recipe):
        raise SaeError(
            f"{tokens.key}: not the tokens {dataset.inputs[0].key} was harvested from; name the store its recipe names"
        )
    rows, where = rows_of(dataset, config), torch.device(device)
    seen = Survey(sae.d_sae, rows=rows, top=config.top, sample=config.sample, seed=config.seed, device=where)
    with judging(sae):
        survey(sae, dataset, tokens, rows, seen, progress, where)
        contexts = chosen(seen, config.weaker)
        if tokens is not None:
            around = config.before, config.after
            contexts = with_text(contexts, sae, dataset, tokens, around, progress, where)
    with said_if_slow(progress, "counting which latents fire together"):
        partners = seen.together.partners(PARTNERS)
    directions = sae.W_dec if isinstance(sae, dictionary.Dictionary) else None  # of an fsq it is of channels
    with said_if_slow(progress, "comparing decoder directions"):
        near = nearest(directions, NEAREST) if directions is not None else None
    vocabulary = [] if tokens is None else tokens.vocabulary()
    frequent = _frequent(seen, tokens)
    if max((int(a.max()) for a in (contexts.tokens, frequent.token) if a.size), default=-1) >= len(vocabulary) > 0:
        assert tokens is not None
        raise DamagedStore(f"{tokens.path / VOCABULARY}: lacks tokens that are there; tokenize again to restore it")
    best = seen.top.entries()
    largest = np.zeros(sae.d_sae)
    np.maximum.at(largest, best[0], np.abs(best[2]))
    windows, total, histogram = (counts.cpu().numpy() for counts in (seen.windows, seen.total, seen.histogram))
    begin = None if tokens is None else int(tokens.recipe["tokenizer"]["begin"])
    return Statistics(
        {"begin": begin}, windows, seen.window_rows, total, largest.astype(np.float32), histogram,
        contexts, frequent, partners, near, None, vocabulary,
    )  # fmt: skip


def _frequent(seen: Survey, tokens: TokenStore | None) -> Tokens:
    """The tokens under the sample of each latent's firings."""
    latent, _, _, position, _ = seen.sample.entries()
    found = Tokens(
        np.zeros((seen.d_sae, FREQUENT), np.int32), np.zeros((seen.d_sae, FREQUENT), np.int32),
        np.bincount(latent, minlength=seen.d_sae).astype(np.int32),
    )  # fmt: skip
    if tokens is None or not len(latent):
        return found
    token = words(tokens, position, 0, 0).tokens[:, 0].astype(np.int64)
    order = np.lexsort((token, latent))
    latent, token = latent[order], token[order]
    first = np.flatnonzero(first_of_run(latent, token))
    count = np.diff(np.append(first, len(latent)))
    latent, token = latent[first], token[first]
    order = np.lexsort((token, -count, latent))
    rank = rank_in_run(latent[order])
    order, rank = order[rank < FREQUENT], rank[rank < FREQUENT]
    found.token[latent[order], rank], found.times[latent[order], rank] = token[order], count[order]
    return found
