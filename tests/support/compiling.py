"""Compiles every kernel for a card, which needs none: a program of its own, since tests run kernels in the interpreter.

python -m support.compiling [CAPABILITY]      prints a line a kernel
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sae.pipeline.saes import kernels
from sae.pipeline.saes.kernels import counting, lists, products, rows, select, uncounted, update
from sae.pipeline.saes.uncounted import Asked

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
WARPS = 4


def compiled(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget) -> str:
    """What one launch would have compiled, and the registers and shared memory it takes."""
    options = {name: constants.pop(name) for name in ("num_warps",) if name in constants}
    signature = dict(zip(kernel.arg_names, map(kind, args), strict=False)) | dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
    return f"{kernel.fn.__name__} {signature.get('p', '')} shared {made.metadata.shared}"


def kind(given: Any) -> Any:
    """The type of what a kernel is given, as the compiler has it."""
    if isinstance(given, tuple):
        return tuple(map(kind, given))
    return "*" + TYPES[given.dtype] if isinstance(given, Tensor) else "fp32" if isinstance(given, float) else "i32"


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        seen.append((kernel, args, constants))

    for family in (counting, lists, products, rows, select, uncounted, update):
        family.launch = launch
    b, m, d, k = 8, 24_576, 768, 32
    table, batch, indices = torch.empty(m, d), torch.empty(b, d), torch.zeros(b * k, dtype=torch.int64)
    starts, weights = torch.zeros(b, dtype=torch.int64), torch.empty(b * k)
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.empty(b, m, dtype=dtype)
        select.rows(p, k)
        select.batch(p, b * k)
    products.mixed(starts, indices, weights, table)
    products.dots(starts, indices, batch, table)
    products.by_latent(torch.zeros(m, dtype=torch.int64), indices, indices, weights, batch)
    for width in (d, kernels.covering(10**9, 1, products.MOST_COLUMNS)):
        aim = torch.empty(b, width)
        products.compared(starts, indices, weights, torch.empty(64, width), aim[0], aim)
    rows.tangent_(table, table)
    rows.unit_(table)
    v = torch.empty(m)
    every = {"pulls": v, "width": 0.1, "to_p": True}
    for asked, dtype in (
        (Asked("steps", v, **every), torch.bfloat16), (Asked("tanh", v, weights=v, **every), torch.float32),
        (Asked("power", v, power=0.5), torch.bfloat16),
        (Asked("linear", v, weights=v, gain=v, offset=v, gates=True), torch.float32),
    ):  # fmt: skip
        given = torch.empty(b, m, dtype=dtype), v, batch, table, v, table, asked, dtype == torch.bfloat16
        uncounted.backward(*given, *uncounted.forward(*given)[:4])
    long = torch.empty(2, 3 * update.MOST_COLUMNS)
    for clip in (None, 1.0):
        kept: dict[str, Tensor] = {"unit": table, "free": batch, "not negative": weights}
        for one in (kept, {"unit": long}):
            tables = [update.Table(*4 * (of,), weights[:1], 0.1, how) for how, of in one.items()]
            update.adam(tables, clip, (0.9, 0.999), 1e-8)
    counts = torch.zeros(m, dtype=torch.int64)
    counting.fired(weights, indices, m)
    counting.follow_(counts, table[:, 0], counts, b, 0.5)
    counting.lead_(weights[:1], counts[:1], counting.least(weights), True, 0.02)
    done: set[str] = set()
    for kernel, args, constants in seen:
        said = str((kernel.fn.__name__, [kind(one) for one in args], constants))
        if said not in done:
            done.add(said)
            sys.stdout.write(compiled(kernel, args, constants, target) + "\n")


if __name__ == "__main__":
    main()
