"""The treated steps of a part of a recording, as rows ask for them."""

import numpy as np

from sae.pipeline.harvest.recordings.files import Recording
from sae.pipeline.harvest.recordings.survey import Part
from sae.pipeline.harvest.recordings.treatment import Treatment


class Reader:
    """Treated steps of one part, counted from its first. They are made in order; to go back is to begin again."""

    def __init__(self, part: Part, recording: Recording, treatment: Treatment) -> None:
        self.part, self._recording, self._treatment = part, recording, treatment
        self._begin()

    def _begin(self) -> None:
        raw = self._recording.blocks(self.part.start, self.part.stop)
        self._blocks, self._first = self._treatment(raw), 0
        self._kept = np.empty((0, len(self._recording.channels)), np.float32)

    def steps(self, start: int, stop: int) -> np.ndarray:
        """Steps [start, stop), float32 [stop - start, c]."""
        if start < self._first:
            self._begin()
        parts, end = [self._kept], self._first + len(self._kept)
        while end < stop:
            block = next(self._blocks)
            end += len(block)
            if end <= start:  # passed over
                parts, self._first = [], end
            else:
                parts.append(block)
        found = np.concatenate(parts)[start - self._first :]
        self._first, self._kept = start, found
        return found[: stop - start]
