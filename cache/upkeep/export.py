"""A store's rows as plain files of floats, for tools that know nothing of codecs, columns and permutations.

The formats are those of `sae.cache.exports`. Files are written a part at a time into a folder beside the destination
that is renamed when all is there and flushed: a destination that exists is whole. In token order a window is undone at
once, so memory holds one window in its stored form (384 MiB for 524,288 int8 rows of width 768); in stored order it
holds one part.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk import removal
from sae.cache.disk.durable import explained, make_folder
from sae.cache.disk.processes import temporary
from sae.cache.errors import SaeError
from sae.cache.exports.base import DTYPES, Export, Part, Writer, is_made, writer_of
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.store.codecs import Encoded
from sae.cache.store.space import expect_room, plain_on_disk
from sae.cache.tokens import TokenStore
from sae.cache.upkeep import loose

Advance = Callable[[int], None]
ORDERS = ("stored", "token")


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    rows: int
    bytes: int


def export(
    store: ActivationStore, destination: Path, advance: Advance, *, dtype: str = "float32", rows: int | None = None,
    order: str = "stored", tokens: TokenStore | None = None, format: str = "zarr",
) -> Exported:  # fmt: skip
    """Write the first `rows` rows (all of them, where None) of a store to `destination`, which must not exist.

    `advance` is called with the rows written since its last call. `tokens` is the token store that their tokens are
    written from, too. `format` is one of `sae.cache.exports`.
    Raises SaeError where the destination is there, cannot be written, or float16 cannot hold a value.
    """
    writer = writer_of(format, dtype)
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
                about = {"kind": "exported activations", "store": store.key, "order": order, "rows": n, "dtype": dtype}
                about = {**about, "recipe": store.recipe}
                into = writer(Export(partial, n, store.d, dtype, store.chunk_rows, about, _hook(store)))
                n = into.export.n
                _write(store, into, order, tokens, advance)
                size = _flushed(partial)
                os.rename(partial, destination)
            finally:
                removal.delete(partial, is_made)  # gone already where all went well
    except OSError as error:
        raise explained(error, destination) from error
    return Exported(destination, n, size)


def _hook(store: ActivationStore) -> str:
    """What tools that read hook points call the rows."""
    origin = provenance(store.recipe)
    return origin.hook if isinstance(origin, LanguageModelRows) else "rows"


def _write(store: ActivationStore, into: Writer, order: str, tokens: TokenStore | None, advance: Advance) -> None:
    last, done, n = 0, 0, into.export.n
    for rows, positions, _ in _whole_parts(_in_order(store, n, order), into.size):
        if tokens is not None:
            tokens.expect_positions(positions, store)
        into.add(Part(_as(rows, into.export.dtype), positions, None if tokens is None else _tokens(tokens, positions)))
        last, done = max(last, int(positions.max())), done + len(positions)
        advance(len(positions))
    assert done == n, (done, n)
    if tokens is not None:
        into.contexts(tokens, last // tokens.context_length + 1)
    into.close()


def _tokens(tokens: TokenStore, positions: np.ndarray) -> np.ndarray:
    """The token that each row came from, int64 [n]; the contexts between the first and the last are read."""
    length = tokens.context_length
    first, last = int(positions.min()) // length, int(positions.max()) // length
    return tokens.contexts(first, last + 1).reshape(-1)[positions - first * length].astype(np.int64)


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


def _whole_parts(parts: Iterator[Part], size: int) -> Iterator[Part]:
    """The same rows in parts of exactly `size`, but for the last."""
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


def _as(rows: Tensor, dtype: str) -> Tensor:
    stored = rows.to(DTYPES[dtype])
    if not torch.isfinite(stored).all():
        raise SaeError(f"dtype = {dtype}: a value of {rows.abs().max():.4g} is beyond it; take float32 or bfloat16")
    return stored


def _flushed(folder: Path) -> int:
    """Make every file below a folder survive a power cut; returns their bytes."""
    size = 0
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            size += os.fstat(file.fileno()).st_size
    return size
