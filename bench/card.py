"""What the stages of bench/gpu_stages.py measure with: a line for a figure, sizes, and a card with its folder."""

import functools
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.small_stores import write_activations

from bench import subjects
from bench.loader import linked
from bench.planted import planted_rows
from bench.rows import timed
from sae.cache.activations import ActivationStore
from sae.pipeline.train.trainer import Trainer

ACTIVE = 0.004  # share of the latents, of those that learn it


class Line(NamedTuple):
    """A figure, and what is wanted of it: at most, or at least, or nothing (None)."""

    what: str
    figure: float
    unit: str
    most: float | None = None
    least: float | None = None

    def __str__(self) -> str:
        wanted = "" if self.most is None else f"at most {self.most:g}"
        wanted = wanted if self.least is None else f"at least {self.least:g}"
        held = (self.most is None or self.figure <= self.most) and (self.least is None or self.figure >= self.least)
        said = "" if not wanted else "yes" if held else "NO"
        return f"| {self.what} | {self.figure:.4g} {self.unit} | {wanted} | {said} |"


class Sizes(NamedTuple):
    """Sizes of what is measured."""

    device: str
    d: int
    m: int
    k: int
    batches: tuple[int, ...]
    rows: int  # of the stores that differ, a whole number of chunks
    stored: int  # of the stores, which have them again and again: more than a loader keeps
    steps: int  # of the training
    contexts: int
    judged: int  # tokens, and held-out rows
    seconds: float  # that a loader is watched


CARD = Sizes("cuda", 768, 24_576, 32, (4096, 16_384), 24 << 14, 4 << 20, 1500, 65_536, 64_512, 2)
SMALL = Sizes("cpu", 32, 256, 4, (64, 128), 1 << 14, 1 << 16, 60, 4, 256, 0.1)


class Bench:
    """The card, the folder that stores and runs are in, and where other tools are."""

    def __init__(self, sizes: Sizes, folder: Path, peers: str | None) -> None:
        self.sizes, self.folder, self.peers, self.made = sizes, folder, peers, 0
        self.device = torch.device(sizes.device)
        self.few = subjects.planted_store(folder / "few", 2048, sizes.d)

    @contextmanager
    def tried(self, what: str) -> Iterator[None]:
        """Have what fails within be a line, and go on: the rest is worth its minutes."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            self.say(f"| {what} FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]} | | | NO |")

    def say(self, line: object) -> None:
        print(line, flush=True)

    def answers(self) -> bool:
        """Whether the card does what it is asked: after some errors it does nothing more for a process."""
        try:
            return self.device.type == "cpu" or bool((torch.ones(1, device=self.device) == 1).item())
        except RuntimeError:
            return False

    def member(self, arch: str, batch: int, precision: str, d_sae: int | None = None, **train: Any) -> Trainer:
        """A dictionary at its first steps, as sparse as it is most of the time."""
        s = self.sizes
        sae = {"arch": arch, "d_sae": d_sae or s.m} | (
            {"k": s.k} if arch in ("topk", "batchtopk", "matryoshka") else {}
        )
        self.made += 1
        config = subjects.settings(sae, batch=batch, precision=precision, **train)
        member = subjects.member(config, self.few, self.folder / "runs", str(self.made), s.device)
        if subjects.learns_its_sparsity(config.sae):
            subjects.make_sparse(member.sae, planted_rows(512, s.d, 1).to(self.device), ACTIVE)
        return member

    def step(self, member: Trainer, batch: int) -> float:
        """Milliseconds of a step, several being given to the card before it is waited for."""
        batches = [planted_rows(batch, self.sizes.d, seed).to(self.device) for seed in range(2)]

        def one() -> None:
            subjects.take_step(member, batches[member.done % 2])

        return self.milliseconds(one)

    def held(self, member: Trainer, batch: int) -> float:
        """The most memory that a step holds beside weights and moments, in numbers of float32 a row and latent."""
        member.optimiser.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(member, batch)
        return (torch.cuda.max_memory_allocated() - before) / (4 * batch * self.sizes.m)

    def milliseconds(self, call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        return 1e3 * min(timed(call, self.sizes.device, time.perf_counter) for _ in range(3))

    @functools.cache  # noqa: B019  it lives as long as the program
    def store(self, codec: str) -> ActivationStore:
        """Rows in a codec."""
        few = write_activations(self.folder / "distinct", planted_rows(self.sizes.rows, self.sizes.d, 0), codec)
        return ActivationStore(linked(few, self.folder / "linked", self.sizes.stored))
