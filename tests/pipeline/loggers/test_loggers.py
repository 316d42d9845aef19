"""What TensorBoard and W&B are told of a training: what metrics.jsonl says, once, also where it was killed."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_runs import At, outcome, planted_store, settings

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.loggers import base
from sae.pipeline.runtime.progress import Progress, Silent
from sae.pipeline.train.stage import open_run
from sae.pipeline.train.sweep import sweep

Curves = dict[str, dict[int, list[float]]]  # by figure and step


class Killed(BaseException):
    """As SIGKILL: nothing that handles errors sees it."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.of((planted_store(tmp_path_factory.mktemp("cache")),))


def trained(dataset: Dataset, root: Path, *loggers: str, progress: Progress | None = None, resume: bool = False) -> Run:
    run = open_run(settings(), dataset, root, "small", resume=resume)
    sweep([run], dataset, progress or Silent(), device="cpu", loggers=loggers)
    return run


def killed_and_resumed(dataset: Dataset, root: Path, logger: str) -> Run:
    """A run that was killed at step 27, whose last checkpoint was of step 20 and last line of step 24."""

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        trained(dataset, root, logger, progress=At(27, kill))
    return trained(dataset, root, resume=True)  # which logger it was is known by the run


def in_tensorboard(run: Run) -> tuple[Curves, dict[str, list[int]], list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    curves: Curves = {tag: {} for tag in tags["scalars"]}
    for tag in tags["scalars"]:
        for one in events.Scalars(tag):
            curves[tag].setdefault(one.step, []).append(one.value)
    return curves, {tag: [one.step for one in events.Histograms(tag)] for tag in tags["histograms"]}, tags["tensors"]


def whole_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, of pieces that follow 7 bytes (checksum, size, kind)."""
    at, parts = 7, b""  # after W&B's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            yield parts
            parts = b""


def in_wandb(run: Run) -> tuple[Curves, dict[str, list[int]], list[str]]:
    """All that the offline files hold: what `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2 as messages

    curves: Curves = {}
    histograms: dict[str, list[int]] = {}
    others, ids = [], set()
    for path in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        for data in whole_records(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                ids.add(record.run.run_id)
                told = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert told.get("train", {}).get("lr", 3e-3) == 3e-3
            step = record.history.step.num
            for item in record.history.item:
                name, inner, value = item.key or item.nested_key[0], item.nested_key[1:], json.loads(item.value_json)
                if inner == ["_type"] and value == "histogram":
                    histograms.setdefault(name.removeprefix("weights/"), []).append(step)
                elif inner == ["_type"]:
                    others.append(name)
                elif not inner and not name.startswith("_"):
                    curves.setdefault(name, {}).setdefault(step, []).append(value)
            if record.artifact.name or record.request.log_artifact.artifact.name:
                others.append(record.artifact.name or record.request.log_artifact.artifact.name)
    assert len(ids) == 1, "one run there"
    return curves, histograms, others


READERS: dict[str, Callable[[Run], tuple[Curves, dict[str, list[int]], list[str]]]] = {
    "tensorboard": in_tensorboard,
    "wandb": in_wandb,
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("logger", base.names())
def test_a_killed_run_is_logged_as_its_metrics_say(logger: str, dataset: Dataset, tmp_path: Path) -> None:
    run = killed_and_resumed(dataset, tmp_path / logger, logger)
    plain = trained(dataset, tmp_path / "plain")
    assert outcome(run) == outcome(plain), "logging changes nothing"
    curves, histograms, others = READERS[logger](run)
    expected: Curves = {}
    for entry in run.metrics():
        for name, value in entry.items():
            if name != "step" and value is not None:
                expected.setdefault(name, {})[int(entry["step"])] = [value]
    timed = {"seconds", "seconds_per_step"}  # lines that were there before the kill were sent with their own
    assert curves.keys() == expected.keys()
    for name in curves.keys() - timed:
        assert curves[name].keys() == expected[name].keys(), name
        for step, values in curves[name].items():
            np.testing.assert_allclose(values, expected[name][step], rtol=1e-6, err_msg=f"{name} {step}")
    assert {"W_enc", "W_dec", "b_enc", "b_dec", "log10_firing_rate", "decoder_norm"} <= histograms.keys()
    assert Counter(histograms["W_dec"]) == Counter([10, 20, 30, 40])
    assert any("dictionary" in name for name in others), "the dictionary itself, or where it lies"


def test_a_logger_that_is_not_there(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SaeError, match="log = mlflow: unknown logger; there are tensorboard, wandb"):
        base.expect(["mlflow"])
    module: Any = import_module("sae.pipeline.loggers.wandb")
    monkeypatch.setattr(module.Writer, "needs", "a_package_that_is_nowhere")
    with pytest.raises(SaeError, match=r"log = wandb: needs the package a_package_that_is_nowhere, .*; `pip install"):
        trained(dataset, tmp_path, "wandb")
    assert not (tmp_path / "small").exists(), "nothing was begun"


def test_what_is_remembered_is_no_mapping(dataset: Dataset, tmp_path: Path) -> None:
    run = open_run(settings(), dataset, tmp_path, "small", resume=False)
    run.write_json(base.LOGGERS, {"tensorboard": {"step": -1}})
    with pytest.raises(DamagedStore, match=r"loggers\.json"):
        base.RunLoggers(run, 0)


def test_one_that_fails_closes_the_others(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(settings(), dataset, tmp_path, "small", resume=False)
    closed = []

    class Good(base.Logger):
        needs = "json"

        def figures(self, step: int, figures: Any) -> None: ...
        def checkpoint(self, step: int, path: Path, tensors: Any) -> None: ...
        def finished(self, files: Any, latents: Any) -> None: ...
        def close(self) -> None:
            closed.append(self)

    class Bad(Good):
        def __init__(self, *given: Any) -> None:
            raise SaeError("no")

    monkeypatch.setattr(base, "_class", {"tensorboard": Good, "wandb": Bad}.__getitem__)
    base.ask(run, ["tensorboard", "wandb"])
    with pytest.raises(SaeError, match="no"):
        base.RunLoggers(run, 0)
    assert len(closed) == 1
