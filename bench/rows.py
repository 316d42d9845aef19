"""What every benchmark prints: rows of figures, each with its ratio to a reference measured in the same run."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """`ratio` is the median of ratios taken pair by pair, so it stands when the machine's speed drifts."""

    what: str
    value: float
    unit: str
    ratio: float
    reference: str


def show(title: str, rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows: one JSON object, or a table to read."""
    if as_json:
        print(json.dumps({"rows": [row._asdict() for row in rows]}))
        return
    print(f"{title} ({platform.machine()}, {os.cpu_count()} cores)")
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"  {row.what:{width}s}  {row.value:14,.1f} {row.unit:9s} {row.ratio:6.2f} x {row.reference}")


AHEAD = 10
"""Calls given to a device before it is waited for, as training does."""


def timed(function: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    """Seconds of one call; on a device that runs ahead, of one of several in a row."""
    if device == "cpu":
        begun = clock()
        function()
        return clock() - begun
    import torch

    torch.cuda.synchronize(device)
    begun = clock()
    for _ in range(AHEAD):
        function()
    torch.cuda.synchronize(device)
    return (clock() - begun) / AHEAD
