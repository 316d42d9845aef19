"""What stages, studies and sessions are carried out in."""

from dataclasses import dataclass
from pathlib import Path

from sae.pipeline.runtime.progress import Progress


@dataclass(frozen=True)
class Workplace:
    """Where stores and runs are kept, on what is computed, and who is told how far it is.

    cache, runs: their folders. device: cpu, cuda, cuda:1, ..., or auto for a GPU where there is one. offline: whether
    the network is left alone.
    """

    cache: Path
    runs: Path
    progress: Progress
    device: str = "auto"
    offline: bool = False
