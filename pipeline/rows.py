"""Which tokens become rows: decided by tokens and positions only, never by values, so that all sites align."""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field


class RowRule(BaseModel):
    """Which tokens become rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    skip_first: int = Field(
        1, ge=0, description="positions left out at the start of every context (position 0 holds massive activations)"
    )
    skip_begin: bool = Field(True, description="leave out the begin-of-document token wherever it stands")

    def mask(self, tokens: np.ndarray, lengths: np.ndarray, begin: int) -> np.ndarray:
        """bool [n, T] from tokens [n, T] and the number of real tokens of each context [n]."""
        place = np.arange(tokens.shape[1])
        kept = (place >= self.skip_first) & (place < lengths[:, None])
        return kept & (tokens != begin) if self.skip_begin else kept
