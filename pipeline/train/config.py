"""The settings of `sae train`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.massive import OutlierRule
from sae.cache.runs import CONFIG, Run
from sae.configs.base import REAL
from sae.pipeline.saes import AnyConfig, parse
from sae.pipeline.train.alignment import AlignConfig
from sae.pipeline.train.resampling import NoRevival, Reinitialise, Resample
from sae.pipeline.train.schedules import DecoderRate, Schedule

Beta = Annotated[float, Field(ge=0, lt=1)]
Revival = Annotated[NoRevival | Resample | Reinitialise, Field(discriminator="kind")]
Outliers = Annotated[OutlierRule, BeforeValidator(lambda said: _outlier_rule(said))]
STREAM = ("batch", "steps", "rows", "data_seed", "outliers")  # what dictionaries trained together must agree on


class TrainConfig(Schedule):
    """Settings of one dictionary's training. One pass over the store unless `steps` or `rows` say otherwise."""

    alternatives = (("steps", "rows"),)

    sae: AnyConfig = Field(
        parse({"arch": "topk"}), description="the dictionary: its architecture and that architecture's settings"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate of Adam")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's decay rates")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    decoder: DecoderRate | None = Field(
        None, description="learning rate of the decoder's weights and bias, and its own schedule; null: the same"
    )
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    accumulate: int = Field(1, ge=1, description="parts a batch is computed in, to hold less of it at a time")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of matrix products; weights, optimiser and the values kept are float32 either way"
    )
    revive: Revival = Field(NoRevival(), description="what is done about dead latents between steps")
    align: AlignConfig | None = Field(
        None, description="pull the dictionaries of several seeds towards each other; null: each by itself"
    )
    batch: int = Field(4096, ge=1, description="rows in a batch")
    steps: int | None = Field(None, ge=1, description="steps to train; null: one pass over the store")
    rows: Annotated[int | None, BeforeValidator(lambda rows: None if rows == "all" else rows)] = Field(
        None, ge=1, description="rows each dictionary sees, instead of steps; null: one pass over the store"
    )
    store_rows: int | None = Field(
        None, ge=1, description="train on the first so many rows of the store; null: on all it has when the run begins"
    )
    seed: int = Field(0, ge=0, description="seed of the initial weights and of what training draws")
    data_seed: int = Field(0, ge=0, description="seed of the order of the rows")
    outliers: Outliers = Field(
        "auto",
        description="rows to leave out wherever training reads rows: auto, the few massive ones that a store has; a "
        "number, those whose norm is above so many medians of norms; none: keep all",
    )
    initial_rows: int = Field(16_384, ge=1, description="rows from which the bias and the input scale are set")
    log_every: int = Field(50, ge=1, description="steps between two lines of metrics")
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.steps is not None and self.rows is not None:
            raise ValueError(f"steps = {self.steps} and rows = {self.rows}: give one of them")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate = {self.accumulate} parts of a batch of {self.batch} rows; lower it")
        if isinstance(self.revive, Reinitialise) and not hasattr(self.sae, "k"):
            raise ValueError(f"revive.kind = reinitialise needs an architecture with k; sae.arch = {self.sae.arch}")
        return self

    def total_steps(self, store_rows: int) -> int:
        """Steps this run takes on a store of that many rows."""
        if self.steps is not None:
            return self.steps
        return max(1, (store_rows if self.rows is None else self.rows) // self.batch)

    def rates_at(self, step: int, total: int) -> tuple[float, float]:
        """Learning rates of step 0, 1, ...: the encoder's and the decoder's."""
        again = 1.0
        if isinstance(self.revive, Resample) and self.revive.rewarm:
            since = self.revive.since(step, total)
            again = 1.0 if since is None else min(1.0, (since + 1) / self.revive.rewarm)
        rate = self.lr * again * self.factor(step, total)
        if self.decoder is None:
            return rate, rate
        return rate, self.lr * again * self.decoder.ratio * self.decoder.factor(step, total)


def _outlier_rule(said: Any) -> Any:
    """The word none as what it means. Raises ValueError for what is no rule."""
    if said in ("auto", "none", None):
        return None if said == "none" else said
    try:
        if 1 < float(said) < REAL:
            return float(said)
    except (TypeError, ValueError):
        pass
    raise ValueError("input should be auto, none or a number above 1, as 10")


def settings_of(run: Run) -> TrainConfig:
    """Return the settings of a run. Raises DamagedStore, naming its file and the setting, where there are none.

    Raises SaeError for an imported dictionary.
    """
    if run.imported is not None:
        raise SaeError(
            f"{run.path}: was trained by another tool, and is only judged here; train one under another `name`"
        )
    try:
        return TrainConfig.model_validate({"outliers": None, **run.settings})  # the first runs left out no rows
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["train", *map(str, first["loc"])])
        said = first["msg"].removeprefix("Value error, ")
        raise DamagedStore(f"{run.path / CONFIG}: {where}: {said}; train again under another `name`") from error
