"""Records (`features.json`) of the latents of a dictionary: how often, how strongly and on which text they fire.

Nothing here needs a cache or a model: the records carry the bytes of every token they mention.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

BINS_PER_OCTAVE = 2
LOWEST_OCTAVE = -16
BINS = 64  # values from 2^-16 to 2^16; what lies outside counts in the first or last bin
EDGES = [2.0 ** (LOWEST_OCTAVE + i / BINS_PER_OCTAVE) for i in range(BINS + 1)]

Group = Literal["strongest", "sampled", "asked"]
Latent = Annotated[int, Field(serialization_alias="feature")]
"""The number of a latent: `latent` in `features.json`, `feature` in whatever commands print."""


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(Record):
    """One firing of a latent, with the tokens around it.

    The peak is the token whose row fired: `tokens[peak]`, at `position` (context * T + place) of the token store.
    `activations` holds the latent's value on every token, 0 where it is silent and None where the token has no row
    in the cache (the harvest left it out), so that silence is never confused with not having looked. Of rows that come
    from no text, both are empty, and `position` is the row's in its source.
    """

    position: int
    document: int
    value: float
    peak: int
    tokens: list[int]
    activations: list[float | None]

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if len(self.tokens) != len(self.activations) or not 0 <= self.peak < max(len(self.tokens), 1):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.activations)} activations, peak {self.peak}")
        return self


class Band(Record):
    """Random firings between two quantiles (0 to 1) of the magnitudes of a latent's own activations."""

    low: float
    high: float
    examples: list[Example]


class Bin(Record):
    """A number of activations with a magnitude in [low, high)."""

    low: float
    high: float
    count: int


class TokenCount(Record):
    token: int
    count: int


class Partner(Record):
    """A latent that fires with another: Jaccard index and phi (None: undefined) of their rows, `error` of the former.

    The error is one standard deviation, 0 where no row was left out of the sample.
    """

    latent: Latent
    jaccard: float
    phi: float | None
    error: float


class Neighbour(Record):
    """A latent whose decoder direction is near another's."""

    latent: Latent
    cosine: float


class TokenWeight(Record):
    """A token, and what a unit of a latent adds to its logit."""

    token: int
    weight: float


class Feature(Record):
    """One latent: how often (`density`: share of rows), how strongly, and where it fires.

    `max` and `mean` are of magnitudes; values of examples have their sign. `frequent` counts the tokens under a uniform
    random sample of `sampled` of its firings. `rates` are its densities in equal parts of the rows. `promoted` and
    `suppressed` are the tokens that its decoder direction makes likelier and less likely, read with the model's
    unembedding. What was not found is empty.
    """

    latent: Latent
    group: Group
    fired: int
    density: float
    max: float
    mean: float
    histogram: list[Bin]
    sampled: int
    frequent: list[TokenCount]
    top: list[Example]
    bands: list[Band]
    rates: list[float] = []
    partners: list[Partner] = []
    nearest: list[Neighbour] = []
    promoted: list[TokenWeight] = []
    suppressed: list[TokenWeight] = []


class Features(Record):
    """Some latents of a dictionary, and what they were looked up in.

    `live` of `d_sae` latents fired in the `rows` first rows of `store`. `vocabulary` maps each token mentioned to its
    bytes, written as latin-1 (one character a byte). `begin` is the token that starts a document.
    """

    store: str
    split: str
    rows: int
    d_sae: int
    live: int
    begin: int
    vocabulary: dict[int, str]
    features: list[Feature]

    def bytes_of(self, token: int) -> bytes:
        """The bytes a token stands for."""
        return self.vocabulary[token].encode("latin-1")
