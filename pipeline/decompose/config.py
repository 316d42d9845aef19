"""The settings of `sae decompose`: what all decompositions have, and what is decomposed."""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sae.configs.base import MOST, REAL, Settings, distinct
from sae.pipeline.decompose.components import Gate


class DecomposeConfig(Settings):
    """How a decomposition is trained."""

    kind: str
    components: int = Field(256, ge=1, le=MOST, description="rank-one components of each matrix")
    gate: Gate = Field(
        "scalar",
        description="what says how important a component is, a small MLP of its own each: it reads the component's "
        "inner activation (scalar) or all that the matrix reads (vector)",
    )
    gate_hidden: int = Field(16, ge=1, le=MOST, description="width of such an MLP's hidden layer")
    delta: bool = Field(
        True, description="whether what the components leave of a matrix is masked at random like a component"
    )
    warmup: int = Field(200, ge=0, description="steps before the first in which faithfulness alone is trained")
    warmup_lr: float = Field(0.01, gt=0, le=REAL, description="learning rate of these")
    faithfulness: float = Field(
        1.0, ge=0, description="weight of the squared error of the sums of components, a share of the weights' squares"
    )
    stochastic: float = Field(1.0, ge=0, description="weight of the divergence with every matrix masked at random")
    layerwise: float = Field(1.0, ge=0, description="weight of the mean divergence with one matrix masked at random")
    importance: float = Field(
        3e-3, ge=0, description="weight of importances, by which few components come to be important"
    )
    p: float = Field(1.0, gt=0, le=8, description="power of importances")
    p_end: float | None = Field(
        None, gt=0, le=8, description="power at the last step, to which it moves evenly; null: the same"
    )
    samples: int = Field(1, ge=1, le=1024, description="masks drawn for each batch")
    lr: float = Field(1e-3, gt=0, le=REAL, description="learning rate, which falls to 0 as half a cosine")
    factor_rate: float = Field(
        4.0,
        gt=0,
        le=1000,
        description="learning rate of what components read by and write, as a multiple of the gates', which is lr",
    )
    batch: int = Field(1024, ge=1, le=MOST, description="rows, contexts or samples in a step")
    steps: int = Field(10_000, ge=1, description="steps to train")
    seed: int = Field(0, ge=0, description="of what is drawn at random")
    log_every: int = Field(100, ge=1, description="steps between two lines of metrics.jsonl")
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    threshold: float = Field(
        0.1, ge=0, lt=1, description="importance above which a component counts as active, where they are counted"
    )
    judged: int = Field(16, ge=1, description="held-out batches that the finished decomposition is judged on")

    @field_validator("matrices", mode="after", check_fields=False)
    @classmethod
    def _none_twice(cls, value: Any) -> Any:
        return distinct(value)

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not self.stochastic and not self.layerwise:
            raise ValueError(
                "stochastic = 0.0 and layerwise = 0.0: nothing says what components are for; set one of them"
            )
        return self

    @property
    def transposes(self) -> dict[str, str]:
        """Which matrices have the components of another one, whose transposes they are, by their names."""
        return {}

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0 on."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    def power(self, step: int) -> float:
        """The power of importances at a step."""
        if self.p_end is None or self.steps == 1:
            return self.p
        return self.p + (self.p_end - self.p) * step / (self.steps - 1)


class LocalConfig(DecomposeConfig):
    """Matrices of one MLP, on what it read and gave: two stores of activations."""

    kind: Literal["local"] = Field("local", description="what is decomposed")
    matrices: tuple[str, ...] = Field((), description="names of matrices, or ends of names, with * for anything")


class LiveConfig(DecomposeConfig):
    """Matrices of a language model, by what its predictions become: tokens, and the model in every step."""

    kind: Literal["live"] = Field("live", description="what is decomposed")
    matrices: tuple[str, ...] = Field((), description="names of matrices, or ends of names, with * for anything")
    model: str = Field("gpt2", description="model: a hub's name, a folder, or tiny")
    revision: str | None = Field(None, description="commit of a hub's model; null: the newest")
    batch: int = Field(8, ge=1, le=MOST, description="rows, contexts or samples in a step")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.matrices:
            raise ValueError("matrices: none is named; say which, as 2.mlp.*")
        return self


class ToyConfig(DecomposeConfig):
    """Toy models of superposition, trained first: the test whose answer is known."""

    kind: Literal["toy"] = Field("toy", description="what is decomposed")
    features: int = Field(5, ge=1, le=MOST, description="features of the toy model")
    hidden: int = Field(2, ge=1, le=MOST, description="dimensions that they are squeezed into")
    identity: bool = Field(False, description="whether an identity matrix stands between the toy's two matrices")
    tied: bool = Field(
        True,
        description="whether the toy's second matrix, which is the first turned round, has the first's components "
        "turned round, too",
    )
    probability: float = Field(0.05, gt=0, le=1, description="chance of a feature to be in a sample")
    instances: int = Field(
        3, ge=1, le=10_000, description="toy models, each of a seed of its own, decomposed side by side"
    )
    toy_steps: int = Field(10_000, ge=1, description="steps to train the toy models")
    components: int = Field(20, ge=1, le=MOST, description="rank-one components of each matrix")
    delta: bool = Field(
        False, description="whether what the components leave of a matrix is masked at random like a component"
    )
    batch: int = Field(2048, ge=1, le=MOST, description="rows, contexts or samples in a step")

    @property
    def transposes(self) -> dict[str, str]:
        return {"out": "in"} if self.tied else {}


KINDS: tuple[type[DecomposeConfig], ...] = (LocalConfig, LiveConfig, ToyConfig)
