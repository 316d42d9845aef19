"""One dictionary in training: its weights, its optimiser, its part of a step, and its checkpoint.

A dictionary depends on its own settings, seed and batches alone, whatever trains beside it: what it draws at random is
a function of its seed and the step, so there is no random state to save.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Batch
from sae.cache.runs import CHECKPOINT, CONFIG, WEIGHTS, WEIGHTS_CONFIG, Run
from sae.pipeline.formats import trained
from sae.pipeline.formats.base import Metadata
from sae.pipeline.loggers.base import RunLoggers
from sae.pipeline.metrics.similarity import mmcs
from sae.pipeline.parallel.ranks import Ranks, expect_same
from sae.pipeline.runtime import devices
from sae.pipeline.saes import SAE, Clock, Losses, Trainable, kernels, placement, trainable
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.train import optimising
from sae.pipeline.train.config import TrainConfig
from sae.pipeline.train.gradients import loss_of
from sae.pipeline.train.resampling import NoRevival, Resample, firing_rate_skew, reinitialise, resample

LEAST_RATE = 1e-9  # a firing rate of 0 has no logarithm


class Diverged(SaeError):
    """A dictionary whose numbers are none any more. Those that train beside it need not end with it."""


@dataclass
class Trainer:
    """One dictionary in training: its run, its weights, its optimiser, and how many steps it has taken.

    dataset: the rows that the run was promised, of which further ones are drawn. loggers: where else its figures go.
    truth: the features [G, d_out] of rows that were made of known ones.
    """

    run: Run
    config: TrainConfig
    sae: Trainable
    optimiser: torch.optim.Optimizer
    dataset: Dataset
    device: torch.device
    truth: Tensor | None
    done: int = 0
    loggers: RunLoggers | None = None
    _spent: float = 0.0  # seconds in steps since `cost` was asked
    _steps: int = 0
    _shown: bool = False  # whether this process has computed metrics yet

    @classmethod
    def begin(cls, run: Run, config: TrainConfig, dataset: Dataset, device: torch.device) -> "Trainer":
        """A dictionary at step 0, in the precision that its settings mean here. SaeError where the rows allow none."""
        config = config.model_copy(update={"precision": config.precision_on(devices.halves(device))})
        if config.precision == "tf32" and not devices.halves(device):
            raise SaeError(
                "train.precision = tf32: is of Nvidia cards from compute capability 8.0 on, and this trains on "
                f"{device}; try float32"
            )
        outputs = dataset.widths_out if dataset.targets else None
        try:
            sae = trainable(config.sae, dataset.widths_in, outputs, seed=config.seed).to(device)
            _expect_dictionary(sae, config)
        except ValueError as error:
            raise SaeError(f"{dataset.key}: {error}") from error
        sample = dataset.sample(config.initial_rows).to(device)
        try:
            sae.initialise(sample.x, sample.y)
        except ValueError as error:
            raise SaeError(f"{dataset.key}: {error}") from error
        optimiser = optimising.adam(sae, config.rate, config.total_steps(run.seen.rows), config.decay_rates, config.eps)
        truth = dataset.truth
        return cls(run, config, sae, optimiser, dataset, device, None if truth is None else truth.to(device))

    def losses(self, part: Batch, clock: Clock) -> Losses:
        """The loss of a part of a batch."""
        if not self._shown and placement.runs_ahead(part.x):  # what who trained before this process had seen
            self.sae.look_ahead(clock._replace(step=clock.step - 1))
        return loss_of(self.sae, self.config, part, clock)

    def update(self, batch: Batch, parts: Sequence[Losses], clock: Clock, ranks: Ranks) -> dict[str, float] | None:
        """Take the step that follows the gradients of a batch whose parts had these losses; return metrics where it is
        logged, and of the first step that this process takes, so that they are seen at once.

        With several ranks `batch` and `parts` are this rank's, and the gradients those of all.
        """
        self.learn(clock)
        self.sae.track(*ranks.all_gather([self.sae.observe(part) for part in parts]))
        return self.metrics(batch.y, parts, clock, ranks) if self.conclude(clock, ranks) else None

    def learn(self, clock: Clock) -> None:
        """Move the parameters by their gradients."""
        optimising.set_rates(self.optimiser, *self.config.rates_at(clock.step, clock.steps))
        optimising.take_step(self.sae, self.optimiser, self.config.clip)

    def conclude(self, clock: Clock, ranks: Ranks) -> bool:
        """What follows a step; return whether its metrics are to be shown."""
        total = clock.steps
        self.done = clock.step + 1
        self._revive(clock, ranks)
        if ranks.rank == 0 and self.done in self.config.snapshot_steps(total):
            self._keep_snapshot()
        first, self._shown = not self._shown, True
        return first or self.logs(total)

    def _keep_snapshot(self) -> None:
        """Write directions at length 1, in half precision, and firing rates, before the checkpoint of the step."""
        assert isinstance(self.sae, SAE), "as `_expect_dictionary` says"
        rows = {"decoder": self.sae.W_dec, "encoder": self.sae.W_enc_rows}
        halves = {name: normalize(each.detach().float(), dim=1).half() for name, each in rows.items()}
        self.run.save_snapshot(self.done, {**halves, "rate": self.sae.firing_rate})

    def logs(self, total: int) -> bool:
        """Return True if the metrics of the step just taken belong in the log."""
        return self.done % self.config.log_every == 0 or self.done == total

    def log(self, entry: dict[str, float]) -> None:
        """Append a line to the metrics, and have it logged wherever else it is to be."""
        self.run.log(entry)
        if self.loggers is not None:
            self.loggers.figures(entry)

    def say_checkpoint(self) -> None:
        """Tell whoever logs it of a checkpoint that was published."""
        if self.loggers:
            named = {name.removesuffix("_rows"): value.detach() for name, value in self.sae.named_parameters()}
            self.loggers.checkpoint(self.done, self.run.path / CHECKPOINT, named | self._of_latents())

    def _of_latents(self) -> dict[str, Tensor]:
        """Figures [d_sae] of its latents: how often they fire (lately), and the norms of their decoder rows."""
        if not isinstance(self.sae, SAE):
            return {}
        rate = self.sae.firing_rate.clamp(min=LEAST_RATE).log10()
        return {"log10_firing_rate": rate, "decoder_norm": self.sae.W_dec.detach().norm(dim=-1)}

    def spend(self, seconds: float) -> None:
        """Note what a step took."""
        self._spent, self._steps = self._spent + seconds, self._steps + 1

    def cost(self) -> dict[str, float]:
        """Return this dictionary's cost: seconds a step since last asked, megabytes of weights, gradients and
        moments.
        """
        weights = [*self.sae.parameters(), *self.sae.buffers(), *(p.grad for p in self.sae.parameters())]
        moments = [value for entries in self.optimiser.state.values() for value in entries.values()]
        held = sum(one.nbytes for one in [*weights, *moments] if isinstance(one, Tensor))
        spent, self._spent, steps, self._steps = self._spent, 0.0, self._steps, 0
        return {"seconds_per_step": round(spent / max(1, steps), 6), "megabytes": round(held / 1e6, 3)}

    def on_disk(self) -> int:
        """Bytes of its run folder: two checkpoints, while one takes the place of the other, and the dictionary."""
        weights = sum(value.nbytes for value in self.sae.state_dict().values())
        moments = 2 * sum(parameter.nbytes for parameter in self.sae.parameters())
        kept = 0
        if isinstance(self.sae, SAE):  # snapshots, which are in half precision
            kept = self.config.snapshots * 2 * self.sae.d_sae * (self.sae.d_in + self.sae.d_out)
        return 2 * (weights + moments) + weights + kept

    def _revive(self, clock: Clock, ranks: Ranks) -> None:
        """What the settings do about dead latents between steps."""
        revive, k = self.config.revive, getattr(self.config.sae, "k", 0)
        if isinstance(revive, NoRevival) or not revive.due(self.done, clock.steps):
            return
        assert isinstance(self.sae, SAE), "as `_expect_dictionary` says"
        generator = self.sae.generator("revival", self.done)
        if isinstance(revive, Resample):
            resample(self.sae, self.optimiser, self._drawn(revive.rows, generator), revive, generator, clock)
        elif firing_rate_skew(self.sae, k) > revive.threshold:
            drawn = [*self._drawn(self.config.initial_rows, generator)]
            x = torch.cat([one.x for one in drawn])
            sample = Batch(x, torch.cat([one.y for one in drawn]) if self.dataset.targets else x)
            try:
                reinitialise(self.sae, self.optimiser, sample, generator)
            except ValueError as error:
                raise SaeError(f"{self.dataset.key}: {error}") from error
        ranks.broadcast(self.sae.state_dict().values())  # errors that devices round apart may have chosen other rows

    def _drawn(self, count: int, generator: torch.Generator) -> Iterator[Batch]:
        """So many rows from a random place on (they were shuffled when written), a batch at a time."""
        count = min(count, self.dataset.n_rows)
        first = int(torch.randint(self.dataset.n_rows - count + 1, (), generator=generator))
        drawn = self.dataset.following(first, count, self.config.batch)
        return (batch.to(self.device) for batch in drawn)

    def metrics(self, y: Tensor, parts: Sequence[Losses], clock: Clock, ranks: Ranks) -> dict[str, float]:
        """The figures of a step whose batch had these targets and losses, for which a device is waited. Diverged where
        the loss is no number.
        """
        if placement.runs_ahead(y) and self.logs(clock.steps):
            self.sae.look_ahead(clock)
        batch = ranks.world * len(y)
        terms = {name: _mean([part.terms[name] for part in parts], parts) for name in parts[0].terms}
        error = (y - torch.cat([part.x_hat for part in parts])).square().sum()
        spread = (y - ranks.sum(y.sum(dim=0)) / batch).square().sum()
        active = [count for part in parts if (count := part.l0()) is not None]
        l0 = torch.cat(active).float().mean() if active else torch.zeros_like(error)
        sums = [_mean([part.total for part in parts], parts), *terms.values(), error, spread, l0]
        loss, *each, error, spread, l0 = (ranks.sum(torch.stack(sums).double()) / ranks.world).tolist()
        if not math.isfinite(loss):
            raise Diverged(f"{self.run.path}: the loss is {loss} at step {self.done}; try a smaller `lr`")
        metrics = {"step": self.done, "rows": self.done * batch, "loss": loss}
        metrics |= {f"loss_{name}": value for name, value in zip(terms, each, strict=True)}
        if spread:  # without variance there is no share of it
            metrics["fvu"] = error / spread
        if active:
            metrics["l0"] = l0
        if (dead := self.sae.dead(clock)) is not None:
            metrics["dead"] = dead.float().mean().item()
        if self.truth is not None and isinstance(self.sae, Dictionary):
            metrics["recovery"] = mmcs(self.truth, self.sae.W_dec.detach()).item()
        metrics["lr"], decoder = self.config.rates_at(clock.step, clock.steps)
        return metrics if self.config.decoder is None else {**metrics, "lr_decoder": decoder}

    def save(self, loader: dict[str, int], shared: dict[str, Tensor], ranks: Ranks) -> None:
        """Write the next checkpoint, not yet published. Diverged for weights that are no numbers.

        loader: where the next batch starts. shared: what it has in common with others, in one of their checkpoints.
        """
        tensors = self._tensors()
        expect_same(tensors, ranks, f"{self.run.path}: step {self.done}")
        if not all(value.isfinite().all() for value in self.sae.state_dict().values()):
            raise Diverged(
                f"{self.run.path}: the weights are not numbers any more at step {self.done}; try a smaller `lr`"
            )
        if ranks.rank == 0:
            numerics = {"threads": torch.get_num_threads() * ranks.world, "precision": self.config.precision}
            self.run.stage_checkpoint(tensors | shared, {"step": self.done, "loader": loader, **numerics})

    def restore(self, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, int]] | None:
        """Take up the checkpoint: its tensors, and the loader's state. None where there is none yet."""
        state: dict[str, Any] = {"step": 0}
        tensors: dict[str, Tensor] = {}
        if self.run.has_checkpoint:
            tensors, state = self.run.load_checkpoint()
            self._take(tensors)
            if isinstance(before := state.get("threads"), int):  # older ones do not say
                devices.take_threads_again(before // ranks.world)
            if (products := state.get("precision")) in ("float32", "tf32", "bfloat16"):
                self.config = self.config.model_copy(update={"precision": products})
        self.done = state["step"]
        expect_same({"the steps done": torch.tensor(self.done)}, ranks, str(self.run.path))
        expect_same(self._tensors(), ranks, f"{self.run.path}: step {self.done}")
        if ranks.rank == 0:
            self.run.rewind_metrics(self.done)
        return (tensors, state["loader"]) if tensors else None

    def _tensors(self) -> dict[str, Tensor]:
        """The weights and the optimiser's state, as a checkpoint has them."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for index, entries in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
        return tensors

    def _take(self, tensors: dict[str, Tensor]) -> None:
        """The weights and the optimiser's state of a checkpoint. Raises DamagedStore where they are of other shapes."""
        weights = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        groups = self.optimiser.state_dict()["param_groups"]
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        places = [place for group in groups for place in group["params"]]
        moments = {
            f"optimiser.{place}.{key}": like
            for place, parameter in zip(places, parameters, strict=True)
            for key, like in (("step", torch.zeros(())), ("exp_avg", parameter), ("exp_avg_sq", parameter))
            if any(name.startswith(f"optimiser.{place}.") for name in tensors)  # none for what had no gradient yet
        }
        for name, like in (weights | moments).items():
            if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (like.shape, like.dtype):
                raise DamagedStore(
                    f"{self.run.path / CHECKPOINT}: its {name} is missing, or not that of the run's settings; train "
                    "again under another `name`"
                )
        self.sae.load_state_dict({name.removeprefix("sae."): tensors[name] for name in weights})
        entries: dict[int, dict[str, Tensor]] = {place: {} for place in places}
        for name in moments:
            _, place, key = name.split(".")
            entries[int(place)][key] = tensors[name]
        self.optimiser.load_state_dict({"state": entries, "param_groups": groups})

    def finish(self, metadata: Metadata) -> None:
        """Write the dictionary that was trained."""
        self.run.save_weights(*trained.written(self.sae, metadata))
        if self.loggers is not None:
            self.loggers.finished(
                [self.run.path / name for name in (CONFIG, WEIGHTS_CONFIG, WEIGHTS)], self._of_latents()
            )


@contextmanager
def products(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute within as settings say, whatever the process was told: by kernels or not, and in TF32 or not."""
    with kernels.chosen(config.kernels):
        if device.type != "cuda":
            yield
            return
        matmul: Any = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if config.precision == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _expect_dictionary(sae: Trainable, config: TrainConfig) -> None:
    """Raise SaeError where settings ask of something without latents what only a dictionary can do."""
    asked = {
        "train.revive.kind": config.revive.kind != "none",
        "train.align": config.align is not None,
        "train.snapshots": config.snapshots > 0,
    }
    if not isinstance(sae, SAE) and (named := [name for name, there in asked.items() if there]):
        raise SaeError(f"{named[0]}: arch {config.sae.arch} is not a sparse dictionary, so it cannot; leave it unset")


def _mean(values: Sequence[Tensor], parts: Sequence[Losses]) -> Tensor:
    """Mean of what the parts of a batch have, weighed by their rows."""
    rows = sum(part.rows for part in parts)
    return torch.stack([value.detach() * (part.rows / rows) for value, part in zip(values, parts, strict=True)]).sum()
