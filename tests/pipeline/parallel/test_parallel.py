"""Several processes train as one does: real ones, over gloo. Few are started, since each takes seconds to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_ranks
from support.command_line import sae
from support.saes_kit import DICTIONARIES, small
from support.small_runs import outcome
from support.small_stores import write_activations
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batches
from sae.cache.runs import Run
from sae.pipeline.parallel.launcher import launch
from sae.pipeline.parallel.ranks import SingleRank
from sae.pipeline.parallel.torch_distributed import LostRank, ProcessInfo, assign_devices, together, torchrun_process
from sae.pipeline.runtime import cores
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.train import sweep
from sae.pipeline.train.alignment import AlignConfig
from sae.pipeline.train.resampling import (
    Reinitialise,
    Resample,
)
from sae.pipeline.train.stage import TrainConfig, open_run, train

PROJECT = Path(__file__).resolve().parents[3]
D, ROWS, BATCH = 12, 36_864, 64  # three chunks of a store as it is everywhere, so that ranks read different ones
CPU = "--device cpu"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    rows = torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)).relu() + 1
    return write_activations(tmp_path_factory.mktemp("cache"), rows, "float32", ended=True)


def configs(**changes: Any) -> dict[str, TrainConfig]:
    """Everything that trains, by name; in parts of a batch, or as it is for several processes."""

    def config(case: dict[str, Any], common: dict[str, Any] | None = None, **more: Any) -> TrainConfig:
        given = {"lr": 3e-3, "batch": BATCH, "steps": 12, "log_every": 3, "checkpoint_every": 6, "initial_rows": 256}
        return TrainConfig(sae=small(case, **(common or {})), **{**given, **changes, **more})

    eager = {"dead_after": 3 * BATCH}  # dead latents, and what is done about them, within a few steps
    found = {f"arch-{arch}": config({"arch": arch}, eager) for arch in (*DICTIONARIES, "molt")}
    found["plain"] = config({"arch": "topk"})  # whose rows do not touch each other
    found["ghosts"] = config({"arch": "l1", "ghost_grads": True, "decoder_norm": "none", **eager})
    found["halves"] = config({"arch": "batchtopk", "input_scale": "per_token"}, precision="bfloat16", clip=None)
    found["resampled"] = config({"arch": "topk", "k": 1, "d_sae": 512, **eager}, revive=Resample(every=5, rows=200))
    found["again"] = config({"arch": "topk"}, revive=Reinitialise(every=4, threshold=1e-9))
    for by, matching in (("dec", "hungarian"), ("hid", "max"), ("x_hat", "max")):
        align = AlignConfig(by=by, matching=matching, weight=0.5, warmup=0, every=2, seeds=(0, 1))
        for seed in align.seeds:
            found[f"pulled-{by}-{seed}"] = config({"arch": "topk"}, align=align, seed=seed)
    return found


def opened(given: dict[str, TrainConfig], store: ActivationStore, root: Path) -> list[Run]:
    return [open_run(config, Dataset.of(store), root, name, resume=False) for name, config in given.items()]


@pytest.fixture(scope="module")
def world(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that two processes trained, some in several goes; at the end Ctrl-C."""
    root = tmp_path_factory.mktemp("world")
    together = [list(configs()), ["whole"]]
    opened(configs(), store, root)
    opened({name: configs()["arch-batchtopk"] for name in ("whole", "parts")}, store, root)
    opened({f"stacked-{seed}": configs(seed=seed)["plain"] for seed in range(2)}, store, root)
    opened({"mixed": configs()["plain"], "endless": configs(steps=10**6)["plain"]}, store, root)
    with pytest.raises(KeyboardInterrupt):
        launch(2, "cpu", small_ranks.everything, store.path, root, together)
    return root


@pytest.fixture(scope="module")
def accumulated(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """The same trained by this process, batches in two parts, and the batches."""
    root = tmp_path_factory.mktemp("accumulated")
    rows: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batches, "__iter__", small_ranks.kept(rows))
        train(opened(configs(accumulate=2), store, root), Dataset.of(store), Silent(), device="cpu")
    return root, torch.stack(rows)


def expect_equal(one: Run, other: Run) -> None:
    """Weights, moments, thresholds and rates within rounding, counters exactly; metrics likewise."""
    ours, its = one.load_checkpoint(), other.load_checkpoint()
    assert [{**state, "threads": None} for _, state in (ours, its)] == 2 * [{**ours[1], "threads": None}]
    assert ours[0].keys() == its[0].keys()
    for name, value in its[0].items():
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if value.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(ours[0][name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert [entry["step"] for entry in one.metrics()] == [entry["step"] for entry in other.metrics()]
    for mine, entry in zip(one.metrics(), other.metrics(), strict=True):
        assert mine.keys() == entry.keys()
        for name in mine.keys() - {"seconds", "seconds_per_step", "megabytes"}:
            assert mine[name] == pytest.approx(entry[name], rel=1e-4, abs=1e-6), name


# What ranks exchange


def test_one_rank_does_what_the_only_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with together(ProcessInfo(0, 1, "cpu", tmp_path)) as one:
        for ranks in (SingleRank(), one):
            for check in (small_ranks.numbers, small_ranks.seen, small_ranks.parted):
                check(ranks)
        assert one.broadcast_text("a word") == "a word"


# What comes of it


@pytest.mark.parametrize("name", configs())
def test_two_processes_train_what_accumulation_trains(world: Path, accumulated: tuple[Path, Tensor], name: str) -> None:
    one, other = Run(world / name), Run(accumulated[0] / name)
    expect_equal(one, other)
    tensors, _ = one.load_checkpoint()
    if name == "resampled":
        assert (tensors["sae.rows_since_fired"] == 7 * BATCH).sum() > 100, "latents that died were restarted at step 5"
    assert one.finished and one.load_weights()[0].keys() == other.load_weights()[0].keys()


def test_dictionaries_in_a_stack_are_shared_as_one_is(world: Path, accumulated: tuple[Path, Tensor]) -> None:
    """As on GPUs: one set of operations, whose gradients are exchanged together."""
    expect_equal(Run(world / "stacked-0"), Run(accumulated[0] / "plain"))
    assert Run(world / "stacked-1").finished


def test_the_ranks_rows_are_the_batch(world: Path, accumulated: tuple[Path, Tensor]) -> None:
    shares = [torch.load(world / f"rows{rank}.pt", weights_only=True) for rank in range(2)]
    assert shares[0].shape == shares[1].shape == (12, BATCH // 2, D)
    assert torch.equal(torch.cat(shares, dim=1), accumulated[1])


def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(world: Path) -> None:
    whole, parts = outcome(Run(world / "whole")), outcome(Run(world / "parts"))
    assert {name for name in {*whole, *parts} if whole.get(name) != parts.get(name)} <= {"config.json", "cfg.json"}


def test_ctrl_c_writes_a_checkpoint_of_a_step_all_have_taken(world: Path) -> None:
    run = Run(world / "endless")
    assert not run.finished and 2 <= run.checkpoint_step() < 10**6
    assert not (run.path / "checkpoint.next.safetensors").exists()


def test_another_number_of_processes_continues(world: Path) -> None:
    """Five steps by two processes, three by one, the others by two again."""
    expect_equal(Run(world / "mixed"), Run(world / "plain"))


# What ends it


@pytest.mark.slow
def test_what_one_process_raises_ends_all_and_is_raised_here() -> None:
    before = children()
    with pytest.raises(SaeError) as raised:
        launch(2, "cpu", small_ranks.failed)
    assert type(raised.value) is SaeError and str(raised.value) == "batch = 7: nobody likes it; try 8"
    assert any("in failed" in note for note in raised.value.__notes__)
    assert children() <= before


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_others_end() -> None:
    before = children()
    with pytest.raises(SaeError, match=r"process 2 of 2 \(pid \d+\) was killed by SIGKILL.*`resume`") as raised:
        launch(2, "cpu", small_ranks.killed)
    assert not isinstance(raised.value, LostRank)
    assert children() <= before


@pytest.mark.slow
def test_an_error_that_cannot_be_sent_is_told() -> None:
    with pytest.raises(RuntimeError) as raised:
        launch(2, "cpu", small_ranks.unsendable)
    assert str(raised.value) == "what happened" and "OwnError" in raised.value.__notes__[0]


@pytest.mark.slow
def test_three_processes_with_parts_of_their_own(tmp_path: Path, store: ActivationStore) -> None:
    """Three ranks that each compute their share in two parts are six parts, whose mean no power of two divides."""
    ours = opened(configs(batch=66, accumulate=2), store, tmp_path / "three")
    its = opened(configs(batch=66, accumulate=6), store, tmp_path / "six")
    launch(3, "cpu", small_ranks.trained, store.path, [run.path for run in ours])
    train(its, Dataset.of(store), Silent(), device="cpu")
    for one, other in zip(ours, its, strict=True):
        expect_equal(one, other)


def children(pid: int | None = None) -> set[int]:
    """Processes that one has started (this one where none is named), but for multiprocessing's own helper.

    Threads and processes end while `/proc` is read: what has gone by then is not counted.
    """
    found = set()
    for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(child) for child in (task / "children").read_text().split()}
    return {child for child in found if is_worker(child)}


def is_worker(pid: int) -> bool:
    try:
        return b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


# Devices


def test_each_process_has_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert assign_devices(3, "auto") == assign_devices(3, "cpu") == ["cpu"] * 3
    with pytest.raises(SaeError, match=r"devices = 2: this machine has no GPU; .*`device = cpu`"):
        assign_devices(2, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert assign_devices(2, "auto") == assign_devices(2, "cuda") == ["cuda:0", "cuda:1"]
    assert assign_devices(4, "cpu") == ["cpu"] * 4
    with pytest.raises(SaeError, match=r"devices = 4: this machine has 2 GPUs; ask for fewer"):
        assign_devices(4, "auto")
    with pytest.raises(SaeError, match=r"device = cuda:1: is one device for 2 processes"):
        assign_devices(2, "cuda:1")


def test_torchruns_environment_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun_process("cpu") is None
    for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert torchrun_process("auto") == ProcessInfo(5, 8, "cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SaeError, match=r"torchrun --nproc-per-node 4: this machine has 2 GPUs"):
        torchrun_process("auto")


# The command line


@pytest.fixture(scope="module")
def cache(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    shutil.copytree(store.path, root / "activations" / store.path.name)
    return root


def options(cache: Path, runs: Path, *, batch: int = BATCH) -> str:
    small = "--d-sae 32 --k 4 --steps 12 --set train.log_every=3 --set train.initial_rows=256"
    return f"train {CPU} --cache {cache} --runs {runs} --activations synthetic --batch {batch} {small}"


def test_what_cannot_be_shared_is_said_at_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = sae(f"{options(cache, tmp_path)} --devices 0")
    assert answer.code == 2 and "--devices 0" in answer.complaint
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    answer = sae(f"{options(cache, tmp_path)} --devices 2")
    assert answer.code == 2 and answer.complaint.startswith("--devices 2: torchrun has started")


def test_a_batch_that_cannot_be_shared_leaves_no_run_behind(cache: Path, tmp_path: Path) -> None:
    answer = sae(f"{options(cache, tmp_path, batch=63)} --devices 2")
    assert answer.code == 2 and answer.complaint == "--batch 63: cannot be shared equally by 2 processes; try 62"
    assert list(tmp_path.iterdir()) == []


def test_a_crowd_on_few_cores_is_refused_before_it_is_started(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "usable", lambda: 2)
    monkeypatch.setattr(sweep, "launch", None)
    answer = sae(f"{options(cache, tmp_path)} --devices 32")
    assert (answer.code, answer.complaint) == (
        2, "--devices 32: so many processes have 2 cores between them here; try 2"
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_several_processes_is_that_of_one(cache: Path, tmp_path: Path) -> None:
    """Two dictionaries; the figures come back, and said again there is nothing to do."""
    ours = sae(f"{options(cache, tmp_path / 'two')} --devices 2 --seeds 2 --json")
    its = sae(f"{options(cache, tmp_path / 'one')} --set train.accumulate=2 --seeds 2 --json")
    assert (ours.code, its.code) == (0, 0), ours.err + its.err
    assert len(ours.json["runs"]) == 2
    for mine, other in zip(ours.json["runs"], its.json["runs"], strict=True):
        assert mine["train_fvu"] == pytest.approx(other["train_fvu"], rel=1e-4)
    again = sae(f"{options(cache, tmp_path / 'two')} --devices 2 --seeds 2 --json")
    assert again.json["runs"] == ours.json["runs"]


class Command:
    """`sae ...` in processes of their own, away from this terminal."""

    def __init__(self, command: str, *, by: str = "-m sae.cli") -> None:
        words = [sys.executable, "-W", "error", *by.split(), *command.split()]
        self.process = subprocess.Popen(
            words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def ended(self) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    def workers(self) -> list[int]:
        """The processes it has started to train."""
        return sorted(children(self.process.pid))


def until(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process is there and not merely waiting to be asked how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_signals_end_all_processes_and_the_next_command_continues(cache: Path, tmp_path: Path) -> None:
    """Ctrl-C, then kill -9 of the command, then kill -9 of one of its processes."""
    endless = options(cache, tmp_path).replace("--steps 12", "--steps 100000") + " --set train.checkpoint_every=5"
    run = tmp_path / "endless"
    steps = 0

    def further() -> bool:
        return (run / "checkpoint.safetensors").exists() and Run(run).checkpoint_step() > steps + 10

    for round in range(3):
        command = Command(f"{endless} --name endless --devices 2" + (" --resume" if round else ""))
        until(further)
        workers = command.workers()
        assert len(workers) == 2
        if round == 0:
            os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        elif round == 1:
            command.process.kill()
        else:
            os.kill(workers[1], signal.SIGKILL)
        code, _, err = command.ended()
        assert "Traceback" not in err
        if round == 0:
            assert code == 130 and "sae: error: interrupted" in err and "checkpoint at step" in err
        elif round == 2:
            assert code == 2 and f"process 2 of 2 (pid {workers[1]}) was killed by SIGKILL" in err
        until(lambda workers=workers: not any(map(alive, workers)))
        steps = Run(run).checkpoint_step()


@pytest.mark.slow
def test_torchrun_starts_the_same_training(cache: Path, tmp_path: Path) -> None:
    run = "-m torch.distributed.run --standalone --nproc-per-node 2 -m sae.cli"
    code, out, err = Command(f"{options(cache, tmp_path / 'two')} --json --name a", by=run).ended()
    assert code == 0, err
    its = sae(f"{options(cache, tmp_path / 'one')} --json --name a --set train.accumulate=2")
    assert json.loads(out)["fvu"] == pytest.approx(its.json["fvu"], rel=1e-4)
    expect_equal(Run(tmp_path / "two" / "a"), Run(tmp_path / "one" / "a"))
    code, out, err = Command(f"{options(cache, tmp_path / 'two')} --json --name a", by=run).ended()
    assert code != 0 and err.count("sae: error: --name a:") == 1 and out == ""
