"""What a backend is: whoever explains latents, and answers by an explanation alone.

A backend is a file of the folder `backends`, whose class `Backend` is made of settings. It is found by being there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from sae.cache.errors import SaeError
from sae.pipeline.explain.backends import __path__ as folder

if TYPE_CHECKING:
    from sae.pipeline.explain.answers import Estimate
    from sae.pipeline.explain.config import ExplainConfig
    from sae.pipeline.explain.corpus import Window
    from sae.pipeline.explain.questions import Question
    from sae.pipeline.runtime.progress import Progress


@dataclass(frozen=True)
class Explanation:
    """What a latent fires on, in words. table: the same by tokens, of a backend that explains so."""

    text: str
    table: Mapping[int, float] = field(default_factory=dict)


class Unusable(Exception):
    """An answer that is none: empty, cut short, or not of the form that was asked for. It is counted and shown."""


@dataclass(frozen=True)
class Job:
    """One latent's part of the work: what it is explained from, its questions, and the latent that is its control.

    control: None where no other latent is explained.
    """

    latent: int
    examples: Sequence[Window]
    questions: Sequence[Question]
    control: int | None


@dataclass(frozen=True)
class Surroundings:
    """What a backend may need: a folder for answers, the device, whether the network is left alone, who is told."""

    answers: Path
    device: str
    offline: bool
    progress: Progress


class AnyBackend(ABC):
    """Whoever explains and answers. concurrency: how many calls of it may be under way at a time."""

    concurrency = 1

    @abstractmethod
    def explain(self, examples: Sequence[Window]) -> Explanation:
        """Say what a latent fires on. Raises Unusable where nothing usable is said."""

    @abstractmethod
    def answer(self, explanation: Explanation, question: Question) -> list[int]:
        """Answer by an explanation: as many numbers as the question has answers. Raises Unusable likewise."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What explanations are made by, for the file that keeps them."""

    def estimate(self, jobs: Sequence[Job]) -> Estimate | None:
        """What is still to be asked for some jobs; None where nothing is asked of anybody."""
        return None

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of what it holds, and of what is under way."""


def names() -> list[str]:
    """The backends there are."""
    return sorted(module.name for module in iter_modules(folder))


def opened(config: ExplainConfig, around: Surroundings) -> AnyBackend:
    """The backend that settings name. Raises SaeError where there is none, or it cannot work."""
    if config.backend not in names():
        raise SaeError(f"backend = {config.backend}: no such backend; there are {', '.join(names())}")
    made: AnyBackend = import_module(f"sae.pipeline.explain.backends.{config.backend}").Backend(config, around)
    return made
