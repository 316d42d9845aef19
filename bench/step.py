"""What a training step costs, in multiples of the encoder floor: the one `x @ W_enc` no dense encoder can avoid.

    python bench/step.py [--arch topk,l1] [--precision float32,bfloat16] [--threads 1,2] [--peers PYTHON] [--json]
                         [--d-sae 1024,4096,8192,16384,65536] [--batch 256,1024,2048,8192] [--no-clip] [--device cuda]
    python bench/step.py --count [--arch topk,l1] [--dictionaries 1,2,8]

A step is all that `sae train` does with a batch (`CoupledTrainers.step`): loss, backward, clipping, dead counters,
decoder projection, fused Adam, renormalisation. Every repetition runs the floor and then the step, so that a busy
machine slows both; figures are medians of ratios, of CPU time with one thread and of wall time with more. The floor is
always the float32 one. Architectures whose sparsity is learned are timed at one per cent of their latents active, which
is where they spend most of a training. With several widths or batches, each has a table of its own.

`--peers` names an interpreter that has sae_lens, dictionary_learning and eai-sparsify: their own steps in turns with
ours, in the same shape, in a process of their own (bench/step_peers.py).

With `--device cuda` all of that is on the card, which is given ten steps before it is waited for. `--count` times
nothing and needs no card: it says how many operations a step gives to a device that runs ahead, and how often it waits,
of one dictionary or of several of one shape on the same batch.
"""

import argparse
import functools
import math
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import torch
from support.watching import watched
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bench import subjects
from bench.peer import Peer
from bench.planted import planted_rows
from bench.rows import Row, show, timed
from bench.step_peers import CASES
from sae.cache.activations import ActivationStore
from sae.pipeline.saes import kernels, placement, uncounted
from sae.pipeline.train.trainer import Trainer

ROWS = 16_384  # from which the bias and the scale are set


def clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def seconds(function: Callable[[], object], threads: int, device: str) -> float:
    return timed(function, device, clock(threads) if device == "cpu" else time.perf_counter)


def cases(args: argparse.Namespace, store: ActivationStore, runs: Path, size: tuple[int, int]) -> dict[str, Trainer]:
    """The dictionaries to time: each architecture, TopK also with dead latents, L1 also before it is sparse."""
    batch, d_sae = size
    sample = planted_rows(min(batch, 2048), store.d, 1).to(args.device)
    made: dict[str, Trainer] = {}
    for precision in args.precision.split(","):

        def add(arch: str, what: str, precision: str = precision) -> Trainer:
            title = arch + what + ("" if precision == "float32" else f", {precision}")
            sae = {"arch": arch, "d_sae": d_sae} | (
                {"k": args.k} if arch in ("topk", "batchtopk", "matryoshka") else {}
            )
            clip = {"clip": None} if args.no_clip else {}
            config = subjects.settings(sae, batch=batch, precision=precision, **clip)
            made[title] = subjects.member(config, store, runs, str(len(made)), args.device)
            return made[title]

        for arch in args.arch.split(","):
            if arch == "topk":
                subjects.kill_latents(add(arch, f" with {d_sae // 16} dead latents").sae, d_sae // 16)
            if arch == "l1":
                add(arch, " at its start")
            if subjects.learns_its_sparsity(subjects.settings({"arch": arch}).sae):
                subjects.make_sparse(add(arch, " at 1 % active").sae, sample, 0.01)
            else:
                add(arch, "")
    return made


def own_step(member: Trainer, batches: list[Tensor], threads: int) -> Callable[[], float]:
    """A function that makes the member's next step and gives its seconds."""
    where = str(batches[0].device)
    return lambda: seconds(lambda: subjects.take_step(member, batches[member.done % len(batches)]), threads, where)


def measure(args: argparse.Namespace, threads: int, size: tuple[int, int]) -> list[Row]:
    """The floor and every step, of one batch size and one width."""
    torch.set_num_threads(threads)
    batch, d_sae = size
    batches = [planted_rows(batch, args.d_in, seed).to(args.device) for seed in range(4)]
    weights = torch.randn(d_sae, args.d_in, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        store = subjects.planted_store(Path(folder), max(ROWS, batch), args.d_in)
        members = cases(args, store, Path(folder), size)
    steps = {name: own_step(member, batches, threads) for name, member in members.items()}
    if args.peers is not None:
        steps |= peers(args, threads, size)
    floors: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in steps}
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(args.warmup + args.steps):
        for name, step in steps.items():
            floor = seconds(lambda: batches[0] @ weights.T, threads, args.device)
            taken = step()
            if repetition >= args.warmup and not math.isnan(taken):
                floors.append(floor)
                times[name].append(taken)
                ratios[name].append(taken / floor)
    where = f"{threads} thread" + ("s" if threads > 1 else "")
    reference = f"encoder floor, batch {batch}, {args.d_in} -> {d_sae}, {where}"
    rows = [Row(reference, 1e3 * statistics.median(floors), "ms", 1.0, reference)]
    for name in (name for name in steps if times[name]):
        taken, ratio = 1e3 * statistics.median(times[name]), statistics.median(ratios[name])
        rows.append(Row(name, taken, "ms", ratio, reference))
    return rows


def peers(args: argparse.Namespace, threads: int, size: tuple[int, int]) -> dict[str, Callable[[], float]]:
    """Steps of the other tools that the interpreter has: each makes one step and says its seconds."""
    clock = "cpu" if threads == 1 and args.device == "cpu" else "wall"
    given = (size[0], args.d_in, size[1], args.k, threads, clock, args.device)
    peer = Peer(args.peers, "step_peers.py", *map(str, given))
    if peer.missing:
        print(f"--peers {args.peers}: no interpreter with torch; left out", file=sys.stderr)
        return {}
    return {case: lambda case=case: peer.rate(case) for case in CASES}  # type: ignore[misc]


def counts(archs: list[str], dictionaries: list[int]) -> Iterator[Row]:
    """How many operations a step gives to a device that runs ahead, by torch's own operations and by kernels.

    Nothing of it depends on sizes but blocks of very large batches, so they are small: kernels run in the interpreter.
    """
    os.environ.setdefault("TRITON_INTERPRET", "1")
    placement.HOSTS.clear()
    kernels.INTERPRETED = True
    launched, launch = Counter[str](), kernels.launch

    def counted(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        launched.update([kernel.fn.__name__])
        with _disable_current_modes():  # the interpreter's own operations are no device's
            launch(kernel, grid, *args, **constants)

    for family in ("counting", "lists", "products", "rows", "select", "uncounted", "update"):
        kernels.family(family).launch = counted
    x = planted_rows(4, 8, 0)
    for arch, way, count in product(archs, ("plain", "auto"), dictionaries):
        sae = {"arch": arch, "d_sae": 64} | ({"k": 2} if arch in ("topk", "batchtopk", "matryoshka") else {})
        config = subjects.settings(sae, batch=4, kernels=way)
        with tempfile.TemporaryDirectory() as folder:
            store = subjects.planted_store(Path(folder), 256, 8)
            members = [subjects.member(config, store, Path(folder), str(number)) for number in range(count)]
        for member in members:
            if subjects.learns_its_sparsity(member.config.sae):
                subjects.make_sparse(member.sae, x, uncounted.FEW / 2)
        step = subjects.together(members, len(x))
        step(x)  # the first logs
        launched.clear()
        found = watched(functools.partial(step, x))
        total, own = found.launched.total() + launched.total(), launched.total()
        title = f"{arch}, {way}" + (f", {count} together" if count > 1 else "")
        yield Row(title, total, "ops", own, f"kernels; {len(found.waited)} waits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="topk,l1", help="architectures, comma-separated")
    parser.add_argument("--d-sae", default="8192", help="latents; one or several")
    parser.add_argument("--batch", default="2048", help="rows in a batch; one or several")
    for name, default in {"d-in": 768, "k": 32, "steps": 9, "warmup": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="float32", help="float32, bfloat16, or both, comma-separated")
    parser.add_argument("--threads", default="1,2", help="thread counts, comma-separated")
    parser.add_argument("--no-clip", action="store_true", help="without clipping of the gradient's norm")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter with the other tools; default: none of them")
    parser.add_argument("--json", action="store_true", help="machine-readable rows on stdout")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--count", action="store_true", help="count operations and waits; time nothing")
    parser.add_argument("--dictionaries", default="1", help="how many together, of --count; one or several numbers")
    args = parser.parse_args()
    if args.count:
        found = counts(args.arch.split(","), [*map(int, args.dictionaries.split(","))])
        show("operations of a step on a GPU", [*found], as_json=args.json)
        return
    threads, batches, widths = ([*map(int, text.split(","))] for text in (args.threads, args.batch, args.d_sae))
    rows = [
        row
        for number in threads
        for batch in batches
        for d_sae in widths
        for row in measure(args, number, (batch, d_sae))
    ]
    show(f"training step, medians of {args.steps}", rows, as_json=args.json)


if __name__ == "__main__":
    main()
