"""The activation store: rows of one site of one model over one token store, or of another source, permuted inside
each window.

    rows       [N, d]   the codec's dtype
    row_scale  [N]      float16, int8 only
    row_norm   [N]      float32, to three digits: the norm of a row before it was encoded
    position   [N]      int64, context * T + position: the token of the token store a row came from; or its sample
    col_mean   [d]      float32, calibrated on the first window
    col_scale  [d]      float32
    truth      [G, d]   float32, where the recipe has `truth`: the features the rows were made of

and of a trained toy model of superposition (where the recipe has `toy`), which made them of coefficients:

    coefficient [N, G]  float32: how much of each feature is in a row
    weight     [G, d]   float32: what a feature adds to a row, for a coefficient of 1
    bias       [G]      float32: of the toy's decoder

Rows come in an order that depends on the token store (or the source), the row rule and the window alone, so the rows of
every site of a model are aligned, whether they were harvested together or apart.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae.cache.disk.identity import Recipe, canonical
from sae.cache.disk.parsing import inner, is_plain_name, shown, text, whole
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.provenance import expect_rows
from sae.cache.store import scratch
from sae.cache.store.arrays import ArraySpec
from sae.cache.store.codecs import Codec, Columns, Encoded, codec_from_recipe, from_numpy
from sae.cache.store.manifest import Window, Windows
from sae.cache.store.store import Store
from sae.cache.store.writer import Writer
from sae.cache.tokens import TokenStore, expect_split
from sae.cache.window_buffer import WindowBuffer

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ROWS = 16_384
INFINITE_HALF = 0x7C00  # the bits of the float16 after all finite positive ones
CHUNK_BYTES = 24 << 20  # buffers of 32 MiB and more are mapped and unmapped at every use, three times slower
WINDOWS = Windows(first=16_384, largest=524_288)
MOST_WIDTH = 1 << 22
MOST_TRUTH = 1 << 32  # values of all true features together
MOST_TOY = 1 << 12  # features of a toy model, whose coefficients are dense
WINDOW_COEFFICIENTS = 1 << 26  # of a window that is in memory while it is made


def rows_per_chunk(d: int, itemsize: int) -> int:
    """The largest power of two up to CHUNK_ROWS whose decoded chunk stays within CHUNK_BYTES."""
    rows = CHUNK_ROWS
    while rows > 1 and rows * d * itemsize > CHUNK_BYTES:
        rows //= 2
    return rows


class ActivationStore(Store):
    """Rows of activations. `rows` decodes them to float32; the loader reads `encoded_chunk`."""

    kind: ClassVar[str] = "activations"

    @classmethod
    def expect(cls, recipe: Recipe) -> None:
        d = whole(recipe, "d", 1, MOST_WIDTH)
        codec_from_recipe(inner(recipe, "codec"))
        if "truth" in recipe:
            whole(recipe, "truth", 0, MOST_TRUTH // d)
        if "toy" in recipe:
            whole(recipe, "truth", 1, MOST_TOY)
            if recipe["toy"] is not True:
                raise ValueError(f"toy is {shown(recipe['toy'])}, not true")
        if "tokens" not in recipe:
            inner(recipe, "source")
            expect_split(recipe)
            return
        TokenStore.expect(inner(recipe, "tokens"))
        if "split" in recipe or "source" in recipe:
            raise ValueError("it has both tokens and a source or a split of its own")
        text(inner(recipe, "model"), "model")
        whole(recipe, "layer", 0, 1 << 20)
        if not is_plain_name(text(recipe, "site")):
            raise ValueError(f"site is {shown(recipe['site'])}, which is not a name")
        text(recipe, "hook")
        expect_rows(inner(recipe, "rows"))

    @classmethod
    def specs(cls, recipe: Recipe) -> list[ArraySpec]:
        codec, d = codec_from_recipe(recipe["codec"]), int(recipe["d"])
        truth, toy = int(recipe.get("truth", 0)), "toy" in recipe
        chunk = rows_per_chunk(max(d * np.dtype(codec.numpy_dtype).itemsize, 4 * truth * toy), 1)
        attributes = {"logical_dtype": codec.logical_dtype} if codec.logical_dtype else {}
        nan = float("nan")
        specs = [
            ArraySpec(
                "rows", codec.numpy_dtype, (d,), chunk, ("row", "dim"), codec.fill, codec.zstd, attributes=attributes
            ),
            ArraySpec("position", "<i8", (), chunk, ("row",), -1),
            ArraySpec("row_norm", "<f4", (), chunk, ("row",), nan),
            ArraySpec("col_mean", "<f4", (), d, ("dim",), nan, None, grows=False),
            ArraySpec("col_scale", "<f4", (), d, ("dim",), nan, None, grows=False),
        ]
        if codec.has_row_scale:
            specs.append(ArraySpec("row_scale", "<f2", (), chunk, ("row",), nan))
        if truth:
            specs.append(ArraySpec("truth", "<f4", (d,), truth, ("feature", "dim"), nan, None, grows=False))
        if toy:
            specs += [
                ArraySpec("coefficient", "<f4", (truth,), chunk, ("row", "feature"), nan),
                ArraySpec("weight", "<f4", (d,), truth, ("feature", "dim"), nan, None, grows=False),
                ArraySpec("bias", "<f4", (), truth, ("feature",), nan, None, grows=False),
            ]
        return specs

    @classmethod
    def layout(cls, recipe: Recipe) -> Windows:
        largest = WINDOWS.largest
        while "toy" in recipe and largest > WINDOWS.first and largest * recipe["truth"] > WINDOW_COEFFICIENTS:
            largest //= 2
        return Windows(WINDOWS.first, largest)

    @property
    def d(self) -> int:
        """Width of a row."""
        return int(self.recipe["d"])

    @property
    def split(self) -> str:
        return str(origin(self.recipe)["split"])

    @property
    def chunk_rows(self) -> int:
        return self.arrays["rows"].chunk_rows

    @property
    def n_chunks(self) -> int:
        return -(-self.n_rows // self.chunk_rows)

    @cached_property
    def codec(self) -> Codec:
        return codec_from_recipe(self.recipe["codec"])

    @cached_property
    def columns(self) -> Columns:
        """Calibration of the columns. Raises SaeError on a store without rows."""
        if not self.n_rows:
            raise SaeError(f"{self.path}: holds no rows yet; run `harvest()` again to continue it")
        mean, scale = self.chunk("col_mean", 0), self.chunk("col_scale", 0)
        self._expect("col_mean", np.isfinite(mean))
        self._expect("col_scale", np.isfinite(scale) & (scale > 0))
        return Columns(from_numpy(mean.copy()), from_numpy(scale.copy()))

    @property
    def truth(self) -> Tensor | None:
        """The features the rows were made of, float32 [G, d]; None where they are not known."""
        return self._constant("truth")

    @property
    def toy(self) -> tuple[Tensor, Tensor] | None:
        """Weight [G, d] and bias [G] of the toy model that made the rows; None where none did."""
        weight, bias = self._constant("weight"), self._constant("bias")
        return None if weight is None or bias is None else (weight, bias)

    def _constant(self, name: str) -> Tensor | None:
        if name not in self.arrays or not self.n_rows:
            return None
        values = self.chunk(name, 0)
        self._expect(name, np.isfinite(values))
        return from_numpy(values.copy())

    def order(self, window: int, rows: int) -> np.ndarray:
        """The `permutation` of a window's rows."""
        return permutation(origin(self.recipe), window, rows)

    def describe(self) -> dict[str, Any]:
        size = self.manifest.stored_bytes / max(1, self.n_rows)
        share = round(size / (4 * self.d), 4)
        return {**super().describe(), "bytes_per_row": round(size, 1), "share_of_float32": share}

    def encoded_chunk(self, index: int) -> Encoded:
        """The stored numbers of chunk `index`, verified, not yet decoded."""
        scale = self.row_scale(index)
        return Encoded(from_numpy(self.chunk("rows", index)), None if scale is None else from_numpy(scale))

    def row_scale(self, index: int) -> np.ndarray | None:
        """Scales of the rows of chunk `index`, for the codec that has them."""
        return self._scales(self.chunk("row_scale", index)) if self.codec.has_row_scale else None

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, d], in stored order. DamagedStore for a value that is no number."""
        return self.decoded(self.encoded(start, stop))

    def encoded(self, start: int, stop: int) -> Encoded:
        """The stored numbers of rows [start, stop), verified, not yet decoded."""
        scale = self._scales(self.read("row_scale", start, stop)) if self.codec.has_row_scale else None
        return Encoded(from_numpy(self.read("rows", start, stop)), None if scale is None else from_numpy(scale))

    def decoded(self, encoded: Encoded) -> Tensor:
        """float32 rows of stored numbers. DamagedStore for a value that is no number: none was written."""
        rows = self.codec.decode(encoded, self.columns)
        self._expect("rows", rows.isfinite())
        return rows

    def norms(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start]: norms of the rows before they were encoded, to three digits."""
        norms = self.read("row_norm", start, stop)
        self._expect("row_norm", np.isfinite(norms) & (norms >= 0))
        return norms

    def positions(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: context * context_length + position in the token store."""
        positions = self.read("position", start, stop)
        self._expect("position", positions >= 0)
        return positions

    def coefficients(self, start: int, stop: int) -> Tensor | None:
        """float32 [stop - start, G]: how much of each feature is in a row; None where that is not stored."""
        if "coefficient" not in self.arrays:
            return None
        values = self.read("coefficient", start, stop)
        self._expect("coefficient", np.isfinite(values))
        return from_numpy(values)

    def _scales(self, scales: np.ndarray) -> np.ndarray:
        bits = scales.view(np.uint16)  # in the order of the numbers, and compared sixty times as fast
        self._expect("row_scale", (bits > 0) & (bits < INFINITE_HALF))
        return scales

    def _expect(self, array: str, good: np.ndarray | Tensor) -> None:
        """Raise DamagedStore unless all values of an array are such as are written."""
        if not good.all():
            raise DamagedStore(
                f"{self.path / array}: holds a value that no writer of ours writes; remove the store and make it again"
            )


class ActivationWriter(Writer):
    """Appends windows of rows, encoding and permuting them as they come."""

    store_class: ClassVar[type[Store]] = ActivationStore
    store: ActivationStore

    def window(self, rows: int) -> WindowBuffer:
        """A buffer for the next window, of which `rows` rows exist (fewer than its size only at the source's end)."""
        columns = self.store.columns if self.store.n_rows else None
        return WindowBuffer(self.store, len(self.store.manifest.windows), rows, columns)

    def commit(self, window: Window) -> Window:
        """As for every store; what was kept of the window on the way there is needed no more."""
        window = super().commit(window)
        scratch.remove(self.path, window.index)
        return window


def origin(recipe: Recipe) -> Recipe:
    """The part of a recipe that fixes the order of rows: the token recipe, or the source and the split."""
    return recipe["tokens"] if "tokens" in recipe else {name: recipe[name] for name in ("source", "split")}


def permutation(source: Recipe, window: int, rows: int) -> np.ndarray:
    """Order of the rows inside a window: the same for every site harvested from one token store (`origin`).

    The row at stored place i came at place permutation[i] from the source. Not to be changed: others are given it, too.
    """
    return _permutation(canonical(source), window, rows)


@lru_cache(maxsize=1)  # all sites of a model ask for the same
def _permutation(source: str, window: int, rows: int) -> np.ndarray:
    seed = hashlib.sha256(f"{source}#{window}".encode()).digest()
    # NumPy promises the bits of PCG64 for ever, but not what Generator.permutation makes of them
    bits = np.random.PCG64(int.from_bytes(seed[:16], "little")).random_raw(rows)
    order = np.argsort(bits)  # in a quarter of the time of a stable sort, which differs only where two are equal
    ranked = bits[order]
    return np.argsort(bits, kind="stable") if (ranked[1:] == ranked[:-1]).any() else order
