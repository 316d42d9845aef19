"""Settings of explanations: which latents, on how much text, by whom, and at what price."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sae.configs.base import Amount, Distinct, Settings

LEAST = 4  # contexts of each kind that a latent is explained from and judged on
Scoring = Literal["detection", "fuzzing", "simulation"]


class ExplainConfig(Settings):
    """Which latents are explained and judged, on how much text, by whom, and at what price."""

    latents: Annotated[tuple[int, ...], Distinct] | None = Field(
        None, description="latents to explain, as 3,17,256 or 0-9; null: a draw of those that fire in enough contexts"
    )
    count: int = Field(50, ge=1, description="how many latents to explain, where none are named")
    backend: str = Field("tokens", description="who explains and judges: tokens (offline), openai or local")
    model: str | None = Field(
        None,
        description="language model that explains: a name that the server knows, a Hugging Face folder or name; "
        "null: none, which tokens takes",
    )
    base_url: str | None = Field(
        None, description="address of a server that speaks OpenAI's protocol; null: OPENAI_BASE_URL, else OpenAI's"
    )
    scoring: Annotated[tuple[Scoring, ...], Distinct] = Field(
        ("detection", "fuzzing", "simulation"), min_length=1,
        description="how explanations are judged: detection, fuzzing, simulation; the first is the score that is shown",
    )  # fmt: skip
    examples: int = Field(20, ge=LEAST, description="contexts a latent is explained from: the strongest, and random")
    active: int = Field(10, ge=LEAST, description="other contexts in which it fires that it is judged on")
    silent: int = Field(10, ge=LEAST, description="other contexts in which it does not fire that it is judged on")
    window: int = Field(32, ge=4, description="tokens of a context, at most")
    rows: Amount = Field(262_144, description="rows of the store that are searched for contexts")
    seed: int = Field(0, ge=0, description="seed of every random choice")
    concurrency: int = Field(8, ge=1, le=256, description="requests under way at a time")
    timeout: float = Field(60.0, gt=0, description="seconds until a request counts as failed")
    tries: int = Field(5, ge=1, le=20, description="tries of a request, with growing pauses in between")
    temperature: float | None = Field(0.0, ge=0, le=2, description="temperature of answers; null: the server's")
    answer_tokens: int = Field(1024, ge=16, description="tokens that an answer may have")
    structured: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="how the server is told the form of answers; none: by the words of the request alone"
    )
    price_in: float | None = Field(None, ge=0, description="price of a million tokens asked; null: not known")
    price_out: float | None = Field(None, ge=0, description="price of a million tokens answered; null: not known")
    most_tokens: int | None = Field(None, ge=0, description="tokens asked and answered, at most; null: no limit")
    most_cost: float | None = Field(
        None, ge=0, description="cost in the unit of the prices, at most, for which both are needed; null: no limit"
    )

    @model_validator(mode="after")
    def _a_limit_that_can_be_kept(self) -> Self:
        if self.most_cost is not None and (self.price_in is None or self.price_out is None):
            raise ValueError("most_cost needs price_in and price_out")
        return self

    def cost(self, asked: int, answered: int) -> float | None:
        """Return what so many tokens cost; None where no price is given."""
        if self.price_in is None and self.price_out is None:
            return None
        return (asked * (self.price_in or 0.0) + answered * (self.price_out or 0.0)) / 1e6
