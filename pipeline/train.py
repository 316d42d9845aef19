"""Activation store -> run folders: any number of dictionaries over one stream of batches.

Every dictionary sees identical batches, so the first of many equals a solo run. Everything that must survive a restart
is in the checkpoint: weights, optimiser, dead counters, loader position, random state; a resumed run equals one that
was never stopped, bit for bit on CPU.
"""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from cache.activations import ActivationStore
from cache.errors import NotFound, SaeError
from cache.identity import digest
from cache.loader import Loader
from cache.runs import CONFIG, Run
from pipeline import devices
from pipeline.progress import Progress
from pipeline.saes import SAE, AnyConfig, Clock, Losses, create, parse

Beta = Annotated[float, Field(ge=0, lt=1)]
STREAM = ("batch", "steps", "rows", "data_seed")  # what dictionaries trained together must agree on


class TrainConfig(BaseModel):
    """How one dictionary is trained. One pass over the store unless `steps` or `rows` say otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: AnyConfig = Field(
        parse({"arch": "topk"}), description="the dictionary: its architecture and that architecture's settings"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate of Adam")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's decay rates")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps over which the learning rate rises from 0")
    decay: float = Field(0.2, ge=0, le=1, description="share of the steps, the last ones, over which it falls to 0")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; null for none")
    batch: int = Field(4096, ge=1, description="rows in a batch")
    steps: int | None = Field(None, ge=1, description="steps to train")
    rows: int | None = Field(None, ge=1, description="rows to see, instead of steps")
    seed: int = Field(0, ge=0, description="seed of the initial weights")
    data_seed: int = Field(0, ge=0, description="seed of the order of the rows")
    initial_rows: int = Field(16_384, ge=1, description="rows from which the bias and the input scale are set")
    log_every: int = Field(50, ge=1, description="steps between two lines of metrics")
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.steps is not None and self.rows is not None:
            raise ValueError(f"steps = {self.steps} and rows = {self.rows}: give one of them")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup = {self.warmup} and decay = {self.decay}: together they are more than all steps")
        return self

    def total_steps(self, store_rows: int) -> int:
        """Steps this run takes on a store of that many rows."""
        if self.steps is not None:
            return self.steps
        return max(1, (store_rows if self.rows is None else self.rows) // self.batch)

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step 0, 1, ...: linear rise, constant, linear fall to 0 after the last step."""
        rise = min(1.0, (step + 1) / (self.warmup * total)) if self.warmup else 1.0
        fall = min(1.0, (total - step) / (self.decay * total)) if self.decay else 1.0
        return self.lr * min(rise, fall)


def open_run(config: TrainConfig, store: ActivationStore, root: Path, name: str | None, *, resume: bool) -> Run:
    """The run folder for a configuration: new, or with `resume` the one that has the same configuration.

    Raises SaeError where a new one exists, where there is none to resume, or where its configuration differs.
    """
    content = {
        "train": config.model_dump(mode="json"),
        "activations": {"key": store.key, "rows": store.n_rows, "recipe": store.recipe},
    }
    if name is None:
        point = f"{store.recipe['layer']}.{store.recipe['site']}" if "layer" in store.recipe else store.slug
        identity = {"train": content["train"], "activations": store.recipe}
        name = f"{config.sae.arch}-{config.sae.d_sae}-{point}-{digest(identity)}"
    if not resume:
        if config.batch > store.n_rows:
            raise SaeError(f"--batch {config.batch}: {store.key} has {store.n_rows:,} rows; lower it, or harvest more")
        return Run.create(root / name, content)
    if not (root / name / CONFIG).exists():
        raise NotFound(f"--resume: no run {name} in {root}; `sae list` shows the runs, without --resume it is started")
    run = Run(root / name)
    for part, given in (("train", content["train"]), ("recipe", store.recipe)):
        saved = run.config["train"] if part == "train" else run.config["activations"]["recipe"]
        if saved != given:
            differs = sorted(key for key in {*saved, *given} if saved.get(key) != given.get(key))
            raise SaeError(f"--resume: {run.path} was started with other settings ({', '.join(differs)}); repeat those")
    return run


@dataclass
class Member:
    """One dictionary in training: its run, its weights, its optimiser, and how many steps it has taken."""

    run: Run
    config: TrainConfig
    sae: SAE
    optimiser: torch.optim.Optimizer
    done: int = 0

    def step(self, x: Tensor, step: int, total: int) -> dict[str, float] | None:
        """One optimiser step on a batch [batch, d]; the metrics where this step is logged."""
        losses = self.sae.loss(x, clock=Clock(step, total))
        self.optimiser.zero_grad(set_to_none=True)
        losses.total.backward()
        self.sae.before_step()
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr_at(step, total)
        self.optimiser.step()
        self.sae.after_step(losses.latents)
        self.done = step + 1
        logged = (step + 1) % self.config.log_every == 0 or step + 1 == total
        return self._metrics(x, losses, step, total) if logged else None

    def _metrics(self, x: Tensor, losses: Losses, step: int, total: int) -> dict[str, float]:
        loss = losses.total.item()
        if not math.isfinite(loss):
            raise SaeError(f"{self.run.path}: the loss is {loss} at step {step + 1}; try a smaller --lr")
        metrics = {"step": step + 1, "rows": (step + 1) * len(x), "loss": loss}
        metrics |= {f"loss_{name}": term.item() for name, term in losses.terms.items()}
        if scatter := (x - x.mean(dim=0)).square().sum().item():  # without variance there is no share of it
            metrics["fvu"] = (x - losses.x_hat).square().sum().item() / scatter
        metrics["l0"] = losses.latents.l0().float().mean().item()
        metrics["dead"] = self.sae.dead().float().mean().item()
        metrics["lr"] = self.config.lr_at(step, total)
        return metrics

    def save(self, loader: dict[str, int]) -> None:
        """Write the checkpoint; `loader` is where the next batch starts. SaeError for weights that are no numbers."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        if not all(value.isfinite().all() for value in tensors.values()):
            raise SaeError(
                f"{self.run.path}: the weights are no numbers any more at step {self.done}; try a smaller --lr"
            )
        for index, entries in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        tensors["random"] = torch.get_rng_state()
        self.run.save_checkpoint(tensors, {"step": self.done, "loader": loader})

    def restore(self) -> tuple[Tensor, dict[str, int]] | None:
        """Take up the checkpoint: the random state and the loader's. None where there is none yet."""
        if not self.run.has_checkpoint:
            self.run.rewind_metrics(0)
            return None
        tensors, state = self.run.load_checkpoint()
        self.sae.load_state_dict({n.removeprefix("sae."): t for n, t in tensors.items() if n.startswith("sae.")})
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimiser."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})
        self.done = state["step"]
        self.run.rewind_metrics(self.done)
        return tensors["random"], state["loader"]


@dataclass
class TrainState:
    """Everything that must survive a restart."""

    members: list[Member]
    loader: Loader
    total: int
    step: int = 0
    started: float = field(default_factory=time.monotonic)

    def save(self) -> None:
        """Write the members' checkpoints, but for those that are ahead: they have a later one."""
        for member in self.members:
            if member.done == self.step:
                member.save(self.loader.state_dict())

    def restore(self) -> None:
        """Take up the members' checkpoints. A kill may have caught some before theirs was written: the others wait."""
        states = [member.restore() for member in self.members]
        last, state = min(zip(self.members, states, strict=True), key=lambda pair: pair[0].done)
        self.step = last.done
        if state is not None:
            random, loader = state
            torch.set_rng_state(random)
            self.loader.load_state_dict(loader)


def train(
    runs: Sequence[Run], store: ActivationStore, progress: Progress, *, device: str = "auto"
) -> list[dict[str, Any]]:
    """Train (or continue) the dictionaries of `runs` over one stream of `store`'s rows; their last metrics."""
    where = devices.device(device)
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.lock())
        state = _begin(runs, store, where, progress)
        stack.enter_context(state.loader)
        stopping = stack.enter_context(_interruptible())
        progress.start("train", state.total, "steps", done=state.step)
        stack.callback(progress.finish)
        for x in state.loader if state.step < state.total else ():
            shown: dict[str, float] = {}
            for member in state.members:
                if member.done > state.step:
                    continue
                if (metrics := member.step(x, state.step, state.total)) is not None:
                    member.run.log({**metrics, "seconds": round(time.monotonic() - state.started, 3)})
                    shown = {name: metrics[name] for name in ("loss", "fvu", "l0", "dead") if name in metrics}
            state.step += 1
            progress.advance(1, **shown)
            every = min(member.config.checkpoint_every for member in state.members)
            if state.step % every == 0 or stopping or state.step == state.total:
                state.save()
            if stopping:
                progress.note(f"checkpoint at step {state.step:,}; continue with --resume")
                raise KeyboardInterrupt
            if state.step == state.total:
                break
        return [_finish(member) for member in state.members]


def _begin(runs: Sequence[Run], store: ActivationStore, device: torch.device, progress: Progress) -> TrainState:
    """Fresh or restored state for the runs, which must share their stream."""
    configs = [TrainConfig.model_validate(run.config["train"]) for run in runs]
    for name in STREAM:
        if len({getattr(config, name) for config in configs}) > 1:
            raise SaeError(f"train.{name}: dictionaries trained together must agree on it")
    first, rows = configs[0], runs[0].config["activations"]["rows"]
    loader = Loader(store, first.batch, seed=first.data_seed, rows=rows, device=device)
    members = []
    for run, config in zip(runs, configs, strict=True):
        seen = run.config["activations"]
        if seen["recipe"] != store.recipe or seen["rows"] != rows:
            raise SaeError(f"{run.path}: is for {seen['rows']:,} rows of {seen['key']}, not {rows:,} of {store.key}")
        sae = create(config.sae, store.d, seed=config.seed).to(device)
        sample = store.rows(0, min(config.initial_rows, rows)).to(device)
        try:
            sae.initialise(sample)
        except ValueError as error:
            raise SaeError(f"{store.path}: {error}") from error
        optimiser = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=config.betas, fused=True)
        members.append(Member(run, config, sae, optimiser))
    torch.manual_seed(first.seed)
    state = TrainState(members, loader, first.total_steps(rows))
    state.restore()
    if any(run.has_checkpoint for run in runs):
        progress.note(f"{runs[0].name}: continuing at step {state.step:,} of {state.total:,}")
    return state


def _finish(member: Member) -> dict[str, Any]:
    """Write the dictionary that was trained; its last metrics."""
    recipe = member.run.config["activations"]["recipe"]
    member.run.save_weights(member.sae.export_tensors(), member.sae.saelens_config() | {"metadata": _metadata(recipe)})
    return member.run.metrics()[-1]


def _metadata(recipe: dict[str, Any]) -> dict[str, Any]:
    """What other tools want to know about where a dictionary belongs (the SAELens keys)."""
    return {
        "sae_lens_version": "6.54.12",
        "model_name": recipe["model"]["model"],
        "hook_name": recipe["hook"],
        "context_size": recipe["tokens"]["context_length"],
        "prepend_bos": False,
        "dataset_path": recipe["tokens"]["source"].get("name"),
        "model_from_pretrained_kwargs": {},
    }


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives, so that the step in progress can end first.

    A second signal acts as usual. Signals that are ignored (of a process in the background) stay so, and outside the
    main thread all do.
    """
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(wanted) is not signal.SIG_IGN:
                before[wanted] = signal.signal(wanted, note)
    except ValueError:  # not the main thread: nobody sends us signals
        before.clear()
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
