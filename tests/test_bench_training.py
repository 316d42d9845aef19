"""The benches of training measure what they say, and the kill drill sees what would be wrong."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.saes_kit import DICTIONARIES, one_thread
from support.small_stores import shrunk

from bench import step, subjects, train_drill, train_memory, train_shared
from bench.peer import Peer
from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.metrics_log import METRICS
from sae.cache.runs import CHECKPOINT, Run
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.train.sweep import open_all, sweep

BENCH = Path(__file__).resolve().parents[1] / "bench"
TINY = {
    "d_in": 8, "k": 2, "steps": 1, "warmup": 0, "precision": "float32", "no_clip": False, "peers": None,
    "device": "cpu",
}  # fmt: skip

alone = pytest.fixture(scope="module", autouse=True)(one_thread)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActivationStore]:
    with shrunk():
        yield subjects.planted_store(tmp_path_factory.mktemp("cache"), 512, 8)


class TestStep:
    def test_every_architecture_has_its_rows(self) -> None:
        args = Namespace(**TINY, arch=",".join(DICTIONARIES))
        floor, *rows = step.measure(args, 1, (64, 64))
        assert floor.what == "encoder floor, batch 64, 8 -> 64, 1 thread"
        assert {row.what.split()[0] for row in rows} == {*DICTIONARIES}
        assert len(rows) == len(DICTIONARIES) + 2  # TopK with dead latents, L1 at its start
        assert all(row.ratio > 0 for row in rows)

    def test_a_dictionary_is_as_sparse_as_was_asked(self, store: ActivationStore, tmp_path: Path) -> None:
        rows = store.rows(0, 512)
        for arch in ("l1", "jumprelu", "gated"):
            config = subjects.settings({"arch": arch, "d_sae": 64}, batch=64)
            assert subjects.learns_its_sparsity(config.sae)
            one = subjects.member(config, store, tmp_path, arch)
            subjects.make_sparse(one.sae, rows, 0.05)
            assert one.sae.encode(rows).l0().float().mean().item() / 64 == pytest.approx(0.05, abs=0.01)

    @pytest.mark.slow
    def test_tools_that_are_not_installed_are_left_out(self) -> None:
        peer = Peer(sys.executable, "step_peers.py", "64", "8", "64", "2", "1", "cpu")
        assert not peer.missing
        assert torch.tensor([peer.rate("SAELens topk"), peer.rate("sparsify topk")]).isnan().all()
        peer.process.communicate()


def test_overhead_is_the_loop_less_its_steps(store: ActivationStore) -> None:
    args = Namespace(arch="topk", d_sae=64, batch=64, threads=1, device="cpu")
    times = train_shared.trained(store, 3, args)
    assert len(times.steps) == 3 * (512 // 64)
    assert times.overhead > 0
    assert (times.ended - times.began) == pytest.approx(sum(times.steps) * (1 + times.overhead))


def test_the_peak_of_memory_is_of_what_came_after_it_was_forgotten() -> None:
    size = 2**26
    block = torch.ones(2 * size, dtype=torch.uint8)
    del block
    train_memory.forget_peak()
    resident = train_memory.status("VmRSS")
    assert train_memory.status("VmHWM") - resident < size / 4
    block = torch.ones(size, dtype=torch.uint8)
    del block
    assert train_memory.status("VmHWM") - resident > 0.9 * size


class TestDrill:
    @pytest.fixture
    def finished(self, store: ActivationStore, tmp_path: Path) -> tuple[train_drill.Training, Path]:
        """A training with what comes out of it, and its folders again."""
        dictionary: dict[str, Any] = {"sae": train_drill.TOPK | {"d_sae": 32}, "steps": 6, "log_every": 2}
        training = train_drill.Training("topk", [dictionary], [store] * len(train_drill.SITES))
        run, *_ = open_all(training.configs, Dataset.of(store), tmp_path)
        sweep([run], Dataset.of(store), Silent(), device="cpu")
        training.whole = {run.name: train_drill.outcome(run)}
        return training, run.path

    def test_equal_folders_are_no_mismatch(self, finished: tuple[train_drill.Training, Path]) -> None:
        training, path = finished
        drill = train_drill.Drill()
        train_drill.compare(training, path.parent, drill)
        train_drill.inspect(path.parent, f"step\nwrite\npublished {path.name} 6\n".encode(), drill)
        assert (drill.mismatches, drill.unreadable, drill.lost, drill.wrong) == (0, 0, 0, [])
        assert drill.phases == {"writing a checkpoint": 1}

    def test_one_bit_of_the_optimiser_and_one_figure_are_seen(
        self, finished: tuple[train_drill.Training, Path]
    ) -> None:
        training, path = finished
        run = Run(path)
        tensors, state = run.load_checkpoint()
        moment = next(name for name in tensors if name.endswith("exp_avg"))
        tensors[moment].view(torch.int32).view(-1)[0] ^= 1
        first, *rest = (path / METRICS).read_text().splitlines()
        changed = json.dumps(json.loads(first) | {"l0": 1.0, "seconds": 0.0})
        (path / METRICS).write_text("\n".join([changed, *rest, ""]))
        run.stage_checkpoint(tensors, state)  # which seals the metrics logged before it
        run.publish_checkpoint()
        drill = train_drill.Drill()
        train_drill.compare(training, path.parent, drill)
        assert drill.mismatches == 2
        assert {line.split(": ", 2)[2] for line in drill.wrong} == {f"checkpoint: {moment} differs", "metrics differs"}

    def test_torn_and_lost_checkpoints_are_seen(self, finished: tuple[train_drill.Training, Path]) -> None:
        _, path = finished
        drill = train_drill.Drill()
        train_drill.inspect(path.parent, f"published {path.name} 7\n".encode(), drill)
        assert (drill.lost, drill.unreadable) == (1, 0)
        torn = (path / CHECKPOINT).read_bytes()[:-5]
        (path / CHECKPOINT).write_bytes(torn)
        train_drill.inspect(path.parent, b"", drill)
        assert (drill.lost, drill.unreadable) == (1, 1)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kills", "finished", "more"),
        [(5, 1, []), (6, 6, ["--each", "1", "--only", "crosscoder,clt,molt,fsq,vae,nvae"])],
        ids=["five of any", "one of each decomposition"],
    )
    def test_kills(self, kills: int, finished: int, more: list[str]) -> None:
        command = [sys.executable, str(BENCH / "train_drill.py"), "--kills", str(kills), "--seed", "1", "--json", *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["kills"], found["unreadable"], found["lost"], found["mismatches"]) == (kills, 0, 0, 0)
        assert found["finished"] >= finished
        assert sum(found["phases"].values()) == kills
