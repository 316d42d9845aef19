"""A run folder: everything one trained dictionary is, in files any tool reads.

config.json               what was asked for, with the recipes of the activations it was trained on
metrics.jsonl             one line a logged step
checkpoint.safetensors    the whole training state, replaced atomically; its JSON part is in the header
failure.json              the step and the error, where the numbers were none any more and training ended early
checkpoint.next...        the one that will replace it, once those of all dictionaries trained with it are written
snapshots/                directions and firing rates at log-spaced steps, where training was told to keep them
cfg.json                  \\ the dictionary, in the layout SAELens opens; written when training ends
sae_weights.safetensors   /
eval/                     what `sae eval` found (eval.json, latents.safetensors), `sae report` (features.json: some
                          latents; statistics.safetensors: all of them) and `sae explain` (explanations.json)
explain/                  what language models answered to `sae explain`, a file a request
analysis/, steering/      what `sae analyze` and `sae steer` found, with plots

The run of a decomposition of weights has the same files: settings and stores under other keys of its config.json,
and its figures in eval/decomposition.json.

The run of a dictionary that another tool trained, which `adopt` makes, has the dictionary alone: its config.json says
what it is (`imported`) in the place of what was asked for, and the activations that it is judged on.

Every file is checked when it is read. JSON and tensors carry a checksum of their own (`cache.disk.sealed`,
`cache.disk.tensors`); the checkpoint has that of the metrics logged before it, and the weights have
that of cfg.json, which is SAELens' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from sae.cache.disk.durable import expect_no_link, move, write_in
from sae.cache.disk.parsing import as_written, figure, inner, parsed_mapping, whole
from sae.cache.disk.processes import final_name
from sae.cache.disk.tensors import read_header, read_tensors, write_tensors
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.metrics_log import Extent, MetricsLog
from sae.cache.run_folder import CONFIG as CONFIG
from sae.cache.run_folder import RunFolder

if TYPE_CHECKING:  # listing runs needs no torch, and its import takes seconds
    from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"
STAGED = "checkpoint.next.safetensors"
WEIGHTS = "sae_weights.safetensors"
WEIGHTS_CONFIG = "cfg.json"
FAILURE = "failure.json"
EVALUATION, LATENTS, FEATURES = "eval/eval.json", "eval/latents.safetensors", "eval/features.json"
DECOMPOSITION = "eval/decomposition.json"
STATISTICS = "eval/statistics.safetensors"
EXPLANATIONS = "eval/explanations.json"
SNAPSHOTS = "snapshots"


class Run(RunFolder):
    """One run folder, with what training, evaluation and reports leave in it. Raises NotFound where there is none."""

    @cached_property
    def _metrics(self) -> MetricsLog:
        return MetricsLog(self.path)

    @property
    def finished(self) -> bool:
        """Return True if training ended: the dictionary is there (weights last)."""
        return (self.path / WEIGHTS).exists()

    @property
    def failure(self) -> dict[str, Any] | None:
        """`step` and `error` of a training that ended early by itself; None where none did, or it is going on again."""
        return self.read_json(FAILURE) if (self.path / FAILURE).exists() else None

    def clear_failure(self) -> None:
        """Forget how an earlier training ended."""
        (self.path / FAILURE).unlink(missing_ok=True)

    def evaluation(self) -> dict[str, Any] | None:
        """Return the findings of `sae eval`: figures by name (None: not defined), `details`, and the same for the rows
        `kept`.

        None where it has not run. Raises DamagedStore where a figure is no number.
        """
        if not (self.path / EVALUATION).exists():
            return None
        found = self.read_json(EVALUATION)
        with as_written(self.path / EVALUATION):
            found = _figures(found)
            return found if "kept" not in found else found | {"kept": _figures(found["kept"])}

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line of metrics."""
        self._metrics.append(entry)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics: `step`, and figures by name (None: not defined there).

        Raises DamagedStore, naming the line, for one that is not what was written.
        """
        return self._metrics.entries(self._known_metrics())  # known first: a living trainer writes them last

    def rewind_metrics(self, step: int) -> None:
        """Forget what was logged after `step`, that of the checkpoint or 0: a resumed run logs it again."""
        self._metrics.rewind(step, self._known_metrics() if self.has_checkpoint else Extent.of(b""))

    def _known_metrics(self) -> Extent | None:
        """The metrics that the checkpoint follows; None where it says none, as in version 0.1.0, or there is none."""
        path = self.path / CHECKPOINT
        if not path.exists():
            return None
        with _begin_anew():
            header = read_header(path)
        if "metrics" not in header:
            return None
        with as_written(path):
            return Extent.from_json(header["metrics"])

    def stage_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write what `publish_checkpoint` makes the checkpoint. `state["step"]` says how far training was."""
        for path in self.path.iterdir():
            if final_name(path.name) == STAGED:  # left by a process killed while it wrote
                path.unlink()
        header = {"state": json.dumps(state), "metrics": self._metrics.flushed().as_json()}
        write_tensors(self.path, STAGED, tensors, header)

    def publish_checkpoint(self) -> None:
        """Put the staged checkpoint in the place of the last one, whole or not at all."""
        expect_no_link(self.path)
        move(self.path / STAGED, self.path / CHECKPOINT)

    def checkpoint_step(self, *, staged: bool = False) -> int:
        """The step of the checkpoint, or of the staged one; -1 where there is none. Its tensors are not read."""
        path = self.path / (STAGED if staged else CHECKPOINT)
        if not path.exists():
            return -1
        with _begin_anew():
            header = read_header(path)
        with as_written(path):
            return whole(_state(header), "step")

    @property
    def has_checkpoint(self) -> bool:
        return (self.path / CHECKPOINT).exists()

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the JSON state of the last checkpoint. Raises DamagedStore when a byte differs."""
        path = self.path / CHECKPOINT
        with _begin_anew():
            tensors, header = read_tensors(path)
        with as_written(path):
            return tensors, _state(header)

    def save_weights(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        """Write the finished dictionary (weights last: their presence says it is finished)."""
        data = json.dumps(config, indent=2, allow_nan=False).encode()
        write_in(self.path, WEIGHTS_CONFIG, data)
        write_tensors(self.path, WEIGHTS, tensors, extra_file=data if self.sealed else b"")  # as the folder was begun

    def load_weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and cfg.json of the finished dictionary. Raises NotFound while training has not ended."""
        if not self.finished:
            raise NotFound(
                f"{self.path}: training has not finished; continue it with "
                f"`{'decompose' if self.decomposes else 'train'}(resume=True, name={self.name})`"
            )
        if not (self.path / WEIGHTS_CONFIG).exists():
            raise DamagedStore(f"{self.path / WEIGHTS_CONFIG}: missing, though training has finished")
        data = self._bytes(WEIGHTS_CONFIG)
        try:
            tensors, _ = read_tensors(self.path / WEIGHTS, sealed=self.sealed, extra_file=data if self.sealed else b"")
        except DamagedStore as error:
            raise DamagedStore(f"{error}, or {WEIGHTS_CONFIG} beside it is not what was written") from error
        with as_written(self.path / WEIGHTS_CONFIG):
            return tensors, parsed_mapping(data)

    def save_latents(self, tensors: dict[str, Tensor]) -> None:
        """Write what `sae eval` found of each latent."""
        write_tensors(self.path, LATENTS, tensors)

    def load_latents(self) -> dict[str, Tensor] | None:
        """Return the tensors of `save_latents`; None where there are none. Raises DamagedStore when a byte differs."""
        path = self.path / LATENTS
        return read_tensors(path, sealed=self.sealed)[0] if path.exists() else None

    def _statistics(self) -> None:
        """Read what was gathered about latents. Raises DamagedStore when a byte differs."""
        if (path := self.path / STATISTICS).exists():
            read_tensors(path)

    def save_snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Write what is kept of a step, whole or not at all; the same step again replaces it."""
        write_tensors(self.path, f"{SNAPSHOTS}/{step:09d}.safetensors", tensors)

    def snapshots(self) -> list[int]:
        """The steps of the snapshots, in order."""
        return sorted(
            int(path.stem) for path in (self.path / SNAPSHOTS).glob("[0-9]*.safetensors") if path.stem.isdigit()
        )

    def load_snapshot(self, step: int) -> dict[str, Tensor]:
        """The tensors of `save_snapshot`. Raises DamagedStore when a byte differs."""
        return read_tensors(self.path / SNAPSHOTS / f"{step:09d}.safetensors")[0]

    def check(self) -> list[str]:
        """Return what is wrong with the files of the folder, read from the first byte to the last, a line each."""
        written = (self.path / "eval").glob("*.json")
        readings: list[Callable[[], object]] = [
            self.metrics, self.evaluation, self.load_latents, self._statistics, lambda: self.failure,
            *(partial(self.read_json, path.relative_to(self.path).as_posix()) for path in sorted(written)),
            *(partial(self.load_snapshot, step) for step in self.snapshots()),
            *([self.load_checkpoint] if self.has_checkpoint else []),
            *([self.load_weights] if self.finished else []),
        ]  # fmt: skip
        damage = []
        for reading in readings:
            try:
                reading()
            except SaeError as error:
                damage.append(str(error))
        return list(dict.fromkeys(damage))


@contextmanager
def _begin_anew() -> Iterator[None]:
    """Say of a damaged checkpoint what is left to do."""
    try:
        yield
    except DamagedStore as error:
        raise DamagedStore(f"{error}; train again without `resume` under another `name`") from error


def _figures(said: dict[str, Any]) -> dict[str, Any]:
    """Figures by name, beside what holds more of them."""
    nested = {name: inner(said, name) for name in ("details", "kept") if name in said}
    return {name: figure(said, name) for name in said if name not in nested} | nested


def _state(header: dict[str, str]) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state = parsed_mapping(header.get("state", "").encode())
    whole(state, "step")
    return state
