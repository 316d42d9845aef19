"""What a logger is, which there are, and the loggers of a run."""

from __future__ import annotations

import importlib.util
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from sae.cache.disk.parsing import as_written, whole
from sae.cache.errors import SaeError, needing
from sae.cache.runs import Run

LOGGERS = "loggers.json"
ITS_OWN = ("base",)  # modules of this folder that are no logger


class Logger(ABC):
    """One service that a run is logged to, from the step it continues at.

    known: what this logger wrote down of the run before (empty at first): what it needs to go on in the same place.
    """

    needs: ClassVar[str]  # the module it cannot do without

    def __init__(self, run: Run, step: int, known: dict[str, Any]) -> None:
        self.run, self.step, self.known = run, step, known

    @abstractmethod
    def figures(self, step: int, figures: Mapping[str, float | None]) -> None:
        """A line of metrics.jsonl."""

    @abstractmethod
    def checkpoint(self, step: int, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A checkpoint that was written, and what is worth a histogram: weights, and how often latents fire."""

    @abstractmethod
    def finished(self, files: Iterable[Path], latents: Mapping[str, Tensor]) -> None:
        """The files of the finished dictionary, and figures [d_sae] of its latents."""

    @abstractmethod
    def close(self) -> None:
        """Hand over what is not written yet."""


def names() -> list[str]:
    """The loggers there are."""
    there = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return sorted(name for name in there if name not in ITS_OWN)


def expect(asked: Iterable[str]) -> list[str]:
    """The loggers asked for. Raises SaeError for one that does not exist, or whose package is not installed."""
    found = []
    for name in asked:
        if name not in names():
            raise SaeError(f"log = {name}: unknown logger; there are {', '.join(names())}")
        needs = _class(name).needs
        with needing(f"log = {name}", extra=name):
            if importlib.util.find_spec(needs) is None:  # importing it takes seconds, which the training pays later
                raise ModuleNotFoundError(name=needs)
        found.append(name)
    return found


def ask(run: Run, asked: Iterable[str]) -> None:
    """Have a run logged to these, too, from now on."""
    known = _known(run)
    added: dict[str, dict[str, Any]] = {name: {} for name in expect(asked) if name not in known}
    if added:
        run.write_json(LOGGERS, known | added)


class RunLoggers:
    """The loggers that a run folder asks for; whichever of several fails, the others are closed."""

    def __init__(self, run: Run, step: int) -> None:
        self._run, self._known = run, _known(run)
        expect(self._known)
        self._open: dict[str, Logger] = {}
        try:
            for name, known in self._known.items():
                self._open[name] = _class(name)(run, step, dict(known))
        except BaseException:
            self.close()
            raise
        self._remember()

    def figures(self, entry: Mapping[str, float | None]) -> None:
        """A line of metrics.jsonl, in every place."""
        step = entry["step"]
        assert isinstance(step, int)
        for one in self._open.values():
            one.figures(step, {name: value for name, value in entry.items() if name != "step"})
        self._remember()

    def checkpoint(self, step: int, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """A checkpoint, in every place."""
        for one in self._open.values():
            one.checkpoint(step, path, tensors)

    def finished(self, files: Iterable[Path], latents: Mapping[str, Tensor]) -> None:
        """The end of a training, in every place."""
        for one in self._open.values():
            one.finished([*files], latents)

    def close(self) -> None:
        """Close all."""
        with ExitStack() as stack:
            for one in self._open.values():
                stack.callback(one.close)
            self._open = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def _remember(self) -> None:
        """Write down what the loggers need to go on, where it is new."""
        now = {name: dict(one.known) for name, one in self._open.items()}
        if now != self._known:
            self._known = now
            self._run.write_json(LOGGERS, now)


def _known(run: Run) -> dict[str, dict[str, Any]]:
    """What loggers.json holds. Raises DamagedStore where it is not what was written."""
    if not (run.path / LOGGERS).exists():
        return {}
    found = run.read_json(LOGGERS)
    with as_written(run.path / LOGGERS):
        for name, known in found.items():
            if not isinstance(known, dict):
                raise ValueError(f"{name} is no mapping")
            if "step" in known:
                whole(known, "step")
    return found


def _class(name: str) -> type[Logger]:
    logger: type[Logger] = import_module(f"{__package__}.{name}").Writer
    return logger
