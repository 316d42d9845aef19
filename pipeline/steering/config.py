"""Settings of steering."""

from typing import Annotated, Literal

from pydantic import Field

from sae.cache.errors import SaeError
from sae.configs.base import Distinct, Settings

LEAST = 4  # contexts of a text: two to choose latents by, two to judge them on
Place = Annotated[int, Field(ge=0)]


class SteerConfig(Settings):
    """How a latent is changed, where, and what is looked at then."""

    mode: Literal["add", "clamp", "ablate"] = Field(
        "add",
        description="add: so much is added to the latent; clamp: it is put to so much; ablate: to 0. The dictionary's "
        "error stays in",
    )
    unit: Literal["max", "norm", "raw"] = Field(
        "max",
        description="of a strength. max: the latent's largest activation; norm (with add): the mean norm of the site's "
        "rows, along the latent's direction; raw: the latent's own",
    )
    positions: Literal["all", "last"] | Annotated[tuple[Place, ...], Field(min_length=1), Distinct] = Field(
        "all",
        description="tokens whose activations change. all: of prompt and continuation, but for those that never become "
        "rows; last: from the prompt's last one on; 3 or 2-5: these, from 0",
    )
    length: int = Field(40, ge=0, le=1 << 20, description="tokens to generate")
    temperature: float = Field(0.0, ge=0, description="0: the likeliest token is taken; else tokens are drawn")
    seed: int = Field(0, ge=0, description="seed of what is drawn")
    predictions: int = Field(10, ge=1, description="next tokens that are named")
    rows: int = Field(65_536, ge=1, description="rows of the store in which the unit is measured")
    top: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), Distinct] = Field(
        (1, 4, 16), description="latents that are zeroed, those that tell a topic best"
    )
    context: int = Field(64, ge=8, description="tokens in a context of a topic's text")
    contexts: int = Field(
        128, ge=LEAST, description="contexts of a topic's and of general text, the first half to choose latents by"
    )


def expect_strengths(strengths: tuple[float, ...], mode: str) -> tuple[float, ...]:
    """Strengths as they are asked for. SaeError for none, for what is no number, and for what comes twice."""
    if mode == "ablate":
        if strengths:
            raise SaeError(f"strength = {strengths[0]:g}: `mode = ablate` takes none; leave it out, or use clamp")
        return (0.0,)
    if not strengths:
        raise SaeError("strength = ...: how much is not said; give a number, as `strength = 4`, or several")
    for number in strengths:
        if not -1e30 < number < 1e30:  # NaN is in no range
            raise SaeError(f"strength = {number:g}: is not a finite number below 1e30; give one such as 4 or -0.5")
    if twice := [number for i, number in enumerate(strengths) if number in strengths[:i]]:
        raise SaeError(f"strength = {twice[0]:g}: is there twice; give each once")
    return strengths
