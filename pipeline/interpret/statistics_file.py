"""The file of statistics in a run folder: which arrays it holds, of which shapes, and what it says that they are of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sae.cache.disk.parsing import as_written
from sae.cache.disk.tensors import read_header
from sae.cache.errors import DamagedStore
from sae.cache.runs import STATISTICS, Run
from sae.pipeline.interpret.directions import Lens
from sae.pipeline.interpret.examples import BINS
from sae.pipeline.interpret.survey import WINDOWS

HEADER = "of"  # the text beside the tensors that says what they are of

PLAIN = ("windows", "window_rows", "total", "max", "histogram")
"""The arrays of `Statistics` that are no part of another."""

SHAPES = {
    "windows": f"{WINDOWS} m", "window_rows": f"{WINDOWS}", "total": "m", "max": "m", "histogram": f"m {BINS}",
    "contexts.start": "s", "contexts.tokens": "n w", "contexts.activations": "n w",
    **dict.fromkeys((f"contexts.{one}" for one in ("band", "value", "position", "document", "peak", "length")), "n"),
    "frequent.token": "m f", "frequent.times": "m f", "frequent.sampled": "m",
    **dict.fromkeys((f"partners.{one}" for one in ("latent", "jaccard", "phi", "union")), "m p"),
    "vocabulary.end": "v", "vocabulary.bytes": "b",
}  # fmt: skip
OPTIONAL = {
    **dict.fromkeys(("nearest.latent", "nearest.cosine"), "m q"),
    **dict.fromkeys((f"lens.{one}" for one in Lens._fields), "m l"),
}
"""The shape of every array in the file, a letter a size."""


def expect_shapes(arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError where arrays are missing, have shapes that do not fit together, or name what is not there."""
    if missing := [name for name in SHAPES if name not in arrays]:
        raise ValueError(f"it has no {missing[0]}")
    sizes: dict[str, int] = {}
    for name, shape in (SHAPES | OPTIONAL).items():
        if name not in arrays:
            continue
        letters = shape.split()
        if len(letters) != arrays[name].ndim:
            raise ValueError(f"{name} has {arrays[name].ndim} dimensions")
        for letter, size in zip(letters, arrays[name].shape, strict=True):
            if sizes.setdefault(letter, int(letter) if letter.isdigit() else size) != size:
                raise ValueError(f"{name} has {size} where others have {sizes[letter]}")
    start, ends = arrays["contexts.start"], arrays["vocabulary.end"]
    bounds = [
        (start, 0, sizes["n"]), (ends, 0, sizes["b"]), (arrays["contexts.length"], 0, sizes["w"]),
        *((arrays[name], 0, sizes["v"] - 1) for name in ("contexts.tokens", "lens.up", "lens.down") if name in arrays),
        *((arrays[name], -1, sizes["m"] - 1) for name in ("partners.latent", "nearest.latent") if name in arrays),
    ]  # fmt: skip
    for array, low, high in bounds:
        if array.size and not low <= int(array.min()) <= int(array.max()) <= high:
            raise ValueError("it names what is not there")
    if sizes["s"] != sizes["m"] + 1 or (np.diff(start) < 0).any() or (np.diff(ends) < 0).any():
        raise ValueError("its parts do not follow one another")


def described(run: Run) -> dict[str, Any] | None:
    """What the statistics in a run folder are of, without reading them; None where there are none."""
    path = run.path / STATISTICS
    if not path.exists():
        return None
    with to_be_removed(path):
        header = read_header(path)
        of = json.loads(header.get(HEADER, "null"))
        if not isinstance(of, dict):
            raise ValueError("it does not say what it is of")
        return {key: value for key, value in of.items() if key != "sampled"}


@contextmanager
def to_be_removed(path: Path) -> Iterator[None]:
    """Say of a damaged file what is to be done."""
    try:
        with as_written(path):
            yield
    except DamagedStore as error:
        raise DamagedStore(f"{error}; remove it, and it is gathered again") from error
