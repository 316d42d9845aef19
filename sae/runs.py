"""Runs as a session gives them: folders that load what they trained, and show its course as a table."""

from __future__ import annotations

from sae.cache.runs import Run
from sae.dictionaries import Device, load
from sae.pipeline.decompose import folder
from sae.pipeline.decompose.losses import Decomposition
from sae.pipeline.saes.dictionary import Dictionary
from sae.tables import Figures, Table


class TrainedRun(Run):
    """A run folder, with the dictionary that it trained."""

    def load(self, *, device: Device = "cpu") -> Dictionary:
        """The dictionary, ready to encode. Raises NotFound where training has not finished."""
        return load(self, device=device)

    def history(self) -> Table:
        """A row a logged step."""
        return Table(self.metrics())

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.path)!r})"


class DecomposedRun(Run):
    """The run folder of a decomposition of weights."""

    def load(self) -> Decomposition:
        """The components, by the names of their matrices (`parts`). Raises NotFound where training has not finished."""
        return folder.load(self)

    def figures(self) -> Figures:
        """What `sae decompose` shows."""
        return Figures(folder.figures(self) or {})

    def history(self) -> Table:
        """A row a logged step."""
        return Table(self.metrics())
