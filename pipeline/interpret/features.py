"""The records (`features.json`) of some latents of a dictionary, chosen from what is known of all of them.

Top contexts alone flatter a feature: the weaker ones are random draws from each quarter of its activation values.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from sae.cache.loader.dataset import Dataset
from sae.configs.base import Distinct
from sae.pipeline.interpret.best import rank_in_run
from sae.pipeline.interpret.examples import Features, Group
from sae.pipeline.interpret.gather import StatisticsConfig
from sae.pipeline.interpret.statistics import Statistics

STRONGEST_SHARE = 4  # one in so many of the latents shown is there for its strength
LOOKS_ALIKE = 0.7  # cosine of decoder directions from which two latents are not both shown for their strength


class FeaturesConfig(StatisticsConfig):
    """Settings of a report: which latents to show first, and how much of each."""

    latents: Annotated[tuple[int, ...], Distinct] | None = Field(
        None,
        description="latents to show, as 3,17,256 or 0-9; null: a varied choice of the strongest and of the others",
    )
    count: int = Field(32, ge=1, description="how many latents to show first, where none are named")


def records(found: Statistics, dataset: Dataset, config: FeaturesConfig) -> Features:
    """The records of the latents that settings choose."""
    features = [found.feature(latent, group) for latent, group in choose(found, config).items()]
    examples = [e for f in features for e in [*f.top, *(e for band in f.bands for e in band.examples)]]
    mentioned = {t for e in examples for t in e.tokens} | {c.token for f in features for c in f.frequent}
    mentioned |= {one.token for f in features for one in [*f.promoted, *f.suppressed]}
    return Features(
        store=dataset.inputs[0].key,
        split=dataset.split,
        rows=found.rows,
        d_sae=found.d_sae,
        live=len(found.live),
        begin=found.of["begin"],
        vocabulary={token: found.text(token).decode("latin-1") for token in sorted(mentioned)},
        features=features,
    )


def choose(found: Statistics, config: FeaturesConfig) -> dict[int, Group]:
    """The latents to show, and why: those asked for, or the strongest and a seeded draw from each stratum of density.

    Of the strongest no two have the same most frequent token or nearly the same direction. The strata hold equally many
    live latents, so that the draw is fair to the dictionary and still covers its range.
    """
    if config.latents is not None:
        return dict.fromkeys(config.latents, "asked")
    live = found.live
    strongest = _unlike(found, live[np.lexsort((live, -found.max[live]))], config.count // STRONGEST_SHARE)
    rest = np.setdiff1d(live, strongest)
    rest = rest[np.lexsort((rest, -found.fired[rest]))]
    strata = np.array_split(rest, min(len(rest), config.count - len(strongest))) if len(rest) else []
    generator = np.random.default_rng(config.seed)
    sampled = [int(generator.choice(stratum)) for stratum in strata]
    return {**dict.fromkeys(strongest, "strongest"), **dict.fromkeys(sampled, "sampled")}


def _unlike(found: Statistics, ranked: np.ndarray, count: int) -> list[int]:
    """The first `count` latents of a ranking that are unlike those before them; fewer where there are not so many."""
    taken: list[int] = []
    near: set[int] = set()
    tokens: set[int] = set()
    for latent in ranked.tolist():
        if len(taken) == count:
            break
        token = int(found.frequent.token[latent, 0]) if found.frequent.times[latent, 0] else -1
        if latent in near or (token >= 0 and token in tokens):
            continue
        taken.append(latent)
        tokens.add(token)
        near |= {one.latent for one in found.nearest_to(latent) if one.cosine >= LOOKS_ALIKE}
    return taken


def varied(found: Statistics) -> np.ndarray:
    """All latents in an order whose beginning is diverse, int64 [d_sae]: those that never fired come last.

    Latents take turns: first the one that fires most selectively of each most frequent token, then the next of each. A
    latent that has a near double of higher rank waits for the turn after.
    """
    strength = np.where(found.fired > 0, found.max / np.maximum(found.mean, 1e-30), -1)
    usual = np.abs(np.log10(np.maximum(found.density, 1e-12)) + 2.5)  # decades from 0.3 % of rows
    rank = np.lexsort((np.arange(found.d_sae), -strength, usual.round()))
    place = np.empty(found.d_sae, np.int64)
    place[rank] = np.arange(found.d_sae)
    token = np.where(found.frequent.times[:, 0] > 0, found.frequent.token[:, 0].astype(np.int64), -1 - place)
    by_token = np.lexsort((place, token))
    turn = np.empty(found.d_sae, np.int64)
    turn[by_token] = rank_in_run(token[by_token])
    if found.nearest is not None:
        near, cosine = found.nearest
        turn += ((cosine >= LOOKS_ALIKE) & (near >= 0) & (place[near] < place[:, None])).any(1)
    return np.lexsort((place, turn, found.fired == 0))
