"""A subject -> a run folder: the training of a decomposition, which a kill or Ctrl-C interrupts and a resume continues.

Everything that must survive a restart is in the checkpoint: components, optimiser, where the next batch starts. A
resumed run equals one that was never stopped, bit for bit on CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from sae.cache.disk.parsing import as_written, inner
from sae.cache.errors import SaeError
from sae.cache.runs import CHECKPOINT, FAILURE, Run
from sae.pipeline.decompose import folder, plots
from sae.pipeline.decompose.config import DecomposeConfig
from sae.pipeline.decompose.reading import read
from sae.pipeline.decompose.subjects import Subject
from sae.pipeline.decompose.training import Training
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.interrupts import Interrupted, interruptible
from sae.pipeline.runtime.progress import Progress

SHOWN = ("loss", "faithfulness", "l0")  # beside the progress bar
MODEL = "model."  # begins the names of what a checkpoint keeps of the model itself

Opener = Callable[[dict[str, Tensor]], Subject]
"""Makes a subject, given what a checkpoint kept of the model: nothing, where there is no checkpoint."""


def decompose(run: Run, config: DecomposeConfig, opener: Opener, progress: Progress) -> dict[str, Any]:
    """Train (or continue) a decomposition, and judge it: its figures, which are written into the run folder."""
    with run.lock():
        if run.finished and (found := folder.figures(run)) is not None:
            return found
        tensors, state = run.load_checkpoint() if run.has_checkpoint else ({}, {"step": 0})
        if isinstance(before := state.get("threads"), int):
            devices.take_threads_again(before)
        subject = opener({name.removeprefix(MODEL): one for name, one in tensors.items() if name.startswith(MODEL)})
        if run.finished:
            decomposition = folder.load(run).to(next(iter(subject.matrices.values())).device)
        else:
            run.clear_failure()
            run.rewind_metrics(state["step"])
            training = Training(config, subject)
            _train(run, training, tensors, state, progress)
            decomposition = training.decomposition
            folder.save(run, decomposition, config)
        reading = read(decomposition, subject, config, progress)
        plots.draw(reading, run.path / plots.FILE)
        folder.keep(run, reading)
        return reading.figures


def _train(run: Run, training: Training, tensors: dict[str, Tensor], state: dict[str, Any], progress: Progress) -> None:
    config, feed, first = training.config, training.subject.batches(), int(state["step"])
    with closing(feed), interruptible() as stopping:
        if tensors:
            training.take(tensors, str(run.path / CHECKPOINT))
            with as_written(run.path / CHECKPOINT):
                feed.load_state_dict(inner(state, "feed"))
            progress.note(f"{run.name}: continuing at step {first:,} of {config.steps:,}")
        else:
            training.warm_up()
        started, shown, batches = time.monotonic(), {}, iter(feed)
        progress.start("decompose", config.steps, "steps", done=first)
        try:
            for done in range(first + 1, config.steps + 1):
                terms = training.step(next(batches), done - 1)
                logged = done % config.log_every == 0 or done == config.steps
                if logged or done == first + 1:
                    entry = _entry(run, config, done, terms)
                    shown = {name: entry[name] for name in SHOWN}
                    if logged:
                        run.log({**entry, "seconds": round(time.monotonic() - started, 3)})
                progress.advance(1, **shown)
                if done % config.checkpoint_every == 0 or stopping or done == config.steps:
                    _save(run, training, {"step": done, "feed": feed.state_dict(), "threads": torch.get_num_threads()})
                if stopping and done < config.steps:
                    raise Interrupted(stopping[0], f"checkpoint at step {done:,}")
        finally:
            progress.finish()


def _save(run: Run, training: Training, state: dict[str, Any]) -> None:
    """Write a checkpoint in the place of the last one. Raises SaeError where the components are no numbers any more."""
    if not all(value.isfinite().all() for value in folder.trained(training.decomposition).values()):
        raise _failed(run, state["step"], "the components are no numbers any more")
    kept = {f"{MODEL}{name}": value for name, value in training.subject.kept().items()}
    run.stage_checkpoint(training.tensors() | kept, state)
    run.publish_checkpoint()


def _entry(run: Run, config: DecomposeConfig, done: int, terms: dict[str, Tensor]) -> dict[str, float]:
    """A line of metrics. Raises SaeError where the loss is no number."""
    values = {name: value.item() for name, value in terms.items()}
    loss = sum(value for name, value in values.items() if name.startswith("loss_"))
    if not math.isfinite(loss):
        raise _failed(run, done, f"the loss is {loss}")
    active = sum(value for name, value in values.items() if name.startswith("l0_"))
    rates = {"p": config.power(done - 1), "lr": config.rate(done - 1)}
    return {"step": done, "loss": loss, "l0": active, **values, **rates}


def _failed(run: Run, step: int, what: str) -> SaeError:
    """The error of a training that ends by itself; the run folder says so, too."""
    error = f"{run.path}: {what} at step {step}; try a smaller `lr`"
    run.write_json(FAILURE, {"step": step, "error": error})
    return SaeError(error)
