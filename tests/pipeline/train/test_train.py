"""Training: it learns, it survives, and what is saved is what was trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.killing import Killed, killed_after
from support.saes_kit import DICTIONARIES
from support.small_runs import (
    COST,
    D_SAE,
    ROWS,
    TOPK,
    At,
    D,
    different,
    outcome,
    planted_rows,
    planted_store,
    settings,
    stop_at,
    true_features,
)
from support.small_stores import activation_recipe, extend, few, shrunk
from torch import Tensor

from sae.cache import activations
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk.sealed import sealed
from sae.cache.errors import Busy, DamagedStore, NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Loader
from sae.cache.metrics_log import METRICS
from sae.cache.runs import CHECKPOINT, FAILURE, WEIGHTS, Run
from sae.cache.store.manifest import Windows
from sae.configs import resolve
from sae.pipeline.formats import trained
from sae.pipeline.parallel.ranks import SingleRank
from sae.pipeline.runtime import cores
from sae.pipeline.runtime.interrupts import Interrupted
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.saes import SAE, create, parse, trainable
from sae.pipeline.train import stage
from sae.pipeline.train.config import REVISION, settings_of
from sae.pipeline.train.stage import TrainConfig, open_run, share, train
from sae.pipeline.train.sweep import open_all
from sae.pipeline.train.trainer import Diverged

PROJECT = Path(__file__).resolve().parents[3]
L1 = {"arch": "l1", "d_sae": D_SAE, "coefficient": 0.5}


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with shrunk() as patch:
        patch.setattr(activations, "CHUNK_ROWS", 256)
        patch.setattr(activations, "WINDOWS", Windows(256, 1024))
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> ActivationStore:
    return planted_store(tmp_path_factory.mktemp("cache"))


def go(
    config: TrainConfig | Sequence[TrainConfig], store: ActivationStore, root: Path,
    *, resume: bool = False, progress: Silent | None = None,
) -> list[Run]:  # fmt: skip
    """Train (or continue) runs 0, 1, ... under `root`."""
    configs = [config] if isinstance(config, TrainConfig) else config
    runs = [open_run(config, Dataset.of(store), root, str(i), resume=resume) for i, config in enumerate(configs)]
    train(runs, Dataset.of(store), progress or Silent(), device="cpu")
    return runs


# It learns


def test_the_loss_falls_and_the_planted_dictionary_is_found(tmp_path: Path, store: ActivationStore) -> None:
    (run,) = go(settings(steps=250, lr=2e-2, log_every=2, checkpoint_every=500), store, tmp_path)
    metrics = run.metrics()
    assert metrics[-1]["loss_reconstruction"] < 0.15 * metrics[0]["loss_reconstruction"]
    assert metrics[-1]["fvu"] < 0.1 < 0.4 < metrics[0]["fvu"]
    found = trained.load_run(run).W_dec
    cosines = (true_features() @ found.T).amax(1)
    untrained = create(parse(TOPK), D, seed=1).W_dec.detach()
    assert cosines.mean() > 0.93 > 0.8 > (true_features() @ untrained.T).amax(1).mean()
    assert (cosines > 0.95).float().mean() > 0.8


def test_metrics_say_what_they_say(tmp_path: Path, store: ActivationStore) -> None:
    config = settings(steps=21, log_every=10, sae=TOPK)
    (run,) = go(config, store, tmp_path)
    metrics = run.metrics()
    assert [entry["step"] for entry in metrics] == [10, 20, 21]
    for entry in metrics:
        assert entry["rows"] == entry["step"] * 128
        assert entry["loss"] == pytest.approx(entry["loss_reconstruction"] + entry["loss_auxk"], rel=1e-6)
        assert entry["lr"] == config.rates_at(entry["step"] - 1, 21)[0]
        assert 0 < entry["l0"] <= 4 and 0 <= entry["dead"] <= 1 and 0 < entry["fvu"] < 1
    assert [entry["seconds"] for entry in metrics] == sorted(entry["seconds"] for entry in metrics)


def twin_step(weights: dict[str, Tensor], x: Tensor, k: int) -> Tensor:
    """TopK written out with dense matrices: the loss of a batch of scaled rows."""
    before = (x - weights["b_dec"]) @ weights["W_enc_rows"].T + weights["b_enc"]
    top = before.topk(k, dim=1)
    latents = torch.zeros_like(before).scatter(1, top.indices, top.values.relu())
    return (latents @ weights["W_dec"] + weights["b_dec"] - x).square().sum() / len(x)


def twin_training(store: ActivationStore, config: TrainConfig, *, clip_first: bool = False) -> dict[str, Tensor]:
    """The training loop in plain torch: project the gradient, clip, set the rate, step, renormalise."""
    sae = create(config.sae, D, seed=config.seed)
    sae.initialise(store.rows(0, min(config.initial_rows, store.n_rows)))
    scale = sae.scale.clone()
    weights = {name: value.detach().clone().requires_grad_() for name, value in sae.named_parameters()}
    optimiser = torch.optim.Adam(weights.values(), betas=config.decay_rates)
    total = config.total_steps(store.n_rows)
    with Loader(store, config.batch, seed=config.data_seed) as loader:
        for step, x in zip(range(total), loader, strict=False):
            optimiser.zero_grad()
            twin_step(weights, x * scale, 4).backward()
            if clip_first:
                torch.nn.utils.clip_grad_norm_(weights.values(), config.clip)
            rows, grad = weights["W_dec"].detach(), weights["W_dec"].grad
            assert grad is not None
            grad -= (grad * rows).sum(1, keepdim=True) * rows
            if not clip_first and config.clip is not None:
                torch.nn.utils.clip_grad_norm_(weights.values(), config.clip)
            optimiser.param_groups[0]["lr"] = config.rates_at(step, total)[0]
            optimiser.step()
            weights["W_dec"].data /= weights["W_dec"].data.norm(dim=1, keepdim=True)
    return {name: value.detach() for name, value in weights.items()}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_equals_the_same_steps_written_out(tmp_path: Path, store: ActivationStore, clip: float | None) -> None:
    """Batches, loss, projection, clipping after it, rate, Adam, unit rows."""
    config = settings({**TOPK, "aux_coefficient": 0.0}, steps=12, lr=3e-2, clip=clip)
    (run,) = go(config, store, tmp_path)
    tensors, _ = run.load_checkpoint()
    expected = twin_training(store, config)
    for name, value in expected.items():
        torch.testing.assert_close(tensors[f"sae.{name}"], value, rtol=0, atol=1e-5)
    if clip is not None:
        other = twin_training(store, config, clip_first=True)
        apart = max((other[name] - value).abs().max().item() for name, value in expected.items())
        assert apart > 1e-3, "clipping before projecting would not be noticed"


# The learning rate


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = settings(lr=2.0, warmup=0.1, decay=0.2)
    rates = [config.rates_at(step, 100)[0] for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[8] == pytest.approx(1.8)
    assert rates[9:81] == [2.0] * 72
    assert rates[90] == pytest.approx(1.0) and rates[99] == pytest.approx(0.1)
    assert config.rates_at(100, 100)[0] == 0


SHARES = st.just(0.0) | st.floats(1e-9, 1)


@few
@given(warmup=SHARES, decay=SHARES, total=st.integers(1, 300), lr=st.floats(1e-6, 1e3))
def test_the_learning_rate_is_never_0_nor_too_high(warmup: float, decay: float, total: int, lr: float) -> None:
    decay = min(decay, 1 - warmup)
    config = settings(lr=lr, warmup=warmup, decay=decay)
    rates = [config.rates_at(step, total)[0] for step in range(total)]
    assert all(0 < rate <= lr for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("total", [1, 2])
def test_the_shortest_trainings(tmp_path: Path, store: ActivationStore, total: int) -> None:
    (run,) = go(settings(steps=total, warmup=0.5, decay=0.5), store, tmp_path)
    assert run.metrics()[-1]["step"] == total and run.metrics()[-1]["lr"] > 0


def test_the_length_of_a_training() -> None:
    assert settings(steps=7).total_steps(10_000) == 7
    assert settings(steps=None, rows=1000, batch=128).total_steps(10_000) == 7
    assert settings(steps=None, batch=128).total_steps(10_000) == 78
    assert settings(steps=None, batch=4096).total_steps(100) == 1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"steps": 3, "rows": 4}, "steps = 3 and rows = 4: give one of them"),
        ({"warmup": 0.7, "decay": 0.4}, "warmup = 0.7 and decay = 0.4: together they are more than all steps"),
        ({"lr": 0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 3}, "batch_size"),
        ({"clip": 0}, "clip"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        settings(**wrong)


# Several at once


def test_every_dictionary_of_several_equals_its_solo_run(tmp_path: Path, store: ActivationStore) -> None:
    """Bit for bit, whatever trains beside it."""
    configs = [
        settings(),
        settings(L1, lr=1e-3, clip=None),
        settings(seed=5),
        settings({**TOPK, "d_sae": 48, "k": 2}, initial_rows=99),
    ]
    together = go(configs, store, tmp_path / "together")
    for i, (run, config) in enumerate(zip(together, configs, strict=True)):
        (solo,) = go(config, store, tmp_path / f"solo-{i}")
        assert not different([run], [outcome(solo)]), i
    assert outcome(together[0])[WEIGHTS] != outcome(together[2])[WEIGHTS]


def test_the_seed_of_the_weights_and_of_the_rows(tmp_path: Path, store: ActivationStore) -> None:
    weights = set()
    for i, changes in enumerate(({}, {}, {"seed": 1}, {"data_seed": 1})):
        (run,) = go(settings(**changes), store, tmp_path / str(i))
        weights.add((run.path / WEIGHTS).read_bytes())
    assert len(weights) == 3


@pytest.mark.parametrize("changes", [{"batch": 64}, {"steps": 39}, {"steps": None}, {"data_seed": 1}])
def test_dictionaries_that_cannot_share_a_stream(
    tmp_path: Path, store: ActivationStore, changes: dict[str, Any]
) -> None:
    with pytest.raises(SaeError, match=f"train.{next(iter(changes))}: dictionaries trained together must agree on it"):
        go([settings(), settings(**changes)], store, tmp_path)


def test_dictionaries_that_were_promised_different_rows(tmp_path: Path, store: ActivationStore) -> None:
    """The store grew between the making of the two runs."""
    runs = [open_run(settings(), Dataset.of(store), tmp_path, str(i), resume=False) for i in range(2)]
    content = json.loads((runs[1].path / "config.json").read_text())
    content["activations"]["rows"] = ROWS // 2
    del content["crc"]
    (runs[1].path / "config.json").write_bytes(sealed(content))
    with pytest.raises(SaeError, match=r"1: is for 2,048 rows of planted-\w+, not 4,096 of planted-"):
        train([runs[0], Run(runs[1].path)], Dataset.of(store), Silent(), device="cpu")


def test_a_run_of_another_store(tmp_path: Path, store: ActivationStore) -> None:
    other = planted_store(tmp_path, planted_rows(512), seed=4)
    run = open_run(settings(), Dataset.of(other), tmp_path, "other", resume=False)
    with pytest.raises(SaeError, match=r"other: is for 512 rows of planted-\w+, not 512 of planted-"):
        train([run], Dataset.of(store), Silent(), device="cpu")


# Interruption


def die() -> None:
    raise Killed


def test_figures_are_shown_from_the_first_step_on_and_logged_as_asked(tmp_path: Path, store: ActivationStore) -> None:
    class Watching(Silent):
        shown: ClassVar[list[dict[str, Any]]] = []

        def advance(self, n: int, **fields: Any) -> None:
            self.shown.append(fields)

    (run,) = go(settings(steps=7, log_every=3), store, tmp_path, progress=Watching())
    assert [bool(fields) for fields in Watching.shown] == [True, False, True, False, False, True, True]
    assert {"loss", "fvu", "l0"} <= Watching.shown[0].keys()
    assert [entry["step"] for entry in run.metrics()] == [3, 6, 7]


PAIR = [settings(), settings(L1, seed=3, log_every=3)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, store: ActivationStore) -> list[Any]:
    """What PAIR must leave however often it is interrupted."""
    return [outcome(run) for run in go(PAIR, store, tmp_path_factory.mktemp("whole"))]


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 1), (signal.SIGINT, 10), (signal.SIGTERM, 23), (signal.SIGHUP, 40)]
)
def test_interrupted_by_a_signal_and_resumed(
    tmp_path: Path, store: ActivationStore, uninterrupted: list[Any], step: int, number: signal.Signals
) -> None:
    """The step in progress ends, a checkpoint is written, and nothing of it can be seen afterwards."""
    before = signal.getsignal(number)
    stopping = At(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stopped:
        go(PAIR, store, tmp_path, progress=stopping)
    assert signal.getsignal(number) is before
    assert stopping.lines == [
        "train: 40 steps of 128 rows, 1.2 passes over 4,096; lr 0.003; a latent counts as dead after 256, 800 rows "
        "without firing"
    ]
    assert (stopped.value.number, stopped.value.safe) == (number, f"checkpoint at step {step}")
    runs = [Run(tmp_path / str(i)) for i in range(2)]
    assert all(run.load_checkpoint()[1]["step"] == step and not run.finished for run in runs)
    resumed = At(-1, die)
    assert not different(go(PAIR, store, tmp_path, resume=True, progress=resumed), uninterrupted)
    assert resumed.begun == [(40, step)]
    assert resumed.lines == [f"0: continuing at step {step} of 40"]


def test_a_second_signal_acts_at_once(tmp_path: Path, store: ActivationStore) -> None:
    before = signal.getsignal(signal.SIGINT)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not before:  # until the first has been handled
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    stopping = At(5, twice)
    with pytest.raises(KeyboardInterrupt):
        go(settings(), store, tmp_path, progress=stopping)
    assert len(stopping.lines) == 1 and not Run(tmp_path / "0").has_checkpoint


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, store: ActivationStore) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (run,) = go(settings(steps=6), store, tmp_path, progress=stop_at(3))
        assert run.finished and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [7, 10, 25, 40])
def test_killed_after_a_step_and_resumed(
    tmp_path: Path, store: ActivationStore, uninterrupted: list[Any], step: int
) -> None:
    """Before the first checkpoint, between two, after the last: what was logged since is not logged twice."""
    with pytest.raises(Killed):
        go(PAIR, store, tmp_path, progress=At(step, die))
    assert not different(go(PAIR, store, tmp_path, resume=True), uninterrupted)


def test_noise_is_drawn_again_where_training_goes_on(tmp_path: Path, store: ActivationStore) -> None:
    """Of every step, whatever the parts of its batch."""
    noisy = {"arch": "vsae_multi", "d_sae": D_SAE, "sigma": 0.5, "k": 8}
    runs = {}
    for parts in (1, 2):
        config = settings(noisy, steps=12, checkpoint_every=5, accumulate=parts)
        (whole,) = go(config, store, tmp_path / f"whole {parts}")
        with pytest.raises(Killed):
            go(config, store, tmp_path / f"killed {parts}", progress=At(8, die))
        assert not different(go(config, store, tmp_path / f"killed {parts}", resume=True), [outcome(whole)])
        runs[parts] = trained.load_run(whole)
    torch.testing.assert_close(runs[1].W_dec, runs[2].W_dec, rtol=1e-4, atol=1e-4)


def test_resumed_training_computes_with_the_threads_of_before(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number rounds sums differently. An older checkpoint, which says none, goes on with what there is."""
    monkeypatch.setattr(cores, "usable", lambda: 8)
    stopping = At(12, lambda: signal.raise_signal(signal.SIGINT))
    torch.set_num_threads(3)
    try:
        with pytest.raises(Interrupted):
            go(PAIR[0], store, tmp_path, progress=stopping)
        torch.set_num_threads(1)
        resumed = At(-1, lambda: None)
        (run,) = go(PAIR[0], store, tmp_path, resume=True, progress=resumed)
        assert torch.get_num_threads() == run.load_checkpoint()[1]["threads"] == 3
        assert resumed.lines[0] == "threads: 3, as before; `threads = N` says otherwise"
        tensors, state = run.load_checkpoint()
        run.stage_checkpoint(tensors, {name: value for name, value in state.items() if name != "threads"})
        run.publish_checkpoint()
        torch.set_num_threads(1)
        go(PAIR[0], store, tmp_path, resume=True)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_resumed_training_takes_products_in_the_precision_of_before(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody said one, that of the device it began on, which is another here."""
    bfloat16 = PAIR[0].model_copy(update={"precision": "bfloat16"})
    stopping = At(12, lambda: signal.raise_signal(signal.SIGINT))
    with monkeypatch.context() as card:
        card.setattr(TrainConfig, "precision_on", lambda self, halves: "bfloat16")
        with pytest.raises(Interrupted):
            go(PAIR[0], store, tmp_path / "auto", progress=stopping)
    resumed = At(-1, lambda: None)
    (found,) = go(PAIR[0], store, tmp_path / "auto", resume=True, progress=resumed)
    assert resumed.lines[0] == "precision: products in bfloat16; `train.precision = float32` says otherwise"
    (asked,), (other,) = go(bfloat16, store, tmp_path / "asked"), go(PAIR[0], store, tmp_path / "float32")
    weights = [trained.load_run(run).W_dec for run in (found, asked, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert found.load_checkpoint()[1]["precision"] == "bfloat16"


def test_killed_at_every_write_and_resumed(tmp_path_factory: pytest.TempPathFactory, store: ActivationStore) -> None:
    """Also between the checkpoints of two dictionaries, and while the finished ones are written."""
    pair = [settings(steps=6, checkpoint_every=2, log_every=1), settings(L1, steps=6, checkpoint_every=2)]
    whole = [outcome(run) for run in go(pair, store, tmp_path_factory.mktemp("whole"))]
    for stop in range(2, 100):  # the first two writes are the configurations
        root = tmp_path_factory.mktemp("killed")
        with killed_after(stop) as killed:
            go(pair, store, root)
        if not killed:
            break
        assert not different(go(pair, store, root, resume=True), whole), stop
    assert stop == 2 * (1 + 1 + 2 * 3 + 2)  # configuration, metrics, checkpoints (written, published), the dictionary


def test_interrupted_again_and_again(tmp_path: Path, store: ActivationStore, uninterrupted: list[Any]) -> None:
    (first,) = uninterrupted[:1]
    for i in range(4):
        stopping = At(5 + i, die) if i % 2 else stop_at(5 + i)
        with pytest.raises((KeyboardInterrupt, Killed)):
            go(PAIR[0], store, tmp_path, resume=i > 0, progress=stopping)
    assert not different(go(PAIR[0], store, tmp_path, resume=True), [first])


def test_resuming_a_finished_run_changes_nothing(
    tmp_path: Path, store: ActivationStore, uninterrupted: list[Any]
) -> None:
    go(PAIR, store, tmp_path)
    steps = At(0, die)
    assert not different(go(PAIR, store, tmp_path, resume=True, progress=steps), uninterrupted)
    assert steps.left == 0


def test_a_store_that_has_grown_is_seen_as_it_was(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    def grown(root: Path, rows: int) -> ActivationStore:
        recipe = {**activation_recipe(D), "hook": "blocks.1.hook_mlp_out"}
        with ActivationWriter(root, "planted", recipe) as writer:
            extend(writer, planted_rows(2048)[:rows])
            return writer.store

    (whole,) = go(settings(), grown(tmp_path / "cache", 1024), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(settings(), grown(tmp_path / "cache", 1024), tmp_path / "stopped", progress=stop_at(13))
    (resumed,) = go(settings(), grown(tmp_path / "cache", 2048), tmp_path / "stopped", resume=True)
    assert not different([resumed], [outcome(whole)])


def test_a_store_that_has_lost_rows_is_refused(tmp_path: Path) -> None:
    whole = planted_store(tmp_path, planted_rows(1024))
    with pytest.raises(KeyboardInterrupt):
        go(settings(), whole, tmp_path / "runs", progress=stop_at(3))
    shutil.rmtree(whole.path)
    less = planted_store(tmp_path, planted_rows(300))
    with pytest.raises(SaeError, match=r"1,024 rows asked for, 300 are there; harvest more$"):
        go(settings(), less, tmp_path / "runs", resume=True)


SCRIPT = """
import json, sys
from pathlib import Path
from sae.cache import activations
from sae.cache.store.manifest import Windows
activations.CHUNK_ROWS, activations.WINDOWS = 256, Windows(256, 1024)
import torch
torch.set_num_threads(1)
from sae.cache.activations import ActivationStore
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.train.stage import TrainConfig, open_run, train
from sae.pipeline.formats import trained
store, root = ActivationStore(Path(sys.argv[1])), Path(sys.argv[2])
config = TrainConfig.model_validate_json(sys.argv[3])
run = open_run(config, Dataset.of(store), root, "0", resume=(root / "0" / CONFIG).exists())
train([run], Dataset.of(store), Silent(), device="cpu")
trained.load_run(run)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("trans") or name.startswith("sae.pipeline."))))
"""


def script(store: ActivationStore, root: Path, config: TrainConfig) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(store.path), str(root), config.model_dump_json()]


@pytest.mark.slow
def test_kill_9_and_resume(tmp_path: Path, store: ActivationStore) -> None:
    """A real process, killed by SIGKILL in mid-run, twice, and continued by another."""
    config = settings(steps=1500, checkpoint_every=37, log_every=3)
    (whole,) = go(config, store, tmp_path / "whole")
    root, steps = tmp_path / "killed", 0
    metrics = root / "0" / METRICS
    for more in (60, 400):
        with subprocess.Popen(script(store, root, config), cwd=PROJECT, stdout=subprocess.DEVNULL) as process:
            while (lines := metrics.read_bytes().count(b"\n") if metrics.exists() else 0) * 3 < steps + more:
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        steps = lines * 3
    assert not Run(root / "0").finished and Run(root / "0").load_checkpoint()[1]["step"] > 400
    (resumed,) = go(config, store, root, resume=True)
    assert not different([resumed], [outcome(whole)])


@pytest.mark.slow
def test_training_never_imports_a_language_model(tmp_path: Path, store: ActivationStore) -> None:
    done = subprocess.run(
        script(store, tmp_path, settings(steps=3)), cwd=PROJECT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    assert "sae.pipeline.train.stage" in loaded
    assert not [name for name in loaded if name.startswith(("transformer", "sae.pipeline.language_model"))]
    assert not [
        name
        for name in loaded
        if name in ("sae.pipeline.harvest.stage", "sae.pipeline.tokenize.stage", "sae.pipeline.evaluate.stage")
    ]


# Refusals


def test_a_run_is_not_begun_twice(tmp_path: Path, store: ActivationStore) -> None:
    (run,) = go(settings(), store, tmp_path)
    before = outcome(run)
    with pytest.raises(SaeError, match=r"^name = 0: .* exists; continue it with `resume` or choose another `name`$"):
        go(settings(), store, tmp_path)
    assert not different([run], [before])
    with pytest.raises(NotFound, match=r"^resume = True: no run 1 in"):
        open_run(settings(), Dataset.of(store), tmp_path, "1", resume=True)


def test_a_name_of_its_own(tmp_path: Path, store: ActivationStore) -> None:
    names = [
        open_run(c, Dataset.of(store), tmp_path, None, resume=False).name
        for c in (settings(), settings(L1), settings(seed=1))
    ]
    assert names[0].startswith("topk-32-k4-lr0.003-s0-1.mlp_out-") and names[1].startswith(
        "l1-32-c0.5-lr0.003-s0-1.mlp_out-"
    )
    assert len(set(names)) == 3
    assert open_run(settings(), Dataset.of(store), tmp_path, None, resume=True).name == names[0]


def test_the_number_of_rows_is_part_of_a_run(tmp_path: Path) -> None:
    """On a store that has grown the same settings are another run; one that was interrupted goes on with its rows."""
    rows = planted_rows(2048)
    small = planted_store(tmp_path, rows[:1024], ended=False)
    first = open_run(settings(), Dataset.of(small), tmp_path, None, resume=False)
    waiting = open_run(settings(seed=1), Dataset.of(small), tmp_path, None, resume=False)
    (first.path / WEIGHTS).write_bytes(b"")  # finished
    grown = planted_store(tmp_path, rows)
    assert (first.seen.rows, grown.n_rows) == (1024, 2048)
    again = open_run(settings(), Dataset.of(grown), tmp_path, None, resume=False)
    assert again.name != first.name and again.seen.rows == again.settings["store_rows"] == 2048
    assert open_run(settings(seed=1), Dataset.of(grown), tmp_path, None, resume=True).name == waiting.name
    repeated = open_run(settings_of(first), Dataset.of(grown), tmp_path, "repeated", resume=False)
    assert (repeated.seen.rows, repeated.settings) == (1024, first.settings)
    swept = open_all([settings(seed=seed) for seed in (1, 2)], Dataset.of(grown), tmp_path)
    assert swept[0].name == waiting.name and [run.seen.rows for run in swept] == [1024, 1024]
    with pytest.raises(
        SaeError, match=r"train.store_rows = 4096: planted-\S+ has 2,048 rows; lower it, or harvest more"
    ):
        open_run(settings(store_rows=4096), Dataset.of(grown), tmp_path, None, resume=False)


def test_resume_refuses_other_settings_and_names_them(tmp_path: Path, store: ActivationStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(settings(), store, tmp_path, progress=stop_at(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for changed, names in (
        (settings(lr=1e-3), "lr"),
        (settings(batch=64, steps=41), "batch, steps"),
        (settings({**TOPK, "k": 5}), "sae"),
    ):
        with pytest.raises(
            SaeError, match=rf"^resume = True: .* was started with other settings \({names}\); repeat those"
        ):
            go(changed, store, tmp_path, resume=True)
    other = planted_store(tmp_path / "other", seed=9)
    with pytest.raises(SaeError, match=r"other settings \(tokens\)"):
        go(settings(), other, tmp_path, resume=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, store: ActivationStore, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(settings(), store, tmp_path, progress=stop_at(3))
    path = tmp_path / "0" / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-10]), "emptied": b""}[damage])
    with pytest.raises(DamagedStore, match=r"checkpoint\.safetensors"):
        go(settings(), store, tmp_path, resume=True)


def test_damaged_rows_are_refused(tmp_path: Path) -> None:
    damaged = planted_store(tmp_path, planted_rows(1024))
    path = damaged.path / "rows/c/2/0"
    data = bytearray(path.read_bytes())
    data[50] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match="rows/c/2/0: damaged"):
        go(settings(), damaged, tmp_path)


def test_dictionaries_that_stopped_at_different_steps(tmp_path: Path, store: ActivationStore) -> None:
    """A kill in one unlucky moment makes them. The one ahead waits, and each can still go on by itself."""
    pair = [settings(), settings(seed=1)]
    whole = [outcome(run) for run in go(pair, store, tmp_path / "whole")]
    with pytest.raises(KeyboardInterrupt):
        go(pair, store, tmp_path / "stopped", progress=stop_at(13))
    one = open_run(pair[1], Dataset.of(store), tmp_path / "stopped", "1", resume=True)
    with pytest.raises(KeyboardInterrupt):
        train([one], Dataset.of(store), stop_at(4), device="cpu")
    with pytest.raises(KeyboardInterrupt):  # the other has not caught up yet
        go(pair, store, tmp_path / "stopped", resume=True, progress=stop_at(2))
    shutil.copytree(tmp_path / "stopped" / "1", tmp_path / "alone" / "1")
    alone = open_run(pair[1], Dataset.of(store), tmp_path / "alone", "1", resume=True)
    train([alone], Dataset.of(store), Silent(), device="cpu")
    assert not different([alone], whole[1:])
    assert not different(go(pair, store, tmp_path / "stopped", resume=True), whole)


def test_a_run_is_trained_by_one_process(tmp_path: Path, store: ActivationStore) -> None:
    run = open_run(settings(), Dataset.of(store), tmp_path, "0", resume=False)
    with run.lock(), pytest.raises(Busy, match="is writing here"):
        train([run], Dataset.of(store), Silent(), device="cpu")


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_loss_that_explodes_is_said(tmp_path: Path, store: ActivationStore, log_every: int) -> None:
    """And the last checkpoint stays one from before: nothing that is not a number is ever saved."""
    config = settings(lr=1e25, clip=None, warmup=0, decay=0, log_every=log_every, checkpoint_every=1)
    with pytest.raises(SaeError, match=r"try a smaller `lr`$") as caught:
        go(config, store, tmp_path)
    assert "\n" not in str(caught.value)
    run = Run(tmp_path / "0")
    assert not run.finished
    for entry in run.metrics():
        json.dumps(entry, allow_nan=False)
    if run.has_checkpoint:
        tensors, _ = run.load_checkpoint()
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def test_a_dictionary_that_diverges_does_not_end_the_others(tmp_path: Path, store: ActivationStore) -> None:
    """It says so in its folder, the others are as if it had never been there, and the error comes at the end."""
    hot = settings(lr=1e25, clip=None, warmup=0, decay=0)
    pulled = [
        settings(lr=1e25, clip=None, warmup=0, decay=0, seed=i, align={"matching": "hungarian", "seeds": (0, 1)})
        for i in (0, 1)
    ]
    plain = settings(seed=3)
    configs = [hot, plain, *pulled]
    runs = [open_run(one, Dataset.of(store), tmp_path, str(i), resume=False) for i, one in enumerate(configs)]
    with pytest.raises(Diverged) as caught:
        train(runs, Dataset.of(store), Silent(), device="cpu")
    assert "\n" not in str(caught.value) and str(caught.value).count("try a smaller `lr`") == 2
    assert [run.finished for run in runs] == [False, True, False, False]
    for run in (runs[0], *runs[2:]):
        assert run.failure is not None and "try a smaller `lr`" in run.failure["error"] and run.failure["step"] >= 1
    (alone,) = go(plain, store, tmp_path / "alone")
    ours, its = runs[1].load_weights()[0], alone.load_weights()[0]
    assert runs[1].failure is None and all(torch.equal(ours[name], its[name]) for name in its)


def test_a_failure_is_forgotten_when_training_goes_on(tmp_path: Path, store: ActivationStore) -> None:
    run = open_run(settings(), Dataset.of(store), tmp_path, "again", resume=False)
    run.write_json(FAILURE, {"step": 1, "error": "the loss is nan"})
    train([run], Dataset.of(store), Silent(), device="cpu")
    assert run.finished and run.failure is None


@pytest.mark.parametrize(
    ("changes", "world", "least"),
    [({"batch": 8, "accumulate": 4}, 4, 16), ({"batch": 4, "accumulate": 4, "sae": {**L1, "reduction": "fvu"}}, 1, 8)],
)
def test_parts_of_too_few_rows_are_refused(changes: dict[str, Any], world: int, least: int) -> None:
    """A part without rows has no loss, and a single row no variance that an error could be a share of."""
    with pytest.raises(SaeError, match=rf"^batch = {changes['batch']}: too small .* give {least} or more$"):
        share(settings(**changes), world)
    assert share(settings(**{**changes, "batch": least}), world) == least // world


def test_rows_that_are_all_zero(tmp_path: Path) -> None:
    zeros = planted_store(tmp_path, torch.zeros(512, D), "float32")
    with pytest.raises(SaeError, match="not all zero"):
        go(settings(), zeros, tmp_path)


@pytest.mark.parametrize("sae", [{}, {"input_scale": "none"}])
def test_rows_that_are_all_the_same(tmp_path: Path, sae: dict[str, Any]) -> None:
    """There is no variance to explain; every line of metrics is still JSON."""
    same = planted_store(tmp_path, torch.ones(512, D), "float32")
    (run,) = go(settings({**TOPK, **sae}), same, tmp_path)
    assert len(run.metrics()) == 10
    for entry in run.metrics():
        json.dumps(entry, allow_nan=False)


def test_a_batch_of_one_row(tmp_path: Path, store: ActivationStore) -> None:
    (run,) = go(settings(batch=1, steps=8), store, tmp_path)
    assert [entry["rows"] for entry in run.metrics()] == [4, 8]
    for entry in run.metrics():
        json.dumps(entry, allow_nan=False)


# How it may be trained

SMALL = {"topk": {"k": 4}, "batchtopk": {"k": 4}, "crosscoder": {"k": 4}, "matryoshka": {"k": 4, "prefixes": (8, 20)}}
REVIVALS: list[dict[str, Any]] = [
    {"kind": "resample", "every": 10, "rows": 300},
    {"kind": "reinitialise", "every": 10, "threshold": 0.01},
]


def described(arch: str, **changes: Any) -> dict[str, Any]:
    return {"arch": arch, "d_sae": D_SAE, "dead_after": 800, **SMALL.get(arch, {}), **changes}


@pytest.mark.parametrize("arch", DICTIONARIES)
def test_every_architecture_is_resumed_and_saved(tmp_path: Path, store: ActivationStore, arch: str) -> None:
    """Stopped and continued it equals a run beside another; what is saved is what was trained."""
    config = settings(described(arch), steps=16, checkpoint_every=100)
    whole, _ = go([config, settings(seed=3, steps=16)], store, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(config, store, tmp_path / "parts", progress=stop_at(7))
    (run,) = go(config, store, tmp_path / "parts", resume=True)
    assert not different([run], [outcome(whole)])
    alive, x = in_training(run).eval(), store.rows(0, 512)
    expected = alive(x)
    assert (trained.load_run(run)(x) - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-5


@pytest.mark.parametrize("revive", REVIVALS, ids=lambda revive: revive["kind"])
def test_revivals_are_resumed_and_their_own(tmp_path: Path, store: ActivationStore, revive: dict[str, Any]) -> None:
    """What is drawn at random depends on the run alone, and a resumed run draws the same."""
    sae = described("topk", dead_after=256, aux_coefficient=0.0, k=2)
    config = settings(sae, revive=revive)
    whole, _ = go([config, settings(sae, revive=revive, seed=3)], store, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(config, store, tmp_path / "parts", progress=stop_at(13))
    (run,) = go(config, store, tmp_path / "parts", resume=True)
    assert not different([run], [outcome(whole)])
    (plain,) = go(settings(sae), store, tmp_path / "plain")
    assert (plain.path / WEIGHTS).read_bytes() != (run.path / WEIGHTS).read_bytes()


def test_a_batch_in_parts_is_the_batch(tmp_path: Path, store: ActivationStore) -> None:
    """Up to rounding; the metrics are those of all of it."""
    sae = {**L1, "dead_after": 300}
    whole, parts = (go(settings(sae, accumulate=n, steps=8), store, tmp_path / str(n))[0] for n in (1, 3))
    for one, other in zip(whole.metrics(), parts.metrics(), strict=True):
        assert {**one, **COST} == pytest.approx({**other, **COST}, rel=1e-3)
    torch.testing.assert_close(in_training(whole).W_dec, in_training(parts).W_dec, rtol=0, atol=1e-3)


def test_bfloat16_products_train_as_well(tmp_path: Path, store: ActivationStore) -> None:
    full, half = (
        go(settings(steps=60, precision=precision), store, tmp_path / precision)[0]
        for precision in ("float32", "bfloat16")
    )
    assert half.metrics()[-1]["fvu"] == pytest.approx(full.metrics()[-1]["fvu"], rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in in_training(half).parameters())


def test_the_decoder_at_its_own_rate(tmp_path: Path, store: ActivationStore) -> None:
    """A decoder whose rate is next to nothing stays where it starts, and nothing else does."""
    (run,) = go(settings(steps=5, decoder={"ratio": 1e-9}), store, tmp_path)
    sae = in_training(run)
    fresh = create(parse(TOPK), D, seed=0)
    torch.testing.assert_close(sae.W_dec, fresh.W_dec, rtol=0, atol=1e-5)
    assert (sae.W_enc_rows - fresh.W_enc_rows).abs().max() > 1e-3
    assert run.metrics()[0]["lr_decoder"] == pytest.approx(1e-9 * run.metrics()[0]["lr"])


# What is saved


ALL = [
    TOPK,
    L1,
    {**L1, "decoder_norm": "free", "penalty": "decoder_norm"},
    {**TOPK, "input_scale": "none"},
    {**TOPK, "b_dec_init": "none", "pre_encoder_bias": False, "encoder_bias": False},
]


@pytest.mark.parametrize("sae", ALL)
def test_what_is_saved_is_what_was_trained(tmp_path: Path, store: ActivationStore, sae: dict[str, Any]) -> None:
    """The folded dictionary is the trained one, in the data's units."""
    (run,) = go(settings(sae), store, tmp_path)
    alive = in_training(run)
    saved = trained.load_run(run)
    x = store.rows(0, 512)
    expected = alive(x)
    assert (saved(x) - expected).abs().max() <= 1e-6 * expected.abs().max() + 1e-5
    assert torch.equal(saved.encode(x).dense() > 0, alive.encode(x).dense() > 0)
    torch.testing.assert_close(
        saved.encode(x).dense() * alive.target_scale, alive.encode(x).dense(), rtol=1e-4, atol=1e-5
    )
    assert float(saved.scale) == 1 and not saved.training and not any(p.requires_grad for p in saved.parameters())
    if sae.get("decoder_norm") != "free":
        torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(D_SAE), rtol=0, atol=1e-6)


def in_training(run: Run) -> SAE:
    """The dictionary as the last checkpoint holds it."""
    tensors, _ = run.load_checkpoint()
    sae = create(parse(run.config["train"]["sae"]), D)
    sae.load_state_dict({n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")})
    return sae


@pytest.mark.parametrize("sae", ALL)
def test_the_files_are_what_saelens_opens(tmp_path: Path, store: ActivationStore, sae: dict[str, Any]) -> None:
    """Its keys, shapes and settings; and its own formulas, in NumPy, on the saved tensors."""
    (run,) = go(settings(sae), store, tmp_path)
    cfg = json.loads((run.path / "cfg.json").read_text())
    name = {"topk": "topk", "l1": "standard"}[sae["arch"]]
    assert {
        "architecture": name, "d_in": D, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": sae.get("pre_encoder_bias", True), "normalize_activations": "none",
        "reshape_activations": "none",
    }.items() <= cfg.items()  # fmt: skip
    assert {name: cfg.get(name) for name in ("k", "rescale_acts_by_decoder_norm")} == (
        {"k": 4, "rescale_acts_by_decoder_norm": True}  # by norms that are 1
        if name == "topk"
        else {"k": None, "rescale_acts_by_decoder_norm": None}
    )
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_mlp_out"
    assert (cfg["metadata"]["model_name"], cfg["metadata"]["context_size"]) == ("synthetic", 8)
    assert cfg["metadata"]["model_from_pretrained_kwargs"] == {} and cfg["metadata"]["prepend_bos"] is False
    tensors = {n: t.numpy() for n, t in safetensors.torch.load_file(run.path / WEIGHTS).items()}
    shapes = {"W_enc": (D, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D), "b_dec": (D,)}
    assert {n: t.shape for n, t in tensors.items()} == shapes
    assert all(t.dtype == np.float32 for t in tensors.values())
    x = store.rows(0, 300).numpy()
    centred = x - tensors["b_dec"] if cfg["apply_b_dec_to_input"] else x
    latents = np.maximum(centred @ tensors["W_enc"] + tensors["b_enc"], 0)
    if name == "topk":
        least = np.sort(latents, axis=1)[:, -cfg["k"], None]
        latents = np.where(latents >= least, latents, 0)
    np.testing.assert_allclose(
        latents @ tensors["W_dec"] + tensors["b_dec"], trained.load_run(run)(torch.from_numpy(x)), rtol=1e-4, atol=1e-3
    )


def test_a_dictionary_that_does_not_fit_its_settings(tmp_path: Path, store: ActivationStore) -> None:
    (run,) = go(settings(steps=2), store, tmp_path)
    tensors, cfg = run.load_weights()
    run.save_weights({**tensors, "threshold": torch.zeros(D_SAE)}, cfg)
    with pytest.raises(DamagedStore, match=r"do not fit the run's settings: .*threshold"):
        trained.load_run(run)
    data = bytearray(safetensors.torch.save(tensors))
    (run.path / WEIGHTS).write_bytes(data[:-3])
    with pytest.raises(DamagedStore, match="sae_weights"):
        trained.load_run(run)


def test_a_run_that_has_not_finished_has_no_dictionary(tmp_path: Path, store: ActivationStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(settings(), store, tmp_path, progress=stop_at(3))
    with pytest.raises(NotFound, match=r"training has not finished; continue it with `train\(resume=True, name=0\)`"):
        trained.load_run(Run(tmp_path / "0"))


# Rows that lie far out


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> ActivationStore:
    """Planted rows; one in a hundred is 50 times as long."""
    rows = planted_rows(ROWS)
    rows[::100] *= 50
    return planted_store(tmp_path_factory.mktemp("far"), rows, "float32")


def norms_seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """The largest norm of what is given to each method that looks at rows; so far nothing."""
    seen: dict[str, list[float]] = {"initialise": [], "loss": []}
    for name, largest in seen.items():
        method = getattr(SAE, name)

        def watched(self: SAE, x: Tensor, *more: Any, m: Any = method, to: list[float] = largest, **named: Any) -> Any:
            to.append(float(x.norm(dim=1).max()))
            return m(self, x, *more, **named)

        monkeypatch.setattr(SAE, name, watched)
    return seen


@pytest.mark.parametrize("revive", [{"kind": "none"}, *REVIVALS], ids=lambda one: one["kind"])
def test_whatever_trains_sees_no_outlier(
    tmp_path: Path, far: ActivationStore, monkeypatch: pytest.MonkeyPatch, revive: dict[str, Any]
) -> None:
    """Neither what the scale and the bias are set from, nor a batch, nor what dead latents are drawn from."""
    limit = 10 * float(planted_rows(ROWS).norm(dim=1).median())
    seen = norms_seen(monkeypatch)
    (run,) = go(settings({**TOPK, "k": 1, "dead_after": 100}, outliers=10.0, revive=revive), far, tmp_path / "without")
    assert max(*seen["initialise"], *seen["loss"]) < limit and run.seen.limits == pytest.approx((limit,), rel=0.05)
    assert len(seen["loss"]) > (40 if revive["kind"] == "resample" else 39)
    assert len(seen["initialise"]) > (1 if revive["kind"] == "reinitialise" else 0)
    go(settings(), far, tmp_path / "with")
    assert max(seen["loss"]) > limit and seen["initialise"][-1] > limit


@pytest.mark.parametrize("arch", ["jumprelu", "l1"])
def test_outliers_left_out_are_as_if_never_there(
    tmp_path: Path, store: ActivationStore, far: ActivationStore, arch: str
) -> None:
    """L0 and FVU are those of the same rows without any that lies far out."""
    ends = []
    for name, rows, outliers in (("clean", store, None), ("far", far, 10.0), ("all", far, None)):
        (run,) = go(settings(described(arch), steps=100, lr=1e-2, outliers=outliers), rows, tmp_path / name)
        ends.append(run.metrics()[-1])
    clean, without, everything = ends
    assert without["fvu"] == pytest.approx(clean["fvu"], rel=0.25) and without["l0"] == pytest.approx(
        clean["l0"], rel=0.25
    )
    assert abs(everything["l0"] - clean["l0"]) + abs(everything["fvu"] - clean["fvu"]) > 0.5


def test_a_run_of_before_the_norm_was_recorded_goes_on_as_it_began(
    tmp_path: Path, far: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left outliers out of its batches alone, and does so to its end."""
    config = settings(outliers=10.0, revive=REVIVALS[1])
    older = open_run(config, Dataset.of(far), tmp_path, "older", resume=False)
    described = older.read_json("config.json")
    assert (described["activations"].pop("largest_norm"),) == older.seen.limits
    older.write_json("config.json", described)
    seen = norms_seen(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train([Run(older.path)], Dataset.of(far), stop_at(15), device="cpu")
    train([open_run(config, Dataset.of(far), tmp_path, "older", resume=True)], Dataset.of(far), Silent(), device="cpu")
    (limit,) = trained.limits(Run(older.path), Dataset.of(far)) or ()
    assert max(seen["loss"]) < limit < min(seen["initialise"][0], max(seen["initialise"]))


def test_a_resumed_training_without_outliers_is_the_uninterrupted_one(tmp_path: Path, far: ActivationStore) -> None:
    config = settings(outliers=10.0, revive=REVIVALS[0])
    straight = go(config, far, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(config, far, tmp_path / "stopped", progress=stop_at(13))
    assert different(go(config, far, tmp_path / "stopped", resume=True), [outcome(run) for run in straight]) == []


@pytest.fixture(scope="module")
def sinks(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> ActivationStore:
    """Planted rows; one in a hundred has a large constant added, as the tokens have that attention rests on."""
    rows = planted_rows(ROWS)
    rows[::100, 2] += 300
    return planted_store(tmp_path_factory.mktemp("sinks"), rows, "float32")


class Told(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.mark.parametrize("revive", [{"kind": "none"}, *REVIVALS], ids=lambda one: one["kind"])
def test_by_default_whatever_trains_sees_no_massive_row(
    tmp_path: Path, store: ActivationStore, sinks: ActivationStore, monkeypatch: pytest.MonkeyPatch,
    revive: dict[str, Any],
) -> None:  # fmt: skip
    """Scale and bias are those of the same rows without them, and it is said."""
    seen, told = norms_seen(monkeypatch), Told()
    config = settings({**TOPK, "k": 1, "dead_after": 100}, revive=revive)
    assert config.outliers == "auto"
    (run,) = go(config, sinks, tmp_path / "auto", progress=told)
    assert max(*seen["initialise"], *seen["loss"]) < 60 and run.seen.limits is not None
    (line,) = [line for line in told.notes if "variance" in line]
    assert line.startswith(f"{sinks.key}: 41 of 4,096 rows have a norm above ") and line.endswith("; they are left out")
    (clean,) = go(config, store, tmp_path / "clean", progress=told)
    assert clean.seen.limits is None and [line for line in told.notes if "variance" in line] == [line]
    scales = [float(run.load_checkpoint()[0]["sae.scale"]) for run in (run, clean)]
    assert scales[0] == pytest.approx(scales[1], rel=0.02)


def test_massive_rows_are_trained_on_where_all_are_asked_for(
    tmp_path: Path, sinks: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, told = norms_seen(monkeypatch), Told()
    (run,) = go(settings(outliers="none"), sinks, tmp_path, progress=told)
    assert run.seen.limits is None and run.settings["outliers"] is None and max(seen["loss"]) > 250
    (line,) = [line for line in told.notes if "variance" in line]
    assert line.endswith("; they are trained on, `train.outliers = 5` leaves them out")


def test_a_resumed_training_keeps_to_its_limit(tmp_path: Path, sinks: ActivationStore) -> None:
    """Bit for bit, and whatever the rule would say by now."""
    config = settings(revive=REVIVALS[0])
    straight = go(config, sinks, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(config, sinks, tmp_path / "stopped", progress=stop_at(13))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae.cache.massive.MEDIANS", 2.0)
        again = go(config, sinks, tmp_path / "stopped", resume=True)
    assert different(again, [outcome(run) for run in straight]) == []
    assert again[0].seen.limits == straight[0].seen.limits == trained.limits(again[0], Dataset.of(sinks))


def test_a_run_that_says_nothing_of_outliers_keeps_all(tmp_path: Path, sinks: ActivationStore) -> None:
    """The first version had no such setting, and the next ones null."""
    config = settings(outliers="none", betas=(0.9, 0.999))
    run = open_run(config, Dataset.of(sinks), tmp_path, "older", resume=False)
    described = run.read_json("config.json")
    assert described["train"].pop("outliers") is None and described.pop("revision") == REVISION
    run.write_json("config.json", described)
    assert settings_of(Run(run.path)).outliers is None and trained.limits(Run(run.path), Dataset.of(sinks)) is None
    assert open_run(config, Dataset.of(sinks), tmp_path, "older", resume=True).path == run.path
    described["train"]["outliers"] = "often"
    run.write_json("config.json", described)
    with pytest.raises(DamagedStore, match=r'config\.json: train\.outliers is "often", not a number'):
        trained.limits(Run(run.path), Dataset.of(sinks))
    described["train"]["outliers"] = None
    run.write_json("config.json", described)
    with pytest.raises(SaeError, match=r"was started with other settings \(outliers\)"):
        open_run(settings(), Dataset.of(sinks), tmp_path, "older", resume=True)


@pytest.mark.parametrize("wrong", ["often", 1, 0.5, -3, True, float("inf"), float("nan"), "1e99", [5], {}])
def test_what_is_no_rule_for_outliers(wrong: object) -> None:
    with pytest.raises(SaeError, match=r"^Train\.outliers( = .*)?: input should be auto, none or a number above 1"):
        settings(outliers=wrong)


def test_too_few_rows_that_are_kept_for_a_batch(tmp_path: Path, far: ActivationStore) -> None:
    with pytest.raises(SaeError, match=r"batch = 4096: train.outliers leaves 4,055 of the 4,096 rows of planted"):
        open_run(settings(batch=ROWS, outliers=10.0), Dataset.of(far), tmp_path, "x", resume=False)
    assert not list(tmp_path.iterdir())


# Where rows come from


def test_rows_of_any_source_are_trained_on(tmp_path: Path) -> None:
    """Whether true features are known is told by the store, not by what its source is called."""
    recipe = {
        name: value for name, value in activation_recipe(D, "float32").items() if name in ("d", "codec")
    } | {"source": {"source": "csv", "file": "eeg.csv"}, "split": "train"}  # fmt: skip
    with ActivationWriter(tmp_path, "eeg", recipe) as writer:
        extend(writer, planted_rows(512), ended=True)
    (run,) = go(settings(steps=4), writer.store, tmp_path / "runs")
    assert run.finished and "recovery" not in run.metrics()[-1]
    assert run.load_weights()[1]["metadata"]["dataset_path"] == "csv"


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ({"source": "hub", "dataset": "HuggingFaceFW/fineweb", "revision": "ab12"}, "HuggingFaceFW/fineweb"),
        ({"source": "python", "python": "3.12.1"}, None),
    ],
)
def test_the_text_of_a_dictionary_is_told(tmp_path: Path, source: dict[str, Any], path: str | None) -> None:
    """Its data set, and whether its contexts began with the begin token; stores of before say nothing of that."""
    begin = {"begin": "context"} if path is None else {}
    recipe = activation_recipe(D, "float32")
    recipe["tokens"] = {**recipe["tokens"], "source": source, **begin}
    with ActivationWriter(tmp_path, "text", recipe) as writer:
        extend(writer, planted_rows(512), ended=True)
    (run,) = go(settings(steps=2), writer.store, tmp_path / "runs")
    told = run.load_weights()[1]["metadata"]
    assert (told["dataset_path"], told["prepend_bos"]) == (path, bool(begin))


@pytest.mark.parametrize(
    ("sae", "changes", "named"),
    [
        ({"arch": "jumprelu", "d_sae": D_SAE, "target_l0": 4.0}, {}, r"train\.sae\.target_l0"),
        ({**TOPK, "decoder_norm": "free"}, {}, r"train\.sae\.decoder_norm = free"),
        (TOPK, {"align": {"by": "dec", "seeds": [0, 1]}}, r"train\.align\.weight"),
    ],
)
def test_a_run_of_before_whose_settings_mean_something_else_now_is_not_continued(
    tmp_path: Path, store: ActivationStore, sae: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    run = open_run(settings(sae, **changes), Dataset.of(store), tmp_path, "older", resume=False)
    described = run.read_json("config.json")
    assert described.pop("revision") == REVISION
    run.write_json("config.json", described)
    with pytest.raises(
        SaeError, match=f"older: was begun by an earlier version, in which {named} meant something else"
    ):
        train([Run(run.path)], Dataset.of(store), Silent(), device="cpu")


@pytest.mark.parametrize(("arch", "revision"), [("l1", 3), ("l1", 6), ("gated", 5), ("p_anneal", 6)])
def test_a_run_whose_coefficient_followed_more_closely_is_not_continued(
    tmp_path: Path, store: ActivationStore, arch: str, revision: int
) -> None:
    """One that is not steered is."""
    for name, sae in (("steered", {"target_l0": 4.0}), ("fixed", {"coefficient": 0.1, "decoder_norm": "unit"})):
        config = settings({"arch": arch, "d_sae": D_SAE, **sae}, steps=1)
        run = open_run(config, Dataset.of(store), tmp_path, name, resume=False)
        described = run.read_json("config.json") | {"revision": revision}
        described["train"]["sae"].pop("gate_to_decoder", None)
        run.write_json("config.json", described)
        if arch == "gated":
            assert getattr(settings_of(Run(run.path)).sae, "gate_to_decoder") == 0  # noqa: B009
    with pytest.raises(SaeError, match=r"steered: was begun by an earlier version, in which train\.sae\.target_l0"):
        train([Run(tmp_path / "steered")], Dataset.of(store), Silent(), device="cpu")
    train([Run(tmp_path / "fixed")], Dataset.of(store), Silent(), device="cpu")
    assert Run(tmp_path / "fixed").finished


def test_a_run_of_before_keeps_what_its_settings_meant(tmp_path: Path, store: ActivationStore) -> None:
    """AuxK by itself, and one pass where nothing said how many steps."""
    run = open_run(settings(steps=None, rows="all"), Dataset.of(store), tmp_path, "older", resume=False)
    described = run.read_json("config.json")
    del described["revision"], described["train"]["sae"]["aux_share"]
    described["train"]["rows"] = None
    run.write_json("config.json", described)
    meant = settings_of(Run(run.path))
    assert getattr(meant.sae, "aux_share") == "none" and meant.total_steps(ROWS) == ROWS // 128  # noqa: B009


def test_thresholds_learn_faster_and_those_of_before_as_before(tmp_path: Path, store: ActivationStore) -> None:
    """Adam's first step is one learning rate, whatever the gradient: half a kernel, where one step is all there is.

    Those of before have no AuxK either.
    """
    sae = {"arch": "jumprelu", "d_sae": D_SAE, "target_l0": 4.0}
    moved, aux = {}, {}
    for name, revision in (("now", REVISION), ("before", 4), ("long before", 2)):
        config = settings(sae, steps=1, lr=0.01, warmup=0.0, decay=0.0, clip=None)
        run = open_run(config, Dataset.of(store), tmp_path, name, resume=False)
        described = run.read_json("config.json") | {"revision": revision}
        if revision < REVISION:
            del described["train"]["sae"]["threshold_rate"], described["train"]["sae"]["aux_coefficient"]
        run.write_json("config.json", described)
        train([Run(run.path)], Dataset.of(store), Silent(), device="cpu")
        tensors, _ = Run(run.path).load_checkpoint()
        moved[name] = (tensors["sae.threshold"] - 0.5).abs().max().item()
        aux[name] = getattr(settings_of(Run(run.path)).sae, "aux_coefficient")  # noqa: B009
    assert moved == {name: pytest.approx(step, rel=1e-3) for name, step in zip(moved, (0.025, 0.03, 0.01), strict=True)}
    assert aux == {"now": 2, "before": 0, "long before": 0}


def test_a_run_of_before_goes_on_at_the_decay_rates_that_were_usual(tmp_path: Path, store: ActivationStore) -> None:
    """Whether they are in its folder or not; who asks for others is told so."""
    config = settings(TOPK, steps=2)
    for name, kept in (("said", True), ("unsaid", False)):
        run = open_run(config, Dataset.of(store), tmp_path, name, resume=False)
        described = run.read_json("config.json") | {"revision": 7}
        assert described["train"]["betas"] == [0.7, 0.99]
        described["train"]["betas"] = [0.9, 0.999]
        if not kept:
            del described["train"]["betas"]
        run.write_json("config.json", described)
        found = open_run(config, Dataset.of(store), tmp_path, name, resume=True)
        assert settings_of(found).decay_rates == (0.9, 0.999)
        with pytest.raises(SaeError, match=r"other settings \(betas\)"):
            open_run(settings(TOPK, steps=2, betas=(0.7, 0.99)), Dataset.of(store), tmp_path, name, resume=True)


def test_a_sweep_is_trained_alike_whatever_was_trained_before(tmp_path: Path, store: ActivationStore) -> None:
    """A run of before is one of it where it has what is unset today, and none that is refused today is in the way."""
    before = open_run(settings(TOPK, steps=2, betas=(0.9, 0.999)), Dataset.of(store), tmp_path, None, resume=False)
    short = settings({"arch": "l1", "d_sae": D_SAE, "target_l0": 4.0, "warmup": 1}, steps=2)
    refused = open_run(short, Dataset.of(store), tmp_path, None, resume=False)
    for run in (before, refused):
        described = run.read_json("config.json") | {"revision": 7}
        described["train"]["sae"] |= {"warmup": 2000.0} if run is refused else {}
        run.write_json("config.json", described)
    with pytest.raises(SaeError, match=r"train\.sae\.warmup: 2000 leaves none of 2 steps to"):
        open_run(settings_of(Run(refused.path)), Dataset.of(store), tmp_path, "new", resume=False)
    both = [settings(TOPK, steps=2, **said) for said in ({}, {"betas": (0.9, 0.999)})]
    found = open_all(both, Dataset.of(store), tmp_path)
    assert [settings_of(run).decay_rates for run in found] == [(0.7, 0.99), (0.9, 0.999)]
    assert found[1].path == before.path


@pytest.mark.parametrize("sparsity", ["topk", "jumprelu"])
def test_a_clt_of_before_is_read_whatever_counted_for_nothing(
    tmp_path: Path, store: ActivationStore, sparsity: str
) -> None:
    """Which AuxK did with thresholds, and the thresholds' rate without."""
    run = open_run(settings({"arch": "jumprelu", "d_sae": D_SAE}), Dataset.of(store), tmp_path, "older", resume=False)
    described = run.read_json("config.json") | {"revision": 4}
    given = {"arch": "clt", "d_sae": D_SAE, "sparsity": sparsity, "threshold_rate": 3.0, "aux_coefficient": 2.0}
    run.write_json("config.json", described | {"train": described["train"] | {"sae": given}})
    meant = settings_of(Run(run.path)).sae
    found = [getattr(meant, name) for name in ("threshold_rate", "aux_coefficient")]
    assert found == ([None, 2.0] if sparsity == "topk" else [3.0, 0.0])


@pytest.mark.parametrize(
    "preset",
    ["anthropic_april", "batchtopk_paper", "gemma_scope_jumprelu", "gpt_sae_l1", "nn_decompositions_topk"],
)
def test_published_presets_take_products_as_published_on_a_card(preset: str) -> None:
    assert resolve("train", TrainConfig, preset=preset).precision_on(True) == "float32"


def test_l1_has_free_rows_and_its_published_presets_the_rows_they_had() -> None:
    """Whatever the default has come to be."""
    norms = {
        preset: getattr(resolve("train", TrainConfig, preset=preset).sae, "decoder_norm")  # noqa: B009
        for preset in ("gpt_sae_l1", "anthropic_april")
    }
    assert norms == {"gpt_sae_l1": "unit", "anthropic_april": "free"}
    assert getattr(TrainConfig.model_validate({"sae": {"arch": "l1"}}).sae, "decoder_norm") == "free"  # noqa: B009


def test_the_preset_of_gemma_scope_keeps_what_was_published() -> None:
    """One rate for all parameters and nothing done about the dead, whatever the defaults have come to be."""
    config = resolve("train", TrainConfig, preset="gemma_scope_jumprelu")
    groups = trainable(config.sae, 8, seed=0).parameter_groups()
    assert {group.multiple(1e-9, 1) for group in groups} == {1} and config.decoder is None
    assert all(getattr(config.sae, name) == 0 for name in ("pre_act_coefficient", "aux_coefficient"))


@pytest.mark.parametrize(("device", "said"), [("cpu", None), ("cuda", None), ("cuda", 5)])
def test_a_card_is_not_held_up_by_checkpoints_alone(
    device: str, said: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody said how often they come: one that takes 2 s lets a card go on for 20."""
    now = [100.0]
    monkeypatch.setattr(stage, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(TrainConfig, "steps_to_checkpoint", 5)

    class Slow:
        def __init__(self) -> None:
            self.members, self.done = [SimpleNamespace(config=settings(checkpoint_every=said))], 0

        def save(self, *_: object) -> None:
            now[0] += 2

    group, loader = Slow(), SimpleNamespace(device=torch.device(device), state_dict=dict)
    state = stage.TrainState([group], loader, 100, 8)  # type: ignore[list-item, arg-type]
    written = []
    for step in range(1, 61):
        now[0] += 1
        state.step = group.done = step
        if state.due(SingleRank()):
            state.save(SingleRank())
            written.append(step)
    assert written == ([5, 25, 45] if device == "cuda" and said is None else [*range(5, 61, 5)])
