"""What a second, third, ... dictionary on the same stream of batches costs: its own step, and nothing else.

    python bench/train_shared.py [--dictionaries 1,4,8] [--arch topk] [--batch 4096] [--d-in 768] [--d-sae 4096]
                                 [--rounds 3] [--threads 1] [--device cuda] [--json]

Real trainings (`train`) of so many dictionaries, in turns, over one pass of an int8 store of 49,152 rows, opening and
decoding of the store's chunks included, without what is done once at the beginning and the end. Overhead is the time of
the loop less that of the dictionaries' own steps, over the latter. With one thread CPU time counts: the whole
process's (with the threads that read and decode) for the loop, the training thread's for a step. With more the clock.
On a card (`--device cuda`) dictionaries take their steps as one where they can: that of each is its part of it. There
every step is waited for.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import subjects
from bench.rows import Row, show
from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.train import stacked, stage
from sae.pipeline.train.sweep import open_all

ROWS = 49_152  # three chunks


@dataclass
class Times(Silent):
    """Seconds of a training's loop, from before the first batch to after the last step, and of the steps in it."""

    now: Callable[[], float]
    steps: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0

    def start(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.began = self.now()

    def advance(self, n: int, **fields: float | int | str) -> None:
        self.ended = self.now()

    @property
    def overhead(self) -> float:
        """Of the steps' time."""
        return (self.ended - self.began) / sum(self.steps) - 1


def noting(seconds: list[float], now: Callable[[], float], device: str) -> AbstractContextManager[object]:
    """Note the seconds of every step of a dictionary."""

    def timed(*args: Any) -> list[stacked.Logged]:
        begun = now()
        logged = stacked.taken(*args)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.extend(len(logged) * [(now() - begun) / len(logged)])
        return logged

    return patch.object(stage, "taken", timed)


def trained(store: ActivationStore, dictionaries: int, args: argparse.Namespace) -> Times:
    """One training of so many dictionaries that differ in their seed."""
    sae = {"arch": args.arch, "d_sae": args.d_sae}
    configs = [
        subjects.settings(sae, batch=args.batch, rows="all", seed=seed, checkpoint_every=10**9)
        for seed in range(dictionaries)
    ]
    by_clock = args.threads > 1 or args.device != "cpu"
    times = Times(time.perf_counter if by_clock else time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        runs = open_all(configs, Dataset.of(store), Path(folder))
        with noting(times.steps, time.perf_counter if by_clock else time.thread_time, args.device):
            stage.train(runs, Dataset.of(store), times, device=args.device)
    return times


def measure(args: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(args.threads)
    numbers = [*map(int, args.dictionaries.split(","))]
    overheads: dict[int, list[float]] = {number: [] for number in numbers}
    steps: dict[int, list[float]] = {number: [] for number in numbers}
    ratios: dict[int, list[float]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        store = subjects.planted_store(Path(folder), ROWS, args.d_in)
        for _ in range(args.rounds):
            found = {number: trained(store, number, args) for number in numbers}
            for number, times in found.items():
                overheads[number].append(times.overhead)
                steps[number].append(statistics.median(times.steps))
                ratios[number].append(steps[number][-1] / steps[numbers[0]][-1])
    rows = []
    for number in numbers:
        reference = f"that of {numbers[0]} together"
        step, ratio = 1e3 * statistics.median(steps[number]), statistics.median(ratios[number])
        rows.append(Row(f"{number} together: step of each", step, "ms", ratio, reference))
        rows.append(Row(f"{number} together: overhead, %", 100 * statistics.median(overheads[number]), "", 1, "itself"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionaries", default="1,4,8", help="how many are trained together; one or several numbers")
    parser.add_argument("--arch", default="topk")
    for name, default in {"batch": 4096, "d-in": 768, "d-sae": 4096, "rounds": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="machine-readable rows on stdout")
    args = parser.parse_args()
    shape = f"batch {args.batch}, {args.d_in} -> {args.d_sae}"
    show(f"dictionaries on one stream: {args.arch}, {shape}", measure(args), as_json=args.json)


if __name__ == "__main__":
    main()
