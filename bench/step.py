"""What a training step costs, in multiples of the encoder floor: the one `x @ W_enc` no dense encoder can avoid.

A step is all of it: loss, backward, dead counters, decoder projection, Adam(fused=True), renormalisation.
Every repetition runs the floor and then the step, so that a busy machine slows both; figures are medians of ratios, of
CPU time with one thread and of wall time with more. Architectures whose sparsity is learned are timed at one per cent
of their latents active, which is where they spend most of a training. The floor is always the float32 one.

    python bench/step.py [--arch topk,l1] [--precision float32,bfloat16] [--threads 1,2] [--batch 2048] [--json]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from bench.rows import Row, show
from pipeline import saes
from pipeline.saes.fixed_k import FixedKConfig
from pipeline.saes.jl import JLConfig
from pipeline.saes.jumprelu import JumpReLUConfig


def planted_rows(count: int, width: int, seed: int) -> Tensor:
    """Sparse sums of 4 * width unit features plus a little noise: what a dictionary meets. [count, width]"""
    generator = torch.Generator().manual_seed(seed)
    features = normalize(torch.randn(4 * width, width, generator=generator), dim=1)
    which = torch.randint(0, 4 * width, (count, 24), generator=generator)
    sizes = 2 * torch.rand(count, 24, generator=generator)
    noise = 0.05 * torch.randn(count, width, generator=generator)
    return embedding_bag(which, features, per_sample_weights=sizes, mode="sum") + noise


def training_step(sae: saes.SAE, batches: list[Tensor], precision: str) -> Callable[[], None]:
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5, fused=True)
    done = 0

    def step() -> None:
        nonlocal done
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            losses = sae.loss(batches[done % len(batches)], clock=saes.Clock(done, 10**9))
        optimizer.zero_grad()
        losses.total.backward()
        sae.track(losses)
        sae.before_step()
        optimizer.step()
        sae.after_step()
        done += 1

    return step


def seconds(function: Callable[[], object], threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def fresh(arch: str, args: argparse.Namespace, sample: Tensor) -> saes.SAE:
    sae = saes.create(saes.parse({"arch": arch, "d_sae": args.d_sae}), args.d_in)
    sae.initialise(sample)
    return sae


def sparse(sae: saes.SAE, sample: Tensor, share: float) -> saes.SAE:
    """The same with biases, or thresholds, at which a share of the latents is active."""
    p = next(sae._preactivations(sample * sae.scale).blocks())[1]
    bound = p.flatten().kthvalue(int((1 - share) * p.numel())).values
    if isinstance(sae.config, JumpReLUConfig):
        sae.get_parameter("threshold").data.fill_(bound)
    else:
        sae.b_enc.data.fill_(-bound)
    return sae


def cases(args: argparse.Namespace, sample: Tensor) -> dict[str, saes.SAE]:
    """The dictionaries to time: each architecture, TopK also with dead latents, L1 also before it is sparse."""
    made = {}
    for arch in args.arch.split(","):
        sae = fresh(arch, args, sample)
        if isinstance(sae.config, FixedKConfig):
            made[arch] = sae
            if arch == "topk":
                other, dead = fresh(arch, args, sample), args.d_sae // 16
                other.b_enc.data[:dead] = -3.0
                other.rows_since_fired[:dead] = 10**12
                made[f"topk with {dead} dead latents"] = other
        elif isinstance(sae.config, JLConfig):
            made[arch] = sae
        else:
            made[f"{arch} at 1 % active"] = sparse(sae, sample, 0.01)
            if arch == "l1":
                made["l1 at its start"] = fresh(arch, args, sample)
    return made


def measure(args: argparse.Namespace, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    batches = [planted_rows(args.batch, args.d_in, seed) for seed in range(4)]
    weights = torch.randn(args.d_sae, args.d_in)
    floors: list[float] = []
    steps: dict[str, Callable[[], None]] = {}
    for precision in args.precision.split(","):
        for name, sae in cases(args, batches[0]).items():
            title = name if precision == "float32" else f"{name}, {precision}"
            steps[title] = training_step(sae, batches, precision)
    times: dict[str, list[float]] = {name: [] for name in steps}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(args.warmup + args.steps):
        for name, step in steps.items():
            floor = seconds(lambda: batches[0] @ weights.T, threads)
            taken = seconds(step, threads)
            if repetition >= args.warmup:
                floors.append(floor)
                times[name].append(taken)
                ratios[name].append(taken / floor)
    where = f"{threads} thread" + ("s" if threads > 1 else "")
    reference = f"encoder floor, {where}"
    rows = [Row(reference, 1e3 * statistics.median(floors), "ms", 1.0, reference)]
    for name in steps:
        taken, ratio = 1e3 * statistics.median(times[name]), statistics.median(ratios[name])
        rows.append(Row(f"{name} step, {where}", taken, "ms", ratio, reference))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="topk,l1", help="architectures, comma-separated")
    sizes = {"batch": 2048, "d-in": 768, "d-sae": 8192, "steps": 9, "warmup": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="float32", help="float32, bfloat16, or both, comma-separated")
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated")
    parser.add_argument("--json", action="store_true", help="machine-readable rows on stdout")
    args = parser.parse_args()
    rows = [row for threads in args.threads.split(",") for row in measure(args, int(threads))]
    title = f"step: batch {args.batch}, d_in {args.d_in}, d_sae {args.d_sae}, medians of {args.steps} steps"
    show(title, rows, as_json=args.json)


if __name__ == "__main__":
    main()
