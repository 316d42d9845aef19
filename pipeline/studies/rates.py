"""A decoder that learns faster than its encoder, with and without the encoder slowing down.

The decoder's learning rate is the encoder's times a ratio and stays there after its warm-up. The encoder's either stays
as well or falls along a half-cosine to 0, from the end of its warm-up to the last step. Everything else is the base's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, PositiveFloat

from sae.pipeline.metrics.figures import label
from sae.pipeline.report.compare import Row
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.study import Setup, Study, register
from sae.pipeline.train.schedules import DecoderRate
from sae.pipeline.train.stage import TrainConfig

Decay = Literal["none", "cosine"]


@register
class Rates(Study):
    """A decoder that learns faster than its encoder, with and without the encoder slowing down.

    Examples:

        sae study rates --rows 50M
        sae study rates --arch l1 --ratios 1,4 --encoder-decay cosine
    """

    name = "rates"
    labels = ("ratio", "encoder_decay")
    shown = ("fvu", "l0", "dead_fraction", "encoder_decoder_cosine")
    decides = ("decoder", "decay", "shape")

    ratios: tuple[PositiveFloat, ...] = Field(
        (1.0, 2.0, 4.0, 8.0), description="learning rates of the decoder over the encoder's"
    )
    encoder_decay: tuple[Decay, ...] = Field(
        ("none", "cosine"), description="how the encoder's learning rate falls: none, cosine, or both"
    )

    def trials(self, setup: Setup) -> list[Trial]:
        return [
            setup.trial({"ratio": ratio, "encoder_decay": decay}, decoupled(setup.base, ratio, decay))
            for decay in get_args(Decay)
            if decay in self.encoder_decay
            for ratio in self.ratios
        ]

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        decays = list(dict.fromkeys(row["encoder_decay"] for row in rows))
        ticks = sorted({row["ratio"] for row in rows})

        def panel(name: str) -> Panel:
            points = {
                f"encoder decay: {d}": [(r["ratio"], r[name]) for r in rows if r["encoder_decay"] == d] for d in decays
            }
            return Panel(label(name), "decoder's learning rate over the encoder's", points, log_x=True, ticks=ticks)

        draw_panels([panel(name) for name in (*self.shown, "ce_degradation")], path)


def decoupled(base: TrainConfig, ratio: float, decay: Decay) -> TrainConfig:
    """Return the base with a decoder that learns at `ratio` times lr, and the encoder's decay."""
    encoder = {"decay": 0.0} if decay == "none" else {"decay": 1 - base.warmup, "shape": "half_cosine"}
    return base.model_copy(update={**encoder, "decoder": DecoderRate(ratio=ratio, warmup=base.warmup, decay=0)})
