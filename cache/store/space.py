"""The room that a store will take on the disk, and whether it is there, before anything is written.

Counted are whole blocks, as `du` counts: each chunk is a file, in a folder of its own where rows are no single numbers.
Chunks without a compressor are padded to their whole size, so a store of a few rows takes as much as one of a
chunk; compressed ones take what their rows take.
"""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae.cache.disk.identity import Recipe
from sae.cache.disk.paths import is_remote
from sae.cache.errors import SaeError
from sae.cache.store.arrays import ArraySpec
from sae.cache.store.codecs import Codec, codec_from_recipe

BLOCK = 4096
HEAD_FILES = 5  # recipe, manifest, group, request, hints; besides, a folder
PER_ROW = {"position": 2.1, "row_norm": 1.2, "row_scale": 0.03}  # bytes after zstd, measured
PLAIN = {2: 0.82, 4: 0.93}  # so much zstd leaves of floats of so many bytes, measured


def on_disk(specs: Sequence[ArraySpec], recipe: Recipe, rows: int, folder: int = BLOCK) -> int:
    """Bytes that `du` will show of an activation store with so many rows; `folder` is what a folder takes."""
    total = (HEAD_FILES * BLOCK + folder) if rows else 0
    for spec in specs if rows else ():
        chunks = -(-rows // spec.chunk_rows) if spec.grows else 1
        if spec.grows and spec.zstd is not None:
            size = rows / chunks * _compressed(spec, codec_from_recipe(recipe["codec"]))
        else:
            size = spec.chunk_bytes
        folders = 2 + (chunks if spec.row_shape else 0)  # the array's, the one of its chunks, one a chunk
        total += chunks * _blocks(size) + BLOCK + folders * folder
    return total


def plain_on_disk(rows: int, d: int, itemsize: int) -> float:
    """Bytes of so many rows of floats under zstd, with their positions: an export."""
    return rows * (d * PLAIN[itemsize] * itemsize + PER_ROW["position"])


def expect_room(place: Path, needed: float, what: str) -> None:
    """Raise SaeError where the file system that `place` is or will be on has less free than is needed.

    Nobody knows that of remote places.
    """
    if is_remote(place):
        return
    free = shutil.disk_usage(_existing(place)).free
    if needed > free:
        raise SaeError(
            f"{place}: {what} takes about {_gigabytes(needed)}, and {_gigabytes(free)} are free there; free some, ask "
            "for less, or choose another disk"
        )


def folder_size(place: Path) -> int:
    """Return the bytes of an empty folder where `place` is or will be: a block, or on some file systems nothing."""
    if is_remote(place):
        return 0
    return min(os.stat(_existing(place)).st_blocks * 512, BLOCK)


def _existing(place: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    there = place.absolute()
    while not there.exists():
        there = there.parent
    return there


def _compressed(spec: ArraySpec, codec: Codec) -> float:
    """Bytes of a row of a compressed array."""
    if spec.name in PER_ROW:
        return PER_ROW[spec.name]
    values = spec.chunk_bytes / spec.chunk_rows
    step = getattr(codec, "step", None)
    if step is None:
        return PLAIN[np.dtype(spec.dtype).itemsize] * values
    if not step:
        return values
    # of normal values in steps of a standard deviation: the entropy, in bits of eight
    return values * min(1.0, max(0.05, math.log2(math.sqrt(2 * math.pi * math.e) / step) / 8 + 0.01))


def _blocks(size: float) -> int:
    return -(-math.ceil(size) // BLOCK) * BLOCK


def _gigabytes(n: float) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e8 else f"{n / 1e6:,.1f} MB"
