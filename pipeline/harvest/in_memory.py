"""Rows in memory -> activation stores, so that whatever reads a store reads them, too.

A store is named by what its rows are: its recipe has a digest of their values, so the same rows again are the same
store, and nothing is written. Which rows are held out depends on their number and the seed alone. Inputs and targets
given together align, as two sites of a model do.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk.identity import Recipe
from sae.cache.errors import SaeError
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.tokens import SPLITS

SOURCE = "memory"


def store_rows(
    root: Path, x: Any, y: Any = None, *, name: str = "rows", validation: float = 0.05, seed: int = 0,
    codec_text: str = "float32",
) -> dict[str, list[ActivationStore]]:  # fmt: skip
    """The stores of rows x [n, d_in] (and of their targets y [n, d_out]): by split, inputs first.

    `validation` is the share of the rows that is held out. Raises SaeError for what cannot be stored.
    """
    if not 0 <= validation < 1:
        raise SaeError(f"validation = {validation}: is no share of the rows; give a number from 0 to below 1")
    streams = [_rows(x, "x"), *([] if y is None else [_rows(y, "y")])]
    if len({len(rows) for rows in streams}) > 1:
        raise SaeError(
            f"y: has {len(streams[1]):,} rows, x has {len(streams[0]):,}; row i of both must belong together"
        )
    n = len(streams[0])
    held_out = np.random.PCG64(seed).random_raw(n) < np.uint64(validation * 2.0**64)
    source = {"source": SOURCE, "rows": _digest(streams), "validation": validation, "seed": seed}
    found: dict[str, list[ActivationStore]] = {}
    for split in SPLITS:
        chosen = np.flatnonzero(held_out == (split != SPLITS[0]))
        if not len(chosen) and split == SPLITS[0]:
            raise SaeError(f"validation = {validation}: leaves no row of {n:,} to train on; lower it")
        for stream, rows in zip("xy", streams, strict=False):
            if not len(chosen):
                continue
            recipe: Recipe = {
                "source": source, "split": split, **({} if len(streams) == 1 else {"stream": stream}),
                "d": rows.shape[1], "codec": codec_recipe(codec(codec_text)),
            }  # fmt: skip
            parts = [name, *([stream] if len(streams) > 1 else []), *([split] if split != SPLITS[0] else [])]
            slug = "-".join([*parts, codec(codec_text).name])
            found.setdefault(split, []).append(_written(root, slug, recipe, rows, chosen))
    return found


def _rows(values: Any, what: str) -> Tensor:
    """float32 [n, d], on the CPU."""
    rows = torch.as_tensor(values)
    if rows.dim() != 2 or not rows.numel() or rows.is_complex():
        raise SaeError(f"{what}: has the shape {list(rows.shape)} of {rows.dtype}; give numbers [rows, width]")
    rows = rows.detach().to("cpu", torch.float32).contiguous()
    if not rows.isfinite().all():
        raise SaeError(f"{what}: holds NaN or infinity (in float32); leave such rows out")
    return rows


def _digest(streams: list[Tensor]) -> str:
    """SHA-256 of shapes and values."""
    whole = hashlib.sha256()
    for rows in streams:
        whole.update(f"{list(rows.shape)}\n".encode())
        whole.update(rows.numpy().data)
    return whole.hexdigest()


def _written(root: Path, slug: str, recipe: Recipe, rows: Tensor, chosen: np.ndarray) -> ActivationStore:
    """The store of some of the rows, the windows it lacks being written."""
    with ActivationWriter(root, slug, recipe) as writer:
        writer.request(max(len(chosen), writer.store.requested))
        while (store := writer.store).n_rows < len(chosen):
            start, stop = store.windows.bounds(len(store.manifest.windows))
            part = chosen[start : min(stop, len(chosen))]
            buffer = writer.window(len(part))
            buffer.add(rows[torch.from_numpy(part)], part)
            writer.append(buffer.arrays(), {})
        if not store.closed:
            writer.close()
        return writer.store
