"""The gradients of a batch: part by part, in the precision of the settings, and with several ranks the mean of all."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from sae.cache.loader.loader import Batch
from sae.pipeline.parallel.ranks import Ranks
from sae.pipeline.saes import Clock, Losses, Trainable
from sae.pipeline.train.config import TrainConfig


def loss_of(sae: Trainable, config: TrainConfig, part: Batch, clock: Clock) -> Losses:
    """The loss of a part of a batch."""
    with torch.autocast(part.x.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return sae.loss(part.x, part.y, clock)


def take_gradients(
    saes: Sequence[Trainable], total: Callable[[Batch, Clock], Tensor], batch: Batch, parts: int, clock: Clock,
    ranks: Ranks,
) -> None:  # fmt: skip
    """Give the parameters their gradients of a loss over a batch, of which this is a rank's share, cut into parts.

    total: the loss of a part, a scalar. What ranks exchange of a gradient is on its way while others are computed.
    """
    for parameter in (one for sae in saes for one in sae.parameters()):
        parameter.grad = None
    first, last = ranks.rank * len(batch.x), parts - 1
    for i, part in enumerate(batch.split(parts)):
        loss, share = total(part, clock._replace(first=first)), len(part.x) / len(batch.x)
        first += len(part.x)
        with ranks.averaging(_as_they_come(saes)) if i == last else nullcontext():
            (loss if share == 1 else loss * share).backward()


def _as_they_come(saes: Sequence[Trainable]) -> list[nn.Parameter]:
    """All parameters, those first that are large and whose gradients come first, which are the decoder's."""
    groups = sorted((group for sae in saes for group in sae.parameter_groups()), key=lambda one: one.side != "decoder")
    return sorted((one for group in groups for one in group.parameters), key=lambda one: -one.numel())
