"""Data parallel training on the CPU: two processes of one thread, against one process of one thread and of two.

    python bench/parallel.py [--batch 2048] [--d-in 768] [--d-sae 8192] [--steps 2] [--rounds 5] [--json]

The step of `sae train` (`CoupledTrainers.step`, TopK) on batches in memory. Both processes are started once; in every
round they take some steps together, and then the first takes as many on whole batches, with one thread and with two,
while the other waits. Rates are medians over rounds, ratios medians of ratios within a round, so that a machine that
other work slows down slows all of them. Beside wall time there is CPU time, which tells what two processes add in work.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import subjects
from bench.planted import planted_rows
from bench.rows import Row, show
from sae.cache.activations import ActivationStore
from sae.cache.loader.loader import Batch
from sae.pipeline.parallel.launcher import launch
from sae.pipeline.parallel.ranks import Ranks, SingleRank
from sae.pipeline.parallel.torch_distributed import DistributedRanks
from sae.pipeline.saes import Clock
from sae.pipeline.train.coupled import CoupledTrainers
from sae.pipeline.train.trainer import Trainer

ROWS = 16_384  # from which the bias and the scale are set
TOGETHER, ONE, TWO = "2 processes, 1 thread each", "1 process, 1 thread", "1 process, 2 threads"


def taken(member: Trainer, x: torch.Tensor, ranks: Ranks, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of some steps."""
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        CoupledTrainers([member], None).step(Batch(x, x), Clock(member.done, subjects.STEPS), ranks)
    return time.perf_counter() - wall, time.process_time() - used


def work(ranks: DistributedRanks, device: str, home: Path, args: argparse.Namespace) -> None:
    """One rank's part of the measurement; rank 0 prints it."""
    store = ActivationStore(next((home / "cache").glob("*/*")))
    settings = subjects.settings({"arch": "topk", "d_sae": args.d_sae}, batch=args.batch)
    joint, solo = (subjects.member(settings, store, home, f"{kind}-{ranks.rank}") for kind in ("joint", "solo"))
    x = planted_rows(args.batch, args.d_in, 1)
    share = x.tensor_split(ranks.world)[ranks.rank]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (TOGETHER, ONE, TWO)}
    for round in range(args.rounds + 1):
        torch.set_num_threads(1)
        ranks.barrier()
        wall, used = taken(joint, share, ranks, args.steps)
        found[TOGETHER].append((wall, ranks.sum(torch.tensor(used, dtype=torch.float64)).item()))
        for name, threads in ((ONE, 1), (TWO, 2)):
            if ranks.rank == 0:
                torch.set_num_threads(threads)
                found[name].append(taken(solo, x, SingleRank(), args.steps))
        ranks.barrier()
        if round == 0:  # the first is slower everywhere
            for seconds in found.values():
                seconds.clear()
    if ranks.rank == 0:
        report(found, args)


def report(found: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    rows = []
    for name, seconds in found.items():
        rate = statistics.median(args.batch * args.steps / wall for wall, _ in seconds)
        faster = median_ratio(found, name, lambda ours, its: its[0] / ours[0])
        rows.append(Row(name, rate, "rows/s", faster, f"{ONE}, rows/s"))
    for name, seconds in found.items():
        used = statistics.median(used / args.steps for _, used in seconds)
        rows.append(
            Row(f"{name}: CPU", 1e3 * used, "ms/step", median_ratio(found, name, lambda a, b: a[1] / b[1]), ONE)
        )
    title = f"data parallel, TopK {args.d_in} -> {args.d_sae}, batch {args.batch}"
    show(title, rows, as_json=args.json)


def median_ratio(
    found: dict[str, list[tuple[float, float]]],
    name: str,
    ratio: Callable[[tuple[float, float], tuple[float, float]], float],
) -> float:
    return statistics.median(ratio(one, other) for one, other in zip(found[name], found[ONE], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 2048), ("d-in", 768), ("d-sae", 8192), ("steps", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        subjects.planted_store(Path(folder) / "cache", ROWS, args.d_in)
        launch(2, "cpu", work, Path(folder), args)


if __name__ == "__main__":
    main()
