"""A run folder: everything one trained dictionary is, in files any tool reads.

config.json               what was asked for, with the recipes of the activations it was trained on
metrics.jsonl             one line a logged step
checkpoint.safetensors    the whole training state, replaced atomically; its JSON part is in the header
failure.json              the step and the error, where the numbers were none any more and training ended early
checkpoint.next...        the one that will replace it, once those of all dictionaries trained with it are written
snapshots/                directions and firing rates at log-spaced steps, where training was told to keep them
cfg.json                  \\ the dictionary, in the layout SAELens opens; written when training ends
sae_weights.safetensors   /
eval/                     what `sae eval` found (eval.json, latents.safetensors), and `sae report` (features.json:
                          some latents; statistics.safetensors: all of them)
eval/                     what `sae eval` found (eval.json, latents.safetensors), `sae report` (features.json) and
                          `sae explain` (explanations.json)
explain/                  what language models answered to `sae explain`, a file a request

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.cache.disk import removal
from sae.cache.disk.durable import expect_no_link, move, read, write_in
from sae.cache.disk.locks import LOCK, Lock
from sae.cache.disk.parsing import MOST_BYTES, as_written, figure, inner, parsed_mapping, whole
from sae.cache.disk.processes import final_name
from sae.cache.disk.sealed import CRC, sealed, unsealed
from sae.cache.disk.tensors import read_header, read_tensors, write_tensors
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.metrics_log import Extent, MetricsLog
from sae.cache.seen import Seen

if TYPE_CHECKING:  # listing runs needs no torch, and its import takes seconds
    from torch import Tensor

CONFIG = "config.json"
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


class Run:
    """One run folder. Raises NotFound where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / CONFIG).exists():
            raise NotFound(f"{path}: is not a run folder (no {CONFIG}); `choices()` shows the runs")
        self.sealed = True  # whether its files carry checksums: those of version 0.1.0 do not
        try:
            self.config, self.sealed = _config(self._bytes(CONFIG))
            if not (self.sealed or self.foreign) and self.config.keys() != {"train", "activations"}:
                raise ValueError("its checksum is missing")
        except ValueError as error:
            if isinstance(error, SaeError):
                raise
            raise DamagedStore(
                f"{path / CONFIG}: is not what was written ({error}); a run keeps the settings it began with: put them "
                "back, and train others as a run of their own"
            ) from error
        self._metrics = MetricsLog(path)
        self._made: bytes | None = None  # config.json, where this very object made the folder

    @property
    def foreign(self) -> bool:
        """Return True if the folder is another tool's, whose config.json is of something else."""
        return not (self.sealed or _is_ours(self.config))

    @property
    def decomposes(self) -> bool:
        """Return True if the run is of a decomposition of weights, not of a dictionary."""
        return not self.foreign and "decompose" in self.config

    @cached_property
    def imported(self) -> dict[str, Any] | None:
        """The facts about another tool's dictionary that this is the run of; None for one that is trained here."""
        with as_written(self.path / CONFIG):
            return inner(self.config, "imported") if "imported" in self.config else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of its training, as its stage reads them. Raises DamagedStore where there are none.

        Of an imported dictionary, what is known of it.
        """
        with as_written(self.path / CONFIG):
            if self.decomposes:
                return inner(self.config, "decompose")
            return inner(self.config, "train") if self.imported is None else self.imported

    @cached_property
    def revision(self) -> int:
        """Of what its settings mean, which its stage knows. Raises DamagedStore where it is no number."""
        with as_written(self.path / CONFIG):
            return whole(self.config, "revision", 1) if "revision" in self.config else 1

    @cached_property
    def seen(self) -> Seen:
        """The stores it was asked to be trained on. Raises DamagedStore where that is nothing that can be."""
        with as_written(self.path / CONFIG):
            return Seen.from_json(self.config)

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> Run:
        """A new run folder. Raises SaeError where one exists already, or something else of that name."""
        if not _is_vacant(path):
            run = Run(path) if (path / CONFIG).exists() else None
            what = f"is there, and is not a run (it has no {CONFIG})" if run is None else "exists"
            what = "is another tool's folder" if run is not None and run.foreign else what
            cure = "choose" if run is None or run.foreign or run.imported else "continue it with `resume` or choose"
            raise SaeError(f"name = {path.name}: {path} {what}; {cure} another `name`")
        removal.finish(path.parent, is_begun)
        data = sealed(config)
        with Lock(path):  # of two at once, one begins it
            if not _is_vacant(path):
                raise SaeError(f"name = {path.name}: {path} exists; continue it with `resume` or choose another `name`")
            write_in(path, CONFIG, data)
            run = cls(path)
        run._made = data
        return run

    def discard(self) -> None:
        """Remove a folder that this very object made, where there is nothing in it yet but what it was made with.

        Does nothing for any other folder, nor where another process has begun to train in it.
        """
        if self._made is None or not (self.path / CONFIG).exists():
            return
        with suppress(SaeError), Lock(self.path) as lock:  # it stays where another holds it, or it may not be removed
            if read(self.path / CONFIG) == self._made and not removal.strangers(self.path, is_begun):
                removal.remove(self.path, is_begun, lock)

    @property
    def name(self) -> str:
        return self.path.name

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

    def lock(self) -> Lock:
        """Exclusive use for training."""
        return Lock(self.path)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder. Raises DamagedStore when it is not what was written."""
        data = self._bytes(name)
        with as_written(self.path / name):
            content, checked = unsealed(data)
            if self.sealed and not checked:
                raise ValueError("its checksum is missing")
            return content

    def _bytes(self, name: str) -> bytes:
        data = read(self.path / name, MOST_BYTES)
        if data is None:
            raise NotFound(f"{self.path / name}: not there yet")
        return data

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

    def write_json(self, name: str, content: dict[str, Any]) -> Path:
        """Write a JSON file of the folder atomically. SaeError for NaN and infinity: they are not JSON."""
        path = self.path / name
        try:
            data = sealed(content)
        except ValueError as error:
            raise SaeError(
                f"{path}: not written, a figure is NaN or infinite; rows or weights hold numbers too large to square"
            ) from error
        return write_in(self.path, name, data)

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


def _config(data: bytes) -> tuple[dict[str, Any], bool]:
    """Return the content of a config.json, and whether it has a checksum. Raises ValueError where it is not ours.

    That of another tool may be JSON as Python writes it, with NaN and infinity.
    """
    try:
        return unsealed(data)
    except ValueError:
        with suppress(ValueError):
            said = parsed_mapping(data, nan_is_null=True)
            if CRC not in said and not _is_ours(said):
                return said, False
        raise


def _is_ours(config: dict[str, Any]) -> bool:
    """Return True if a config.json is that of a run, whatever else is wrong with it."""
    return "decompose" in config or ("activations" in config and ("train" in config or "imported" in config))


@contextmanager
def discarding(runs: Sequence[Run]) -> Iterator[None]:
    """Remove, where an error ends this, the folders that were made for it and in which nothing came to be."""
    try:
        yield
    except Exception:
        for run in runs:
            run.discard()
        raise


def is_begun(name: str) -> bool:
    """Return True if a file of a run folder, named relative to it, is there before training begins."""
    return name in (CONFIG, LOCK) or final_name(name) == CONFIG


def _is_vacant(path: Path) -> bool:
    """Return True if nothing is at a path but what is left of a run that was killed while it was begun."""
    if path.is_symlink() or (path.exists() and not path.is_dir()) or (path / CONFIG).exists():
        return False
    return not path.exists() or not removal.strangers(path, is_begun)


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
