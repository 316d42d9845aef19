"""Rows are made and stored window by window: what is in memory does not grow with how many there are."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, resource, sys, tempfile
from pathlib import Path
import torch
from sae.cache import activations
from sae.cache.store.manifest import Windows
from sae.configs import resolve
from sae.pipeline.harvest.sources import SOURCES, settings_of_sources
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Silent

torch.set_num_threads(1)
os.fsync = lambda handle: None
activations.CHUNK_ROWS, activations.WINDOWS = 4096, Windows(4096, 8192)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

with tempfile.TemporaryDirectory() as folder:
    worlds = {"toy": {"features": 40, "hidden": 32, "steps": 5}, "synthetic": {"d": 256, "features": 512}}
    for source, more in worlds.items():
        peaks = []
        for rows in (16_384, 81_920, 147_456):  # the first two fill the allocator's pools
            given = {"source": source, "rows": rows, "validation_rows": 1, "codec": "int8", **more}
            config = resolve("harvest", settings_of_sources(), given=given)
            made = SOURCES[source].of_settings(config, Origins(Path(folder)), Silent())
            (store,) = harvest(made, Path(folder), Silent()).stores["train"]
            assert store.n_rows == rows
            peaks.append(peak())
        d = store.d + (40 if source == "toy" else 0)
        print(source, peaks[2] - peaks[1], 4 * d * 65_536)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_rows() -> None:
    """As many rows again: the peak stays, to a small part of what these would take."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in found.splitlines()]
    assert [source for source, *_ in lines] == ["toy", "synthetic"]
    for source, grown, further in lines:
        assert int(grown) < 0.3 * int(further), (source, grown, further)
