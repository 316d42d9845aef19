"""The settings of `sae train`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.massive import OutlierRule
from sae.cache.runs import CONFIG, Run
from sae.configs.base import REAL
from sae.pipeline.saes import AnyConfig, parse
from sae.pipeline.saes.config import beyond
from sae.pipeline.train.alignment import AlignConfig
from sae.pipeline.train.resampling import NoRevival, Reinitialise, Resample
from sae.pipeline.train.schedules import DecoderRate, Schedule

Beta = Annotated[float, Field(ge=0, lt=1)]
Revival = Annotated[NoRevival | Resample | Reinitialise, Field(discriminator="kind")]
Outliers = Annotated[OutlierRule, BeforeValidator(lambda said: _outlier_rule(said))]
REVISION = 8
"""Of what settings mean. Before 8 Adam's decay rates were 0.9 and 0.999 where none were given. Before 7 the L0 of
penalties without thresholds was to be the target at once, and a gate never trained the decoder. Before 5 JumpReLU had
no AuxK, and thresholds learned at three times the encoder's rate; before 4 the coefficient of an L1 penalty followed L0
three times as closely; before 3 thresholds learned at the encoder's rate, and before 2 AuxK's coefficient was a weight
by itself; but for the decay rates there was no word for these."""
BETAS_BEFORE = [0.9, 0.999]  # as JSON has them
LEAST_STEPS, MOST_PASSES = 1000, 20  # of a training that nobody says the length of
STREAM = ("batch", "steps", "rows", "data_seed", "outliers")  # what dictionaries trained together must agree on


class TrainConfig(Schedule):
    """How one dictionary is trained. What is left unset follows from the width and the store (`settled`)."""

    alternatives = (("steps", "rows"),)

    sae: AnyConfig = Field(
        parse({"arch": "topk"}), description="the dictionary: its architecture and that architecture's settings"
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="learning rate of Adam, the encoder's where decoder says another for the decoder; unset: 7e-4 "
        "times the root of 16,384 / d_sae, at most 4e-3; of what is no sparse dictionary 3e-3 (molt) or 1e-3",
    )
    betas: tuple[Beta, Beta] | None = Field(
        None,
        description="Adam's decay rates; unset: 0.7 and 0.99, or 0.9 and 0.999 of molt, vae, nvae and fsq",
    )
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    decoder: DecoderRate | None = Field(
        DecoderRate(ratio=3.0),
        description="learning rate of the decoder's weights and bias, and its own schedule; null: the same",
    )
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    accumulate: int = Field(1, ge=1, description="parts a batch is computed in, to hold less of it at a time")
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "auto",
        description="of matrix products, tf32 being float32 whose factors an Nvidia card (capability 8.0 on) rounds to "
        "11 bits; weights, optimiser and the values kept are float32 in any case; auto: bfloat16 on a CUDA device that "
        "has it in hardware (from compute capability 8.0 on), where that was measured to cost nothing (what keeps k "
        "latents, jumprelu, l1, gated), float32 otherwise",
    )
    kernels: Literal["auto", "plain"] = Field(
        "auto",
        description="sparse products, choices and the update on a CUDA device: by Triton kernels where these can be "
        "compiled (auto), or by torch's own operations (plain)",
    )
    revive: Revival = Field(NoRevival(), description="what is done about dead latents between steps")
    align: AlignConfig | None = Field(
        None, description="pull the dictionaries of several seeds towards each other; null: each by itself"
    )
    batch: int = Field(4096, ge=1, description="rows in a batch")
    steps: int | None = Field(
        None,
        ge=1,
        description="steps to train; unset: what rows takes, else one pass over the store, or as many as make 1,000 "
        "steps, at most 20",
    )
    rows: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        None, description="rows each dictionary sees, instead of steps, all being one pass; unset: what steps take"
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
    checkpoint_every: int | None = Field(
        None,
        ge=1,
        description="steps between two checkpoints; unset: 1,000, on a card as many times that as keep it at work for "
        "ten times what one takes to write",
    )
    snapshots: int = Field(
        0, ge=0, le=1000, description="log-spaced steps whose directions are kept, for `analyze()`'s emergence; 0: none"
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> Self:
        if self.steps is not None and self.rows is not None:
            raise ValueError(f"steps = {self.steps} and rows = {self.rows}: give one of them")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate = {self.accumulate} parts of a batch of {self.batch} rows; lower it")
        if isinstance(self.revive, Reinitialise) and not self._keeps_k:
            raise ValueError(f"revive.kind = reinitialise needs an architecture with k; sae.arch = {self.sae.arch}")
        return self

    @property
    def _keeps_k(self) -> bool:
        """Whether the number of latents that are kept is given."""
        return hasattr(self.sae, "k") and "k" not in self.sae.idle

    def precision_on(self, halves: bool) -> str:
        """The precision of products; halves: on a device that takes them many times as fast in bfloat16."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if halves and (self._keeps_k or self.sae.half_products) else "float32"

    def total_steps(self, store_rows: int) -> int:
        """Steps this run takes on a store of that many rows."""
        if self.steps is not None:
            return self.steps
        return max(1, (self.rows if isinstance(self.rows, int) else store_rows) // self.batch)

    def unfinished(self, total: int) -> list[str]:
        """Lengths, as they are said, that a training of so many steps ends before."""
        parts = {
            "sae": self.sae.unfinished(total),
            "revive": self.revive.unfinished(total),
            "align": beyond(self.align, total) if self.align else [],
        }
        arch = {"sae": f" ({self.sae.arch})"}
        return [
            f"train.{part}.{name} = {getattr(getattr(self, part), name):g}{arch.get(part, '')}"
            for part, names in parts.items()
            for name in names
        ]

    def snapshot_steps(self, total: int) -> set[int]:
        """The steps that snapshots are kept of: as many as are asked for, or fewer, from the first to the last."""
        if not self.snapshots:
            return set()
        last = max(1, self.snapshots - 1)
        return {round(total ** (place / last)) for place in range(self.snapshots)} | {total}

    def settled(self, store_rows: int) -> Self:
        """These settings, what they leave unset decided for a store of that many rows."""
        rows = self.store_rows or store_rows
        found: dict[str, Any] = {"store_rows": rows, "lr": self.rate, "betas": self.decay_rates}
        if self.steps is None and self.rows is None:
            found["steps"] = usual_steps(rows, self.batch)
        return self.model_copy(update=found)

    @property
    def steps_to_checkpoint(self) -> int:
        """Steps between two checkpoints, at least."""
        return self.checkpoint_every or 1000

    @property
    def rate(self) -> float:
        """The learning rate: lr, or the usual one of the architecture and its width."""
        return self.lr or self.sae.usual_rate

    @property
    def decay_rates(self) -> tuple[float, float]:
        """Adam's decay rates: betas, or the usual ones of the architecture."""
        return self.betas or self.sae.usual_betas

    def rates_at(self, step: int, total: int) -> tuple[float, float]:
        """Learning rates of step 0, 1, ...: the encoder's and the decoder's."""
        again = 1.0
        if isinstance(self.revive, Resample) and self.revive.rewarm:
            since = self.revive.since(step, total)
            again = 1.0 if since is None else min(1.0, (since + 1) / self.revive.rewarm)
        rate = self.rate * again * self.factor(step, total)
        if self.decoder is None:
            return rate, rate
        return rate, self.rate * again * self.decoder.ratio * self.decoder.factor(step, total)


def usual_steps(store_rows: int, batch: int) -> int:
    """The steps on a store where nothing says how many: small stores are gone through several times."""
    one_pass = max(1, store_rows // batch)
    return max(one_pass, min(LEAST_STEPS, MOST_PASSES * store_rows // batch))


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


def _as_now(settings: dict[str, Any], revision: int) -> dict[str, Any]:
    """Settings of a revision, said as they are now.

    The first runs left out no rows and did not say so; without steps and rows there was one pass.
    """
    sae = settings.get("sae")
    assumed: dict[str, Any] = {}
    if revision < 8:
        settings = {"betas": BETAS_BEFORE} | settings
    if revision < 2:
        settings = {"outliers": None} | settings
        if settings.get("steps") is None and settings.get("rows") is None:
            settings |= {"rows": "all"}
        assumed |= {"aux_share": "none"} if isinstance(sae, dict) and "aux_coefficient" in sae else {}
    if revision < 5 and isinstance(sae, dict) and sae.get("arch") in ("jumprelu", "clt"):
        if sae["arch"] == "jumprelu" or sae.get("sparsity") == "jumprelu":
            assumed |= {"threshold_rate": 1.0 if revision < 3 else 3.0}
            sae = sae | {"aux_coefficient": 0.0}  # a clt's was there and counted for nothing
        else:
            sae = {name: value for name, value in sae.items() if name != "threshold_rate"}
    if revision < 7 and isinstance(sae, dict) and sae.get("arch") == "gated":
        assumed |= {"gate_to_decoder": 0.0}
    return settings | {"sae": assumed | sae} if isinstance(sae, dict) else settings


def expect_same_meaning(run: Run, config: TrainConfig) -> None:
    """Raise SaeError for a run of before whose training would go on as another one than it began."""
    free = getattr(config.sae, "decoder_norm", None) == "free"
    steered = getattr(config.sae, "target_l0", None) is not None
    variational = dict.fromkeys(("vsae_iso", "vsae_mix", "vsae_multi"), 2)
    steered_since = {"jumprelu": 2, "clt": 2, "molt": 2} | variational
    meant = {
        "train.align.weight": run.revision < 2 and config.align is not None,
        "train.sae.target_l0": steered and run.revision < steered_since.get(config.sae.arch, 7),
        "train.sae.decoder_norm = free": run.revision < 2 and free and config.sae.arch != "l1",
    }
    for name, asked in meant.items():
        if asked:
            raise SaeError(
                f"{run.path}: was begun by an earlier version, in which {name} meant something else; finish it with "
                "that version, or train again under another `name`"
            )


def settings_of(run: Run) -> TrainConfig:
    """Return the settings of a run. Raises DamagedStore, naming its file and the setting, where there are none.

    Raises SaeError for an imported dictionary.
    """
    if run.imported is not None:
        raise SaeError(
            f"{run.path}: was trained by another tool, and is only judged here; train one under another `name`"
        )
    try:
        return TrainConfig.model_validate(_as_now(run.settings, run.revision))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["train", *map(str, first["loc"])])
        said = first["msg"].removeprefix("Value error, ")
        raise DamagedStore(f"{run.path / CONFIG}: {where}: {said}; train again under another `name`") from error
