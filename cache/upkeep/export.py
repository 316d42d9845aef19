"""A store's rows as a plain Zarr v3 array of floats, for tools that know nothing of codecs, columns and permutations.

    DEST/zarr.json       the group; its attributes say where the rows come from (store, order, rows, recipe)
    DEST/rows            [N, d]   float32, float16, or bfloat16 as the uint16 of its bits (attribute `logical_dtype`)
    DEST/position        [N]      int64, context * T + position: the token each row came from
    DEST/tokens          [n, T]   on request: the contexts those positions count in, from the first on

Written by zarr-python, a chunk at a time, into a folder beside DEST that is renamed when all is there and flushed: a
DEST that exists is whole. In token order a window is undone at once, so memory holds one window in its stored form
(384 MiB for 524,288 int8 rows of width 768); in stored order it holds one chunk.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import ZstdCodec

from sae.cache.activations import ActivationStore
from sae.cache.disk import removal
from sae.cache.disk.durable import explained, make_folder
from sae.cache.disk.processes import temporary
from sae.cache.errors import SaeError
from sae.cache.store.codecs import Encoded, to_numpy
from sae.cache.store.space import expect_room, plain_on_disk
from sae.cache.tokens import TokenStore
from sae.cache.upkeep import loose

Advance = Callable[[int], None]
ORDERS = ("stored", "token")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONTEXTS = 4096  # contexts of tokens copied at a time


class Part(NamedTuple):
    """Consecutive rows of an export: float32 [n, d] and their positions [n]."""

    rows: Tensor
    positions: np.ndarray


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    rows: int
    bytes: int


def export(
    store: ActivationStore, destination: Path, advance: Advance, *, dtype: str = "float32", rows: int | None = None,
    order: str = "stored", tokens: TokenStore | None = None,
) -> Exported:  # fmt: skip
    """Write the first `rows` rows (all of them, where None) of a store to `destination`, which must not exist.

    `advance` is called with the rows written since its last call. `tokens` is the token store to copy contexts from.
    Raises SaeError where the destination is there, cannot be written, or float16 cannot hold a value.
    """
    if dtype not in DTYPES:
        raise SaeError(f"dtype = {dtype}: rows are exported as {', '.join(DTYPES)}")
    if order not in ORDERS:
        raise SaeError(f"order = {order}: rows come in stored or in token order")
    if destination.exists() or destination.is_symlink():
        raise SaeError(f"{destination}: exists; remove it or name another")
    if not store.n_rows:
        raise SaeError(f"{store.path}: holds no rows yet; run `harvest()` again to continue it")
    if rows is not None and rows < 1:
        raise SaeError(f"rows = {rows}: an export has at least one")
    n = store.n_rows if rows is None else min(rows, store.n_rows)
    expect_room(destination.parent, plain_on_disk(n, store.d, DTYPES[dtype].itemsize), "the export")
    partial = Path(os.path.abspath(destination.with_name(temporary(destination.name))))
    try:
        make_folder(destination.parent)
        with loose.noted(store.path.parent.parent, partial):
            partial.mkdir()
            try:
                _write(store, partial, n, dtype, order, tokens, advance)
                size = _flushed(partial)
                os.rename(partial, destination)
            finally:
                removal.delete(partial, loose.is_of_an_export)  # gone already where all went well
    except OSError as error:
        raise explained(error, destination) from error
    return Exported(destination, n, size)


def _write(
    store: ActivationStore, folder: Path, n: int, dtype: str, order: str, tokens: TokenStore | None, advance: Advance
) -> None:
    about = {"kind": "exported activations", "store": store.key, "order": order, "rows": n, "dtype": dtype}
    group = zarr.create_group(folder, zarr_format=3, attributes={**about, "recipe": store.recipe})
    width, size = store.d, min(store.chunk_rows, n)
    attributes = {"logical_dtype": dtype} if dtype == "bfloat16" else {}
    into = {
        "rows": _array(group, "rows", (n, width), size, _stored_dtype(dtype), ("row", "dim"), attributes),
        "position": _array(group, "position", (n,), size, "int64", ("row",), {}),
    }
    last, done = 0, 0
    for part in _whole_chunks(_in_order(store, n, order), size):
        stop = done + len(part.positions)
        into["rows"][done:stop] = _as(part.rows, dtype)
        into["position"][done:stop] = part.positions
        if tokens is not None:
            tokens.expect_positions(part.positions, store)
        last, done = max(last, int(part.positions.max())), stop
        advance(len(part.positions))
    assert done == n, (done, n)
    if tokens is not None:
        _copy_tokens(group, tokens, last // tokens.context_length + 1)


def _array(
    group: zarr.Group, name: str, shape: tuple[int, ...], chunk: int, dtype: str, dimensions: tuple[str, ...],
    attributes: dict[str, Any],
) -> Any:  # fmt: skip
    return group.create_array(
        name, shape=shape, chunks=(chunk, *shape[1:]), dtype=dtype, dimension_names=dimensions, attributes=attributes,
        compressors=ZstdCodec(level=1, checksum=True),
    )  # fmt: skip


def _in_order(store: ActivationStore, n: int, order: str) -> Iterator[Part]:
    """The first n rows of an order."""
    if order == "stored":
        for start in range(0, n, store.chunk_rows):
            stop = min(start + store.chunk_rows, n)
            yield Part(store.rows(start, stop), store.positions(start, stop))
        return
    for window in store.manifest.windows:
        if window.start < n:
            yield from _token_order(store, window.start, window.stop, min(window.stop, n) - window.start)


def _token_order(store: ActivationStore, start: int, stop: int, n: int) -> Iterator[Part]:
    """The first n rows of the window [start, stop) as they came: positions only grow in token order."""
    positions = store.positions(start, stop)
    place = np.argsort(positions)
    rows, scale = store.encoded(start, stop)
    for at in range(0, n, store.chunk_rows):
        part = place[at : min(at + store.chunk_rows, n)]
        encoded = Encoded(rows[part], None if scale is None else scale[part])
        yield Part(store.decoded(encoded), positions[part])


def _whole_chunks(parts: Iterator[Part], size: int) -> Iterator[Part]:
    """The same rows in parts of exactly `size`, but for the last: a chunk is written once."""
    rows: list[Tensor] = []
    positions: list[np.ndarray] = []
    held = 0
    for part in parts:
        rows.append(part.rows)
        positions.append(part.positions)
        held += len(part.positions)
        while held >= size:
            every, places = torch.cat(rows), np.concatenate(positions)
            yield Part(every[:size], places[:size])
            rows, positions, held = [every[size:]], [places[size:]], held - size
    if held:
        yield Part(torch.cat(rows), np.concatenate(positions))


def _stored_dtype(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _as(rows: Tensor, dtype: str) -> np.ndarray:
    stored = rows.to(DTYPES[dtype])
    if not torch.isfinite(stored).all():
        raise SaeError(f"dtype = {dtype}: a value of {rows.abs().max():.4g} is beyond it; take float32 or bfloat16")
    return to_numpy(stored)


def _copy_tokens(group: zarr.Group, tokens: TokenStore, contexts: int) -> None:
    """The first `contexts` contexts, which are all that the exported positions count in."""
    spec = tokens.arrays["tokens"]
    shape, chunk = (contexts, tokens.context_length), min(spec.chunk_rows, contexts)
    array = _array(group, "tokens", shape, chunk, np.dtype(spec.dtype).name, spec.dimension_names, {})
    step = max(1, CONTEXTS // chunk) * chunk
    for start in range(0, contexts, step):
        stop = min(start + step, contexts)
        array[start:stop] = tokens.contexts(start, stop)


def _flushed(folder: Path) -> int:
    """Make every file below a folder survive a power cut; returns their bytes."""
    size = 0
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_size
    return size
