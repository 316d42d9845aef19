"""Run folders: checkpoints that come back bit for bit or not at all."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from sae.cache.disk.durable import PARTIAL
from sae.cache.errors import Busy, DamagedStore, NotFound, SaeError
from sae.cache.metrics_log import METRICS
from sae.cache.runs import CHECKPOINT, EVALUATION, LATENTS, STAGED, WEIGHTS, WEIGHTS_CONFIG, Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return Run.create(tmp_path / "first", {"train": {"sae": {"arch": "topk"}, "lr": 0.1}, "activations": {"key": "a"}})


def tensors() -> dict[str, Tensor]:
    """Every kind a training state holds."""
    random = torch.Generator().manual_seed(0)
    return {
        "sae.W": torch.randn(3, 4, generator=random),
        "sae.transposed": torch.randn(3, 4, generator=random).T,
        "double": torch.tensor([1e-300, -0.0], dtype=torch.float64),
        "half": torch.randn(5, generator=random).bfloat16(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "dead": torch.tensor([True, False, True]),
        "counter": torch.tensor([3, -1 << 60]),
        "random": torch.Generator().manual_seed(3).get_state(),
        "step": torch.tensor(7),
        "empty": torch.empty(0, 5),
        "nothing": torch.empty(0, dtype=torch.uint8),
    }


def save(run: Run, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    run.stage_checkpoint(tensors, state)
    run.publish_checkpoint()


def test_a_checkpoint_comes_back_bit_for_bit(run: Run) -> None:
    assert not run.has_checkpoint
    state = {"step": 3, "loader": {"epoch": 1}, "text": "é", "lr": 0.1 + 0.2, "none": None}
    save(run, tensors(), state)
    found, found_state = Run(run.path).load_checkpoint()
    assert found_state == state
    assert sorted(found) == sorted(tensors())
    for name, expected in tensors().items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        assert bits(found[name]) == bits(expected)
    save(run, {"other": torch.zeros(1, requires_grad=True)}, {"step": 4})
    assert sorted(run.load_checkpoint()[0]) == ["other"]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_a_damaged_checkpoint_is_told_of_once_with_what_is_left_to_do(run: Run) -> None:
    save(run, {"w": torch.ones(2)}, {"step": 1})
    path = run.path / "checkpoint.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"{}", whole[:20], b""):
        path.write_bytes(damaged)
        with pytest.raises(DamagedStore) as told:
            run.checkpoint_step()
        assert str(told.value).count("checkpoint.safetensors") == 1
        assert str(told.value).endswith("train again without `resume` under another `name`")
        assert Run(run.path).check() == [str(told.value)]


def test_any_flipped_bit_of_a_checkpoint_is_noticed(run: Run) -> None:
    """The tensors, their names, types and shapes, and the state beside them."""
    save(run, {"W": torch.randn(2, 3), "n": torch.tensor(5), "none": torch.empty(0, 2)}, {"step": 1234})
    path = run.path / CHECKPOINT
    data = path.read_bytes()
    for place in range(len(data)):
        bit = (7 * place) % 8 if place > 8 else 0
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        with pytest.raises(DamagedStore, match=r"checkpoint\.safetensors: (damaged|is not)"):
            run.load_checkpoint()
    for length in (0, 1, 8, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DamagedStore):
            run.load_checkpoint()
    path.unlink()
    with pytest.raises(NotFound, match="not there"):
        run.load_checkpoint()


@pytest.mark.parametrize("state", ['"step": 1', '"step": 9'])
def test_a_changed_state_is_noticed(run: Run, state: str) -> None:
    save(run, {"W": torch.ones(1)}, {"step": 5})
    path = run.path / CHECKPOINT
    path.write_bytes(path.read_bytes().replace(b'\\"step\\": 5', state.replace('"', '\\"').encode()))
    with pytest.raises(DamagedStore):
        run.load_checkpoint()


def test_a_failed_checkpoint_leaves_the_one_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, {"W": torch.ones(3)}, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(run, {"W": torch.zeros(3)}, {"step": 2})
    assert run.load_checkpoint()[1] == {"step": 1}
    left = run.path / f"{STAGED}.99{PARTIAL}"  # a killed process of another number left this
    left.write_bytes(b"half")
    save(run, {"W": torch.zeros(3)}, {"step": 2})
    assert run.load_checkpoint()[1] == {"step": 2}
    assert not list(run.path.glob(f"*{PARTIAL}"))


def test_a_run_is_made_once(run: Run, tmp_path: Path) -> None:
    assert (run.name, run.finished, run.settings["sae"]["arch"]) == ("first", False, "topk")
    with pytest.raises(SaeError, match=r"name = first: .*first exists; continue it with `resume` or choose another"):
        Run.create(run.path, {})
    with pytest.raises(NotFound, match=r"is not a run folder \(no config.json\); `choices\(\)` shows the runs"):
        Run(tmp_path)


def test_the_finished_dictionary(run: Run) -> None:
    with pytest.raises(
        NotFound, match=r"training has not finished; continue it with `train\(resume=True, name=first\)`"
    ):
        run.load_weights()
    run.save_weights({"W_dec": torch.eye(3), "threshold": torch.tensor(0.5)}, {"d_in": 3})
    assert run.finished
    found, config = run.load_weights()
    assert torch.equal(found["W_dec"], torch.eye(3))
    assert config == {"d_in": 3}
    path = run.path / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match=r"sae_weights\.safetensors: damaged"):
        run.load_weights()


def test_folders_of_before_there_were_checksums_are_read(run: Run) -> None:
    """And of no others a file without one."""
    (run.path / WEIGHTS_CONFIG).write_text(json.dumps({"d_in": 3}))
    safetensors.torch.save_file({"W_dec": torch.ones(2, 3)}, run.path / WEIGHTS)
    with pytest.raises(DamagedStore, match=r"sae_weights\.safetensors: damaged"):
        run.load_weights()
    (run.path / "eval").mkdir()
    (run.path / EVALUATION).write_text('{"fvu": 0.5}')
    with pytest.raises(DamagedStore, match=r"eval\.json: is not what was written \(its checksum is missing\)"):
        run.evaluation()
    (run.path / "config.json").write_text(json.dumps(run.config))
    older = Run(run.path)
    assert torch.equal(older.load_weights()[0]["W_dec"], torch.ones(2, 3))
    assert older.evaluation() == {"fvu": 0.5}
    assert older.check() == []
    older.save_weights({"W_dec": torch.zeros(2, 3)}, {"d_in": 3})  # one that was continued
    assert torch.equal(Run(run.path).load_weights()[0]["W_dec"], torch.zeros(2, 3))
    (run.path / WEIGHTS_CONFIG).unlink()
    assert older.check() == [f"{run.path / WEIGHTS_CONFIG}: missing, though training has finished"]


@pytest.mark.parametrize("name", ["config.json", "cfg.json", METRICS, EVALUATION, LATENTS])
def test_any_flipped_bit_is_noticed(run: Run, name: str) -> None:
    run.log({"step": 1, "loss": 0.5})
    save(run, {"W": torch.zeros(2)}, {"step": 1})
    run.save_weights({"W_dec": torch.ones(2, 3)}, {"architecture": "topk", "metadata": {"x": 1.5}})
    run.write_json(EVALUATION, {"fvu": 0.25, "details": {"rows": 3}})
    run.save_latents({"density": torch.rand(3), "fired": torch.ones(3).bool()})
    assert run.check() == []
    path = run.path / name
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(DamagedStore, match=re.escape(Path(name).name)):
            raise DamagedStore("; ".join(Run(run.path).check()))
    path.write_bytes(data)
    assert Run(run.path).check() == []


def test_an_edited_config_is_refused(run: Run) -> None:
    path = run.path / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    with pytest.raises(DamagedStore, match=r"its checksum differs\); a run keeps the settings it began with"):
        Run(run.path)


def test_metrics(run: Run) -> None:
    assert run.metrics() == []
    for step in range(0, 50, 10):
        run.log({"step": step, "loss": 1 / (step + 1)})
    with open(run.path / METRICS, "a") as file:
        file.write('{"step": 50, "lo')  # killed while logging
    assert [entry["step"] for entry in run.metrics()] == [0, 10, 20, 30, 40]
    save(run, {}, {"step": 40})
    run.log({"step": 50, "loss": 0.5})
    run.log({"step": 60, "loss": 0.5})
    run.rewind_metrics(40)
    assert [entry["step"] for entry in run.metrics()] == [0, 10, 20, 30, 40]
    run.log({"step": 50, "loss": 0.5})
    assert run.metrics()[1]["loss"] == 1 / 11
    assert all(json.loads(line) for line in (run.path / METRICS).read_text().splitlines())
    with open(run.path / METRICS, "a") as file:
        file.write("nonsense\n")
    with pytest.raises(DamagedStore, match=r"metrics\.jsonl: line 7 is not what was written \(not JSON\)"):
        run.metrics()


def test_json_files(run: Run) -> None:
    assert run.write_json("eval/report.json", {"fvu": 0.25}) == run.path / "eval" / "report.json"
    assert run.read_json("eval/report.json") == {"fvu": 0.25}
    with pytest.raises(SaeError, match="not written, a figure is NaN or infinite"):
        run.write_json("eval/report.json", {"fvu": float("nan")})
    assert run.read_json("eval/report.json") == {"fvu": 0.25}
    with pytest.raises(NotFound, match="not there yet"):
        run.read_json("eval/other.json")
    (run.path / "eval/report.json").write_text("{")
    with pytest.raises(DamagedStore, match="is not what was written"):
        run.read_json("eval/report.json")


def test_one_trainer_at_a_time(run: Run) -> None:
    with run.lock(), pytest.raises(Busy, match="is writing here"):
        run.lock().__enter__()


def test_a_large_checkpoint_is_checked_whole(run: Run) -> None:
    """Not only its first or last bytes."""
    save(run, {"W": torch.zeros(1000, 100)}, {})
    path = run.path / CHECKPOINT
    data = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(data) - 400_000, len(data), 5):
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(DamagedStore, match="its checksum differs"):
            run.load_checkpoint()
        data[place] ^= 1
