"""A causal transformer that forecasts the next row of a series: how much is in what it reads.

It reads rows [B, T, d] and says at each the next one, from that row and those before it. What it says is a linear map
of the row, which begins as the row itself (the forecast of persistence), and what the transformer adds.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sae.cache.errors import SaeError

BATCH = 32  # contexts in a step
SCORED = 256  # contexts in a pass without gradients
WARMUP = 0.1  # share of the steps over which the rate rises; then it falls as a cosine
CLIP = 1.0  # largest gradient norm


@dataclass(frozen=True)
class Size:
    """What every forecaster of a study has in common: blocks and heads, rows read, steps and rate of its training."""

    width: int
    depth: int
    heads: int
    past: int
    updates: int
    lr: float


@dataclass(frozen=True, eq=False)
class Order:
    """Which row follows which: the rows are in time, and `follows` bool [n - 1] says where there is no gap."""

    follows: Tensor

    @cached_property
    def begins(self) -> Tensor:
        """int64: rows that another follows, so that there is something to forecast from them."""
        return self.follows.nonzero()[:, 0]

    @cached_property
    def ends(self) -> Tensor:
        """int64 [n]: the last row of the stretch without a gap that each row is in."""
        gaps = torch.cat([(~self.follows).nonzero()[:, 0], torch.tensor([len(self.follows)])])
        return gaps[torch.searchsorted(gaps, torch.arange(len(self.follows) + 1))]

    def contexts(self, begin: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rows [B, length + 1] from some on, and whether the next follows each but the last: bool [B, length]."""
        rows = torch.minimum(begin[:, None] + torch.arange(length + 1), self.ends[begin, None])
        return rows, rows[:, 1:] > rows[:, :-1]

    def every(self, length: int) -> Tensor:
        """The first rows of contexts that have every row to forecast from in them, once."""
        first = torch.ones(len(self.follows) + 1, dtype=torch.bool)
        first[1:] = ~self.follows
        starts = first.nonzero()[:, 0]
        offset = torch.arange(len(first)) - starts[torch.searchsorted(starts, torch.arange(len(first)), right=True) - 1]
        offset = offset[self.begins]
        return self.begins[offset % length == 0]


class Forecaster(nn.Module):
    """The transformer: learned positions, blocks with their norm first, a linear readout."""

    def __init__(self, d: int, size: Size) -> None:
        super().__init__()
        self.skip = nn.Linear(d, d)
        self.into, self.out = nn.Linear(d, size.width), nn.Linear(size.width, d)
        self.position = nn.Parameter(0.02 * torch.randn(size.past, size.width))
        block = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, size.depth, nn.LayerNorm(size.width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size.past), persistent=False)
        with torch.no_grad():
            self.skip.weight.copy_(torch.eye(d))
            for zero in (self.skip.bias, self.out.weight, self.out.bias):
                zero.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        """The rows [B, T, d] that follow each of those read [B, T, d]."""
        t = rows.shape[1]
        hidden = self.blocks(self.into(rows) + self.position[:t], mask=self.get_buffer("mask")[:t, :t], is_causal=True)
        return self.skip(rows) + self.out(hidden)


def trained(
    rows: Tensor, targets: Tensor, order: Order, size: Size, seed: int, advance: Callable[[int], None]
) -> Forecaster:
    """A forecaster of the targets [n, d] from rows [n, d] of the same places: row i is to say target i + 1.

    The same seed begins with the same weights and sees the same places. Raises SaeError where it diverges.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Forecaster(rows.shape[1], size)
    model.to(rows.device)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.01)
    warm = max(1, round(WARMUP * size.updates))

    def share(step: int) -> float:
        fallen = max(0, step - warm) / max(1, size.updates - warm)
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * fallen)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    for _ in range(size.updates):
        begin = order.begins[torch.randint(len(order.begins), (BATCH,), generator=random)]
        places, there = order.contexts(begin, size.past)
        loss = mse_loss(model(rows[places[:, :-1]])[there], targets[places[:, 1:]][there])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        advance(1)
    if not loss.isfinite():
        raise SaeError(f"study.denoise.forecast_lr = {size.lr:g}: the forecaster diverged; lower it")
    return model.eval()


@torch.no_grad()
def forecasts(model: Forecaster, rows: Tensor, order: Order, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
    """Every row that follows another, once: the places int64 [b], and what was said of them [b, d]."""
    for begin in order.every(size.past).split(SCORED):
        places, there = order.contexts(begin, size.past)
        yield places[:, 1:][there], model(rows[places[:, :-1]])[there]
