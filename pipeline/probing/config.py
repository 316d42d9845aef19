"""The settings of `sae probe`."""

from typing import Annotated, Literal

from pydantic import Field

from sae.configs.base import Amount, Distinct, Settings

Pool = Literal["mean", "last"]


class ProbeConfig(Settings):
    """How labelled texts are read and probed."""

    text_column: str = Field("text", description="column of the texts")
    label_column: str = Field("label", description="column of the labels")
    pool: Pool = Field(
        "mean",
        description="what stands for a text: the mean over its tokens of each latent (mean), or its last token's",
    )
    ks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Distinct] = Field(
        (1, 2, 5, 16), min_length=1, description="numbers of latents that a probe reads"
    )
    splits: int = Field(3, ge=1, le=1000, description="times that texts are split anew into training and test ones")
    texts: Amount = Field(4096, description="texts of a set, drawn at random where it has more")
    max_tokens: int = Field(
        128, ge=2, description="tokens of a text that are read: its first ones, its last ones where the last one counts"
    )
    test: float = Field(0.25, gt=0, lt=1, description="share of each class that is kept for the test")
    classes: int = Field(20, ge=2, description="most classes that labels may be of; above that they are numbers")
    batch_tokens: int = Field(4096, ge=1, description="tokens in a forward pass")
