"""What becomes of a dictionary whose decoder learns faster than its encoder, with and without the encoder slowing down.

The decoder's learning rate is the encoder's times a ratio and stays there after its warm-up. The encoder's either stays
as well or falls along a half-cosine to 0, from the end of its warm-up to the last step. Everything else is the base's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sae.cache.loader.dataset import Dataset
from sae.pipeline.metrics.figures import label
from sae.pipeline.report.compare import Row
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.study import Lab, Result, Trial, of_equal_rows
from sae.pipeline.train.schedules import DecoderRate
from sae.pipeline.train.stage import TrainConfig

RATIOS = (1.0, 2.0, 4.0, 8.0)
Decay = Literal["none", "cosine"]
DECAYS: tuple[Decay, ...] = ("none", "cosine")

LABELS = ("ratio", "encoder_decay")
FIRST = ("fvu", "l0", "dead_fraction", "encoder_decoder_cosine")
DRAWN = (*FIRST, "ce_degradation")
ITSELF = ("decoder", "decay", "shape")  # settings that the study decides


def rates(
    base: TrainConfig, dataset: Dataset, lab: Lab, *, ratios: Sequence[float] = RATIOS,
    decays: Sequence[Decay] = DECAYS, seeds: int = 1,
) -> Result:  # fmt: skip
    """A run for every ratio of decoder to encoder learning rate and every decay of the encoder's."""
    base = of_equal_rows(base, [dataset])
    trials = [
        Trial({"ratio": ratio, "encoder_decay": decay}, decoupled(base, ratio, decay), dataset)
        for decay in decays
        for ratio in ratios
    ]
    rows = lab.rows([seeded for trial in trials for seeded in trial.seeded(seeds)])
    return Result("rates", LABELS, columns(*FIRST), rows, draw)


def decoupled(base: TrainConfig, ratio: float, decay: Decay) -> TrainConfig:
    """The base with a decoder that learns at `ratio` times lr, and the encoder's decay."""
    encoder = {"decay": 0.0} if decay == "none" else {"decay": 1 - base.warmup, "shape": "half_cosine"}
    return base.model_copy(update={**encoder, "decoder": DecoderRate(ratio=ratio, warmup=base.warmup, decay=0)})


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each figure against the ratio, a curve a decay."""
    decays = list(dict.fromkeys(row["encoder_decay"] for row in rows))

    def panel(name: str) -> Panel:
        points = {
            f"encoder decay: {d}": [(r["ratio"], r[name]) for r in rows if r["encoder_decay"] == d] for d in decays
        }
        ticks = sorted({row["ratio"] for row in rows})
        return Panel(label(name), "decoder's learning rate over the encoder's", points, log_x=True, ticks=ticks)

    draw_panels([panel(name) for name in DRAWN], path)
