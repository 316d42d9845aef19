"""The contexts in which a dictionary's latents fire, top and weaker ones, computed from the cache alone.

Two passes, no language model. The first (`survey`) reads rows and keeps, for every latent, its largest firings (one a
document), a uniform sample of all its firings, and counts. Then the latents to show are chosen, and the second pass
encodes just the rows of the tokens around their firings, so that each context shows the latent on every token.

Top contexts alone flatter a feature: the weaker ones are random draws from each quarter of its activation values.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.store.codecs import Encoded
from sae.cache.tokens import VOCABULARY, TokenStore
from sae.configs.base import Amount, Distinct, Settings
from sae.pipeline.interpret.examples import (
    BINS_PER_OCTAVE,
    LOWEST_OCTAVE,
    Band,
    Bin,
    Example,
    Feature,
    Features,
    Group,
    TokenCount,
)
from sae.pipeline.interpret.survey import BATCH_ROWS, Dictionary, Survey, firings, judging, survey
from sae.pipeline.runtime.progress import Progress

QUARTERS = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
STRONGEST_SHARE = 4  # one in so many of the latents shown is there for its strength
FREQUENT = 6


class FeaturesConfig(Settings):
    """Settings of a report: which latents to show and how much of each."""

    latents: Annotated[tuple[int, ...], Distinct] | None = Field(
        None,
        description="latents to show, as 3,17,256 or 0-9; null: the strongest few and a sample of the others",
    )
    count: int = Field(32, ge=1, description="how many latents to show, where none are named")
    top: int = Field(8, ge=1, description="top contexts of a latent, one a document")
    weaker: int = Field(2, ge=0, description="contexts from each quarter of a latent's activations")
    sample: int = Field(64, ge=4, description="random firings of a latent the quarters are estimated from")
    before: int = Field(20, ge=0, description="tokens shown before the one that fired")
    after: int = Field(8, ge=0, description="tokens shown after it")
    rows: Amount = Field(262_144, description="rows of the store that are searched for contexts")
    seed: int = Field(0, ge=0, description="seed of every random choice")


@dataclass
class _Spot:
    """A firing to show: the token it sits on, and the tokens [first, stop) around it, as places in the token store."""

    latent: int
    value: float
    position: int
    document: int
    first: int
    stop: int


def find_features(
    sae: Dictionary, dataset: Dataset, tokens: TokenStore, config: FeaturesConfig, progress: Progress, *,
    device: torch.device | str = "cpu",
) -> Features:  # fmt: skip
    """Survey what a dictionary on `device` reads of a dataset, and describe some of its latents.

    `tokens` is the token store the rows came from. Rows that are not kept, which training left out, are not looked at:
    they are shown like tokens that never became rows. Equal inputs give equal records. Raises SaeError for a latent
    that does not exist and for a token store the rows did not come from.
    """
    store = dataset.inputs[0]
    if dataset.provenance.text is None or dataset.provenance.text.recipe != tokens.recipe:
        raise SaeError(f"{tokens.key}: not the tokens {store.key} was harvested from; name the store its recipe names")
    if beyond := [latent for latent in config.latents or () if not 0 <= latent < sae.d_sae]:
        raise SaeError(f"latents {beyond}: the dictionary has latents 0 to {sae.d_sae - 1}")
    rows = dataset.n_rows if config.rows == "all" else min(config.rows, dataset.n_rows)
    seen = Survey(sae.d_sae, top=config.top, sample=config.sample, seed=config.seed)
    where = torch.device(device)
    with judging(sae):
        survey(sae, dataset, tokens, rows, seen, progress, where)
        chosen = choose(seen, config)
        described = _Describer(seen, tokens, config, list(chosen))
        spots = [spot for latent in chosen for spot in described.spots(latent)]
        values = _values_around(sae, dataset, spots, progress, where)
    features = [described.feature(latent, group, *values) for latent, group in chosen.items()]
    vocabulary, mentioned = tokens.vocabulary(), sorted(_mentioned(features))
    if mentioned and mentioned[-1] >= len(vocabulary):
        raise DamagedStore(f"{tokens.path / VOCABULARY}: has no token {mentioned[-1]}; tokenize again to restore it")
    return Features(
        store=store.key,
        split=store.split,
        rows=seen.rows,
        d_sae=sae.d_sae,
        live=len(seen.live),
        begin=int(tokens.recipe["tokenizer"]["begin"]),
        vocabulary={token: vocabulary[token].decode("latin-1") for token in mentioned},
        features=features,
    )


def choose(seen: Survey, config: FeaturesConfig) -> dict[int, Group]:
    """The latents to show, and why: those asked for, or the strongest and a seeded draw from each stratum of density.

    The strata hold equally many live latents, so that the draw is fair to the dictionary and still covers its range.
    """
    if config.latents is not None:
        return dict.fromkeys(config.latents, "asked")
    live = seen.live
    strongest = live[np.lexsort((live, -seen.max[live]))][: config.count // STRONGEST_SHARE]
    rest = np.setdiff1d(live, strongest)
    rest = rest[np.lexsort((rest, -seen.fired[rest]))]
    strata = np.array_split(rest, min(len(rest), config.count - len(strongest))) if len(rest) else []
    generator = np.random.default_rng(config.seed)
    sampled = [int(generator.choice(stratum)) for stratum in strata]
    return {**dict.fromkeys(strongest.tolist(), "strongest"), **dict.fromkeys(sampled, "sampled")}


class _Describer:
    """Turns a survey into records of the chosen latents; reads each chunk of the token store at most once."""

    def __init__(self, seen: Survey, tokens: TokenStore, config: FeaturesConfig, chosen: Sequence[int]) -> None:
        self.seen, self.tokens, self.config = seen, tokens, config
        shown = [one for latent in chosen for table in (seen.top, seen.sample) for one in table.of(latent)]
        self._contexts = _contexts(tokens, {position // tokens.context_length for _, position, _ in shown})
        self._spots: dict[int, tuple[list[_Spot], list[list[_Spot]]]] = {}

    def spots(self, latent: int) -> list[_Spot]:
        """All firings of a latent to be shown."""
        top = [self._spot(latent, *firing) for firing in self.seen.top.of(latent)]
        drawn = self.seen.sample.of(latent)
        ranked = sorted(drawn, key=lambda firing: (abs(firing[0]), firing[1]))
        shown = {spot.document for spot in top}
        weaker: list[list[_Spot]] = []
        for low, high in QUARTERS:
            quarter = set(ranked[int(low * len(ranked)) : int(high * len(ranked))])
            weaker.append([])
            for firing in drawn:  # in the order of the draw, which is random: no pick within a quarter is favoured
                if firing in quarter and firing[2] not in shown and len(weaker[-1]) < self.config.weaker:
                    shown.add(firing[2])
                    weaker[-1].append(self._spot(latent, *firing))
            weaker[-1].sort(key=lambda spot: -abs(spot.value))
        self._spots[latent] = top, weaker
        return top + [spot for band in weaker for spot in band]

    def feature(self, latent: int, group: Group, values: dict[tuple[int, int], float], there: set[int]) -> Feature:
        """The record of a latent whose `spots` were asked for, from the values around them."""
        top, weaker = self._spots[latent]
        fired = int(self.seen.fired[latent])
        sampled = [self._token(position) for _, position, _ in self.seen.sample.of(latent)]
        common = sorted(Counter(sampled).items(), key=lambda item: (-item[1], item[0]))[:FREQUENT]
        bands = [
            Band(low=low, high=high, examples=[self._example(spot, values, there) for spot in band])
            for (low, high), band in zip(QUARTERS, weaker, strict=True)
            if band
        ]
        return Feature(
            latent=latent,
            group=group,
            fired=fired,
            density=_short(fired / self.seen.rows),
            max=_short(self.seen.max[latent]),
            mean=_short(self.seen.total[latent] / max(fired, 1)),
            histogram=_bins(self.seen.histogram[latent]),
            sampled=len(sampled),
            frequent=[TokenCount(token=token, count=count) for token, count in common],
            top=[self._example(spot, values, there) for spot in top],
            bands=bands,
        )

    def _example(self, spot: _Spot, values: dict[tuple[int, int], float], there: set[int]) -> Example:
        places = range(spot.first, spot.stop)
        around = [_short(values.get((spot.latent, p), 0.0)) if p in there else None for p in places]
        peak = spot.position - spot.first
        around[peak] = _short(spot.value)  # as ranked: another batch shape may round it otherwise
        tokens = [self._token(place) for place in places]
        return Example(
            position=spot.position, document=spot.document, value=_short(spot.value), peak=peak, tokens=tokens,
            activations=around,
        )  # fmt: skip

    def _spot(self, latent: int, value: float, position: int, document: int) -> _Spot:
        context, place = divmod(position, self.tokens.context_length)
        first = max(0, place - self.config.before)
        stop = min(self._contexts[context][1], place + self.config.after + 1)
        if place >= stop:
            raise DamagedStore(
                f"{self.tokens.path}: context {context} ends before token {place}, of which there is a row"
            )
        begin = context * self.tokens.context_length
        return _Spot(latent, value, position, document, begin + first, begin + stop)

    def _token(self, place: int) -> int:
        context, at = divmod(place, self.tokens.context_length)
        return int(self._contexts[context][0][at])


def _contexts(tokens: TokenStore, wanted: set[int]) -> dict[int, tuple[np.ndarray, int]]:
    """Tokens [T] of each wanted context, and how many of them are real."""
    found: dict[int, tuple[np.ndarray, int]] = {}
    for _, part in groupby(sorted(wanted), lambda context: context // tokens.arrays["tokens"].chunk_rows):
        inside = list(part)
        first, stop = inside[0], inside[-1] + 1
        text, lengths = tokens.contexts(first, stop), tokens.lengths(first, stop)
        found |= {context: (text[context - first].copy(), int(lengths[context - first])) for context in inside}
    return found


def _values_around(
    sae: Dictionary, dataset: Dataset, spots: Sequence[_Spot], progress: Progress, device: torch.device
) -> tuple[dict[tuple[int, int], float], set[int]]:
    """The values of the spots' latents on every token around them, by (latent, place), and the places that have a row.

    Reads every window's positions, but decodes and encodes only the rows it needs.
    """
    store = dataset.inputs[0]
    values: dict[tuple[int, int], float] = {}
    there: set[int] = set()
    wanted = np.unique([place for spot in spots for place in range(spot.first, spot.stop)])
    shown = np.zeros(sae.d_sae, bool)
    shown[[spot.latent for spot in spots]] = True
    progress.start("features: reading contexts", len(store.manifest.windows), "windows")
    try:
        for window in store.manifest.windows:
            if window.start >= dataset.n_rows:
                break
            stop = min(window.stop, dataset.n_rows)
            position = store.positions(window.start, stop)
            index = np.flatnonzero(np.isin(position, wanted))
            if len(index) and (kept := dataset.kept(window.start, stop)) is not None:
                index = index[kept[index]]
            there.update(position[index].tolist())
            for rows in np.split(index, np.flatnonzero(np.diff(index // store.chunk_rows)) + 1):
                for at in range(0, len(rows), BATCH_ROWS):
                    part = rows[at : at + BATCH_ROWS]
                    found = firings(sae, _gather(dataset, window.start + part).to(device))
                    keep = shown[found.latent]
                    place = position[part[found.row[keep]]]
                    keys = zip(found.latent[keep].tolist(), place.tolist(), strict=True)
                    values.update(zip(keys, found.value[keep].tolist(), strict=True))
            progress.advance(1)
    finally:
        progress.finish()
    return values, there


def _gather(dataset: Dataset, rows: np.ndarray) -> torch.Tensor:
    """Rows of one chunk of the first store, decoded: float32 [n, d_in]."""
    store, *others = dataset.inputs
    if others:  # whose chunks may be of other sizes
        return dataset.read(int(rows[0]), int(rows[-1]) + 1)[torch.from_numpy(rows - rows[0])]
    chunk = int(rows[0]) // store.chunk_rows
    encoded = store.encoded_chunk(chunk)
    inside = torch.from_numpy(rows - chunk * store.chunk_rows)
    scale = None if encoded.row_scale is None else encoded.row_scale[inside]
    return store.decoded(Encoded(encoded.rows[inside], scale))


def _bins(counts: np.ndarray) -> list[Bin]:
    """The bins from the first to the last that hold anything."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    edges = 2.0 ** (LOWEST_OCTAVE + np.arange(len(counts) + 1) / BINS_PER_OCTAVE)
    inside = range(int(filled[0]), int(filled[-1]) + 1)
    return [Bin(low=_short(edges[i]), high=_short(edges[i + 1]), count=int(counts[i])) for i in inside]


def _mentioned(features: Sequence[Feature]) -> set[int]:
    examples = [e for f in features for e in [*f.top, *(e for band in f.bands for e in band.examples)]]
    return {t for e in examples for t in e.tokens} | {c.token for f in features for c in f.frequent}


def _short(value: float) -> float:
    """Round to six significant digits, as many as float32 arithmetic makes certain."""
    return float(f"{value:.6g}")
