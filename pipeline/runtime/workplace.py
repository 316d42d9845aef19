"""The workplace of stages, studies and sessions."""

from dataclasses import dataclass
from pathlib import Path

from sae.pipeline.runtime.progress import Progress


@dataclass(frozen=True)
class Workplace:
    """The folders of stores and runs, the device that computes, and who is told how far it is.

    cache, runs: their folders. device: cpu, cuda, cuda:1, ..., or auto for a GPU where there is one. offline: whether
    the network is left alone.
    """

    cache: Path
    runs: Path
    progress: Progress
    device: str = "auto"
    offline: bool = False
