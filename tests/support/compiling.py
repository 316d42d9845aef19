"""Compiles every kernel for a card, which needs none: a program of its own, since tests run kernels in the interpreter.

python -m support.compiling [CAPABILITY]      prints a line a kernel

Triton does it as at a launch, for what it is given: the number 1 is a constant, and what is aligned is known to be.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sae.pipeline.saes.kernels import counting, lists, products, rows, select, uncounted, update
from sae.pipeline.saes.uncounted import Asked


class Card:
    """What Triton asks of a card before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def main() -> None:
    driver.set_active(Card(int(sys.argv[1]) if len(sys.argv) > 1 else 90))
    done: set[str] = set()

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        made = kernel.run(*args, grid=grid, warmup=True, enable_fp_fusion=True, **constants)
        if made.hash not in done:
            done.add(made.hash)
            sys.stdout.write(f"{kernel.fn.__name__} shared {made.metadata.shared}\n")

    for family in (counting, lists, products, rows, select, uncounted, update):
        family.launch = launch
    for sizes in ((8, 24_576, 768, 32), (1, 1, 1, 1)):
        every_kernel(*sizes)
    for width in (products.MOST_COLUMNS, 3 * update.MOST_COLUMNS):
        wide(width)


def every_kernel(b: int, m: int, d: int, k: int) -> None:
    """b rows of width d, of m latents k active in a row."""
    table, batch, indices = torch.empty(m, d), torch.empty(b, d), torch.zeros(b * k, dtype=torch.int64)
    starts, weights, v = torch.zeros(b, dtype=torch.int64), torch.empty(b * k), torch.empty(m)
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.empty(b, m, dtype=dtype)
        select.rows(p, k)
        select.batch(p, b * k)
    products.mixed(starts, indices, weights, table)
    products.dots(starts, indices, batch, table)
    products.by_latent(torch.zeros(m, dtype=torch.int64), indices, indices, weights, batch)
    for rest in (batch[:1], batch):
        products.compared(starts, indices, weights, table, rest, batch)
    rows.tangent_(table, table)
    rows.unit_(table)
    every = {"pulls": v, "width": 0.1, "to_p": True}
    for asked, dtype in (
        (Asked("steps", v, **every), torch.bfloat16), (Asked("tanh", v, weights=v, **every), torch.float32),
        (Asked("power", v, power=0.5), torch.bfloat16),
        (Asked("linear", v, weights=v, gain=v, offset=v, gates=True), torch.float32),
    ):  # fmt: skip
        given = torch.empty(b, m, dtype=dtype), v, batch, table, v, table, asked, dtype == torch.bfloat16
        uncounted.backward(*given, *uncounted.forward(*given)[:4])
    updated({"unit": table, "free": batch, "not negative": weights})
    counts = torch.zeros(m, dtype=torch.int64)
    counting.fired(weights, indices, m)
    counting.follow_(counts, v, counts, b, 0.5)
    for counted in (True, False):
        counting.lead_(weights[:1], counts[:1], counting.least(weights), counted, 0.02)


def wide(width: int) -> None:
    """What rows of a width take that is not often seen."""
    table, starts = torch.empty(64, width), torch.zeros(2, dtype=torch.int64)
    if width <= products.MOST_COLUMNS:
        products.compared(starts, starts, table[0, :2], table, table[:1], table[:2])
    updated({"unit": table})


def updated(kept: dict[str, Tensor]) -> None:
    for clip in (None, 1.0):
        tables = [update.Table(*4 * (of,), torch.zeros(()), 0.1, how) for how, of in kept.items()]
        update.adam(tables, clip, (0.9, 0.999), 1e-8)


if __name__ == "__main__":
    main()
