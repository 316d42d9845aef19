"""kill -9 at random instants of real trainings: no checkpoint is lost or torn, and what comes out is always the same.

    python bench/train_drill.py [--kills 60] [--each N] [--only WORD,...] [--seed 0] [--json]

Every command of `COMMANDS` is one `sae train` (or sweep) on small stores: several architectures, what is no sparse
dictionary and what reads several stores, dead latents brought back, sparse AuxK, annealing, many dictionaries at once,
some of them pulled together. A process that has everything
loaded forks one child a training, and kills it: at a random time, or a random time after it began to write a
checkpoint, or to read one back, or to write the finished weights. The next child resumes what it finds; finished
folders are compared with those of a training that nobody interrupted, and the next command begins (with `--each`, after
so many kills at most). After each kill, with nothing repaired:

    unreadable   checkpoints, metrics or weights that a reader refuses, and locks that outlived their holder
    lost         checkpoints whose writing had returned in the child, but that are not there
    mismatches   tensors of the finished weights or of the last checkpoint (dictionary and optimiser), entries of its
                 state, configuration files, or logged metrics (but for what they say of time) that differ by a bit

All must be 0. `phases` says what the child was doing when it was killed, `staged` how often a kill left a checkpoint
that had been written, but was not yet the run's. A kill is not a power cut: what had not been flushed survives it.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork copies no threads, so there must be none

import torch
from torch import Tensor

from bench.children import Child, Say
from bench.subjects import member, planted_store, take_step
from sae.cache import activations
from sae.cache.activations import ActivationStore
from sae.cache.disk.durable import PARTIAL
from sae.cache.disk.locks import held
from sae.cache.disk.paths import listing
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG, STAGED, WEIGHTS_CONFIG, Run
from sae.cache.store.manifest import Windows
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import ARCHITECTURES
from sae.pipeline.train.coupled import CoupledTrainers
from sae.pipeline.train.stage import TrainConfig
from sae.pipeline.train.sweep import open_all, sweep

WIDTH, LATENTS, ROWS = 24, 1024, 1280
COMMON = {"batch": 64, "steps": 60, "initial_rows": 512, "log_every": 4, "checkpoint_every": 5, "lr": 1e-3}
FEW = {"dead_after": 640}  # rows without firing: ten steps, so that latents do die
RESAMPLE = {"kind": "resample", "rows": 512, "every": 12, "rewarm": 4}
REINITIALISE = {"kind": "reinitialise", "every": 20, "threshold": 0.1}
TOPK = {"arch": "topk", "k": 4, **FEW}

COMMANDS: dict[str, list[dict[str, Any]]] = {
    "topk, AuxK, annealed k": [{"sae": TOPK | {"k_start": 16}}],
    "batchtopk, begun again": [
        {"sae": {"arch": "batchtopk", "k": 4, "threshold_start": 20, **FEW}, "revive": REINITIALISE}
    ],
    "jumprelu, parts of a batch": [{"sae": {"arch": "jumprelu", "theta_init": 0.1}, "accumulate": 2}],
    "p_anneal": [{"sae": {"arch": "p_anneal", "coefficient": 0.2}, "decay": 0.2}],
    "topk, resampled": [{"sae": TOPK, "revive": RESAMPLE}],
    "a sweep: matryoshka, gated, jl": [
        {"sae": {"arch": "matryoshka", "k": 4}}, {"sae": {"arch": "gated"}}, {"sae": {"arch": "jl"}},
    ],
    "three seeds pulled together": [
        {"sae": TOPK, "seed": seed, "align": {"by": "dec", "every": 4, "warmup": 8}} for seed in range(3)
    ],
    "crosscoder": [{"sae": {"arch": "crosscoder", "k": 4, "d_sae": 64, **FEW}}],
    "clt": [{"sae": {"arch": "clt", "k": 4, "d_sae": 64, **FEW}}],
    "molt": [{"sae": {"arch": "molt", "target_l0": 4, **FEW}}],
    "fsq": [{"sae": {"arch": "fsq", "levels": [5, 5], "groups": 3}}],
    "vae": [{"sae": {"arch": "vae", "units": 8}}],
    "nvae": [{"sae": {"arch": "nvae", "units": 4, "hidden": 16}}],
}  # fmt: skip
"""The trainings: for each the settings of its dictionaries."""

SITES = ("resid_pre", "mlp_in", "mlp_out", "resid_post")
READ: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "crosscoder": (SITES, ()), "clt": (SITES[:2], SITES[2:]), "molt": (("mlp_in",), ("mlp_out",)),
}  # fmt: skip
"""The stores that a training reads and writes, where that is not the store of `mlp_out` alone."""

TIMES = ("seconds", "seconds_per_step")  # what metrics say of time
PHASES = {
    "begin": "opening",
    "read": "reading a checkpoint back",
    "step": "stepping",
    "write": "writing a checkpoint",
    "publish": "putting checkpoints in place",
    "finish": "writing the finished weights",
}
AIMED = ("anything", "anything", "write", "write", "publish", "publish", "read", "finish")
PATIENCE = 0.6  # of an uninterrupted training: most children are killed, and some see the end


@dataclass
class Drill:
    """What happened."""

    kills: int = 0
    unreadable: int = 0
    lost: int = 0
    mismatches: int = 0
    finished: int = 0  # commands trained to their end after kills, all their folders compared
    in_mid_write: int = 0  # kills that left a temporary file
    staged: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def told(run: Callable[[], object], say: Say) -> object:
    """Run a training that says what it does: a line `phase folder step` whenever something begins or has been done."""

    def telling(cls: type, name: str, phase: str, done: str = "") -> None:
        original = getattr(cls, name)

        def instead(subject: Any, *args: Any, **kwargs: Any) -> Any:
            say(f"{phase}\n".encode())
            result = original(subject, *args, **kwargs)
            if done:
                say(f"{done} {subject.name} {subject.checkpoint_step()}\n".encode())
            return result

        setattr(cls, name, instead)

    telling(Run, "load_checkpoint", "read")
    telling(Run, "stage_checkpoint", "write")
    telling(Run, "publish_checkpoint", "publish", "published")
    telling(Run, "save_weights", "finish")
    telling(CoupledTrainers, "step", "step")
    say(b"begin\n")
    return run()


class Training:
    """One command: its settings, and how often its uninterrupted training says each word."""

    def __init__(self, name: str, dictionaries: Sequence[dict[str, Any]], stores: Sequence[ActivationStore]) -> None:
        """stores: those of `SITES`, of which it reads its own."""
        self.name = name
        each = dict(zip(SITES, stores, strict=True))
        inputs, targets = READ.get(name, (("mlp_out",), ()))
        self.dataset = Dataset.of(tuple(each[site] for site in inputs), tuple(each[site] for site in targets))
        self.configs = [TrainConfig.model_validate(COMMON | one | {"sae": sized(one["sae"])}) for one in dictionaries]
        self.whole: dict[str, dict[str, Any]] = {}
        self.said: Counter[str] = Counter()
        self.seconds = 0.0

    def child(self, root: Path) -> Child:
        """Begin, or resume, the training in `root`."""
        data = self.dataset
        return Child(lambda say: told(lambda: sweep(open_all(self.configs, data, root), data, Silent()), say))

    def rehearse(self, root: Path) -> None:
        """Train without a kill, for what comes out and for how long it takes."""
        begun, child = time.monotonic(), self.child(root)
        assert not child.killed_after(600)
        self.seconds = time.monotonic() - begun
        self.said = Counter(line.split()[0] for line in child.said().decode().splitlines())
        child.close()
        self.whole = {run.name: outcome(run) for run in runs(root)}

    def kill(self, root: Path, chance: random.Random) -> tuple[Child, bool]:
        """A child, and whether it was killed before it was done."""
        child = self.child(root)
        aim, share, soon = chance.choice(AIMED), chance.random(), 0.004 * chance.random() ** 4
        if aim == "anything" or (aim == "read" and not any(run.has_checkpoint for run in runs(root))):
            return child, child.killed_after(share * PATIENCE * self.seconds)
        times = max(1, round(share * PATIENCE * self.said[aim]))
        return child, child.killed_after(soon, lambda said: said.count(aim.encode() + b"\n") >= times)


def sized(dictionary: dict[str, Any]) -> dict[str, Any]:
    """The settings of a dictionary with the usual number of latents, where it has latents and they do not say it."""
    has = "d_sae" in ARCHITECTURES[dictionary["arch"]].config_type.model_fields
    return ({"d_sae": LATENTS} if has else {}) | dictionary


def runs(root: Path) -> list[Run]:
    return [Run(path.parent) for path in sorted(root.glob(f"*/{CONFIG}"))]


def outcome(run: Run) -> dict[str, Any]:
    """All that a training decides: tensors by name (as bytes), state, configuration, metrics without times."""
    (checkpoint, state), (weights, config) = run.load_checkpoint(), run.load_weights()
    logged = [{name: value for name, value in entry.items() if name not in TIMES} for entry in run.metrics()]
    return {
        **{f"checkpoint: {name}": exact(tensor) for name, tensor in checkpoint.items()},
        **{f"weights: {name}": exact(tensor) for name, tensor in weights.items()},
        "checkpoint: state": state, "metrics": logged, WEIGHTS_CONFIG: config, CONFIG: run.config,
    }  # fmt: skip


def exact(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes()


def inspect(root: Path, said: bytes, drill: Drill) -> None:
    """What a reader finds after a kill."""
    lines = [line.split() for line in said.decode().splitlines()]
    drill.phases[PHASES[next((line[0] for line in reversed(lines) if line[0] in PHASES), "begin")]] += 1
    published = {line[1]: int(line[2]) for line in lines if line[0] == "published"}
    drill.in_mid_write += any(name.endswith(PARTIAL) for name in listing(root))
    drill.staged += any(root.glob(f"*/{STAGED}"))
    for run in runs(root):
        try:
            if held(run.path):
                raise SaeError("the lock outlived its holder")
            run.metrics()
            step = run.load_checkpoint()[1]["step"] if run.has_checkpoint else -1
            if run.finished:
                run.load_weights()
        except SaeError as error:
            drill.unreadable += 1
            drill.wrong.append(f"{run.name}: {error}")
        else:
            if step < published.get(run.name, -1):
                drill.lost += 1
                drill.wrong.append(f"{run.name}: step {published[run.name]} was written, step {step} is there")


def compare(training: Training, root: Path, drill: Drill) -> None:
    """Finished folders against those of the uninterrupted training."""
    found = {run.name: outcome(run) for run in runs(root)}
    for name in training.whole | found:
        one, other = training.whole.get(name, {}), found.get(name, {})
        differ = [what for what in one | other if one.get(what) != other.get(what)]
        drill.mismatches += len(differ)
        drill.wrong += [f"{training.name}: {name}: {what} differs" for what in differ]


def practise(
    kills: int, seed: int, home: Path, say: Callable[[str], None], each: int | None = None, only: Sequence[str] = ()
) -> Drill:
    """The whole drill, in an empty folder. each: most kills of a command; only: words in the names of commands."""
    torch.set_num_threads(1)
    activations.CHUNK_ROWS, activations.WINDOWS = 128, Windows(128, 512)
    stores = [planted_store(home / "cache", ROWS, WIDTH, seed=i, site=site) for i, site in enumerate(SITES)]
    chosen = {name: its for name, its in COMMANDS.items() if not only or any(word in name for word in only)}
    trainings = [Training(name, dictionaries, stores) for name, dictionaries in chosen.items()]
    topk = TrainConfig.model_validate(COMMON | {"sae": sized(TOPK)})
    warm = member(topk, stores[0], home / "warm", "up")  # what is imported only now is in every child
    take_step(warm, stores[0].rows(0, 64))
    for training in trainings:
        training.rehearse(home / "whole" / training.name)
        say(f"{training.name}: {training.seconds:.1f} s, {training.said['write']} checkpoints")
    chance, drill, root, turn, its = random.Random(seed), Drill(), home / "killed", 0, 0
    begun = time.monotonic()
    while drill.kills < kills or root.exists():
        training = trainings[turn % len(trainings)]
        if drill.kills < kills and (each is None or its < each):
            child, killed = training.kill(root, chance)
        else:  # the last one, and one that was killed often enough, is trained to its end
            child = training.child(root)
            killed = child.killed_after(600)
        said = child.said()
        child.close()
        if killed:
            drill.kills, its = drill.kills + 1, its + 1
            inspect(root, said, drill)
            if drill.kills % 10 == 0:
                say(f"{drill.kills} kills, {drill.finished} commands finished, {len(drill.wrong)} wrong")
        else:
            compare(training, root, drill)
            drill.finished += 1
            turn, its = turn + 1, 0
            shutil.rmtree(root)
    drill.seconds = round(time.monotonic() - begun, 1)
    return drill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--each", type=int, help="most kills of a command. Default: no end.")
    parser.add_argument("--only", default="", help="words, one of which is in the names of the commands. Default: all.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        only = [word for word in given.only.split(",") if word]
        drill = practise(given.kills, given.seed, Path(home), partial(print, file=sys.stderr), given.each, only)
    if given.json:
        print(json.dumps(vars(drill)))
    else:
        print(f"{drill.kills} kills in {drill.seconds} s: {drill.unreadable} unreadable, {drill.lost} checkpoints lost")
        print(f"{drill.finished} commands finished, {drill.mismatches} mismatches with uninterrupted ones")
        print(
            f"{drill.in_mid_write} kills in the middle of a write, {drill.staged} between writing and putting in place"
        )
        print("killed while", ", ".join(f"{phase}: {times}" for phase, times in drill.phases.most_common()))
        for line in drill.wrong:
            print(line)
    sys.exit(1 if drill.wrong else 0)


if __name__ == "__main__":
    main()
