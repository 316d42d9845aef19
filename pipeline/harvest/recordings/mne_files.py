"""EDF, BDF and EEGLAB recordings through MNE, which is an optional extra (`pip install sae-cache[eeg]`)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sae.cache.errors import SaeError, needing
from sae.pipeline.harvest.tables.base import Choice, Table

SUFFIXES = {".edf": "edf", ".bdf": "bdf", ".set": "eeglab"}  # and what MNE calls their readers
NO_SIGNAL = ("stim", "misc", "syst")  # kinds of channels that are left out where none are named


class Measured(Table):
    """The channels of a recording, in the units of MNE (volts), which is read in pieces. `rate`: steps a second."""

    def __init__(self, path: Path, columns: Choice) -> None:
        super().__init__(path)
        if not path.is_file():
            raise SaeError(f"{self.where}: no such file")
        self._raw: Any = self._opened()
        self.rate = float(self._raw.info["sfreq"])
        kinds = dict(zip(self._raw.ch_names, self._raw.get_channel_types(), strict=True))
        signals = [name for name in kinds if columns.wanted or kinds[name] not in NO_SIGNAL]
        if not signals:
            raise SaeError(f"{self.where}: has no channel of a signal")
        self._channels = columns.among(signals, self.where)
        self.expect_rows((self._raw.n_times, len(self._channels)))

    @property
    def names(self) -> list[str]:
        return self._channels

    def blocks(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        step = self.step(8)
        for first in range(start, self.n, step):
            stop = min(first + step, self.n)
            with self._readable():
                values = self._raw.get_data(self._channels, first, stop).T
            yield first, values

    def _opened(self) -> Any:
        with needing(self.where, extra="eeg"):
            import mne
        reader = getattr(mne.io, f"read_raw_{SUFFIXES[self.path.suffix.lower()]}")
        with self._readable():
            return reader(self.path, preload=False, verbose="ERROR")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn whatever MNE raises on a damaged file into one line."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of units and annotations, which nothing here depends on
                yield
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise SaeError(f"{self.where}: cannot be read ({said})") from error
