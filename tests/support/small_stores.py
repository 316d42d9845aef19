"""Small stores of synthetic rows, for the tests of everything that writes or reads stores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from support.small_tokens import CHUNK, CONTEXT, files, token_recipe, window_arrays, write_tokens
from torch import Tensor

from sae.cache import activations, tokens
from sae.cache.activations import ActivationStore, ActivationWriter
from sae.cache.disk.identity import Recipe
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.store.manifest import Windows
from sae.cache.store.store import Store

__all__ = [
    "CHUNK", "CONTEXT", "N", "activation_recipe", "closed_store", "extend", "few", "files", "heavy_rows", "shrunk",
    "some", "token_recipe", "window_arrays", "write_activations", "write_tokens",
]  # fmt: skip

N = 5 * CHUNK + 3  # rows of four windows, the last one short

few = settings(deadline=None, max_examples=15)
some = settings(deadline=None, max_examples=40)


@contextmanager
def shrunk(*, flush: bool = False) -> Iterator[pytest.MonkeyPatch]:
    """Stores with small chunks and windows; without `flush` nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "CHUNK_ROWS", CHUNK)
        patch.setattr(activations, "WINDOWS", Windows(CHUNK, 4 * CHUNK))
        patch.setattr(tokens, "CHUNK_TOKENS", CHUNK * CONTEXT)
        patch.setattr(tokens, "WINDOW_CHUNKS", 4)
        if not flush:
            patch.setattr(os, "fsync", lambda handle: None)
        yield patch


def activation_recipe(
    d: int = 6, codec_text: str = "int8", *, site: str = "mlp_out", split: str = "train", seed: int = 0
) -> Recipe:
    return {
        "tokens": token_recipe(split, seed=seed),
        "model": {"model": "synthetic"},
        "layer": 1,
        "site": site,
        "hook": f"blocks.1.hook_{site}",
        "d": d,
        "rows": {"skip_first": 1, "skip_begin": True},
        "codec": codec_recipe(codec(codec_text)),
    }


def heavy_rows(n: int, d: int, *, seed: int = 0, massive: int = 1) -> Tensor:
    """Rows as a language model's: heavy tails, columns whose mean is 100 standard deviations, outlier columns.

    `massive` rows have one value of 3000, as the first position of a context does.
    """
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 2 * d, generator=random).pow(3) * (torch.rand(n, 2 * d, generator=random) < 0.1)
    rows = features @ torch.randn(2 * d, d, generator=random) / d**0.5 + 0.3 * torch.randn(n, d, generator=random)
    scale = torch.exp(torch.randn(d, generator=random))
    rows = rows * scale
    rows[:, : d // 3] += 100 * scale[: d // 3]
    rows[:, d // 2] *= 30
    rows[:massive, d - 1] = 3000.0
    return rows


def extend(writer: ActivationWriter, rows: Tensor, *, ended: bool = False) -> None:
    """Append the windows of `rows` (in token order, all of the store's) that the store still lacks."""
    while writer.store.n_rows < len(rows):
        start, stop = writer.store.windows.bounds(len(writer.store.manifest.windows))
        stop = min(stop, len(rows))
        buffer = writer.window(stop - start)
        step = 13 if stop < 5000 else 1000  # rows arrive in batches of any size
        for low in range(start, stop, step):
            high = min(low + step, stop)
            buffer.add(rows[low:high], np.arange(low, high))
        writer.append(buffer.arrays(), {"next": stop})
    if ended and not writer.store.closed:
        writer.close()


def write_activations(
    root: Path, rows: Tensor, codec_text: str = "int8", *, ended: bool = False, **recipe: object
) -> ActivationStore:
    """A store of `rows`, or the continuation of one."""
    full = activation_recipe(rows.shape[1], codec_text, **recipe)  # type: ignore[arg-type]
    slug = f"synthetic-1.{full['site']}" + ("-validation" if full["tokens"]["split"] == "validation" else "")
    with ActivationWriter(root, f"{slug}-{full['codec']['name']}", full) as writer:
        extend(writer, rows, ended=ended)
        return writer.store


def closed_store(kind: str, root: Path) -> Store:
    """A closed store of N rows of one kind (`activations` may name a codec: activations/float32)."""
    if kind == "tokens":
        return write_tokens(root, N, ended=True)
    return write_activations(root, heavy_rows(N, 7), kind.partition("/")[2] or "int8", ended=True)
