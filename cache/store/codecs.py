"""Rows of activations <-> the numbers on disk. A codec is a frozen value with its error bound stated.

Every codec is calibrated once per store, on the first window: the mean and the standard deviation of each column,
robustly (rows whose norm is above five times the median are left out, so massive activations do not set the scale).

| codec    | bytes a value   | error of one value                                   |
|----------|-----------------|------------------------------------------------------|
| int8     | ~0.7 with zstd  | half a step: row_scale * col_scale / 2               |
| bfloat16 | 2               | 2^-8 of its distance from the column's mean          |
| float16  | 2               | 2^-11 of the value (overflows above 65,504: refused) |
| float32  | 4               | none                                                 |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from sae.cache.disk.parsing import shown, text, whole
from sae.cache.errors import SaeError

if TYPE_CHECKING:  # what lists stores and checks bytes needs no torch, and its import takes seconds
    import torch
    from torch import Tensor

CODES_MAX = 127
FP16_SMALLEST = 2.0**-14
OUTLIER_NORM = 5.0
SCALE_FLOOR = 0.1
LEVELS = range(1, 23)  # of zstd


class Columns(NamedTuple):
    """Calibration of a store: mean [d] and scale [d] (the standard deviation, floored), float32."""

    mean: Tensor
    scale: Tensor


class Encoded(NamedTuple):
    """Rows as stored: numbers [n, d] of the codec's dtype and, for int8, a float16 scale a row [n]."""

    rows: Tensor
    row_scale: Tensor | None

    def part(self, low: int, high: int) -> Encoded:
        """Rows [low, high), as views."""
        return Encoded(self.rows[low:high], None if self.row_scale is None else self.row_scale[low:high])

    def like(self, device: torch.device) -> Encoded:
        """Memory on a device for as many."""
        import torch

        return Encoded(*(None if one is None else torch.empty_like(one, device=device) for one in self))  # type: ignore[arg-type]

    def take(self, other: Encoded) -> None:
        """Copy another's numbers to the place of these; from pinned memory to a GPU without waiting for it."""
        for mine, its in zip(self, other, strict=True):
            if mine is not None and its is not None:
                mine.copy_(its, non_blocking=its.is_pinned())

    def clone(self) -> Encoded:
        """A copy with memory of its own."""
        return Encoded(self.rows.clone(), None if self.row_scale is None else self.row_scale.clone())


class Codec(Protocol):
    """The interface of every codec; the contract tests run over all of CODECS."""

    name: ClassVar[str]
    numpy_dtype: ClassVar[str]
    fill: ClassVar[int | float]
    logical_dtype: ClassVar[str | None]
    has_row_scale: ClassVar[bool]

    @property
    def zstd(self) -> int | None: ...

    def encode(self, rows: Tensor, columns: Columns) -> Encoded:
        """float32 [n, d] -> stored numbers, each row by itself, on the device they are on, without waiting for it.

        Equal rows become equal numbers on every device: each operation is one that IEEE 754 rounds, or picks.
        """

    def expect(self, encoded: Encoded) -> None:
        """Raise SaeError where numbers that `encode` made of finite rows, on the host now, cannot stand for them."""

    def decode(self, encoded: Encoded, columns: Columns) -> Tensor:
        """Stored numbers -> float32 [n, d] on the device they are on."""

    def error_bound(self, rows: Tensor, encoded: Encoded, columns: Columns) -> Tensor:
        """The largest error |decoded - rows| may have, value by value: [n, d]."""


@dataclass(frozen=True)
class Int8:
    """Column-normalised rows, quantised in steps of `step` column standard deviations, entropy-coded by zstd.

    A row with a value beyond 127 steps gets a wider step of its own, so nothing is ever clipped. The added FVU is
    about step^2 / 12: 0.05 % at 0.08. step 0 uses the full range of every row (770 bytes at width 768, 0.006 %).
    """

    name: ClassVar[str] = "int8"
    numpy_dtype: ClassVar[str] = "|i1"
    fill: ClassVar[int | float] = -128  # never produced, so a missing chunk shows
    logical_dtype: ClassVar[str | None] = None
    has_row_scale: ClassVar[bool] = True
    step: float = 0.08
    zstd: int | None = 1

    def __post_init__(self) -> None:
        if not 0 <= self.step <= 1:
            raise SaeError(f"codec = int8:step={self.step:g}: the step is a share of a standard deviation, 0 to 1")

    def encode(self, rows: Tensor, columns: Columns) -> Encoded:
        import torch

        normalised = (rows - columns.mean) / columns.scale
        widest = normalised.abs().amax(dim=1)
        # float16 rounds by less than half a step in 127, so the widest value still rounds to a code of at most 127
        # (by a tensor: what a number divides on a GPU, it multiplies by the number's reciprocal)
        scale = (widest / torch.full_like(widest, CODES_MAX)).clamp_min(max(self.step, FP16_SMALLEST)).half()
        codes = (normalised / scale.float()[:, None]).round_().clamp_(-CODES_MAX, CODES_MAX)
        return Encoded(codes.char(), scale)

    def expect(self, encoded: Encoded) -> None:
        assert encoded.row_scale is not None
        if not encoded.row_scale.isfinite().all():
            raise SaeError(
                "codec = int8: an activation is 8 million standard deviations from its column's mean; use bfloat16"
            )

    def decode(self, encoded: Encoded, columns: Columns) -> Tensor:
        assert encoded.row_scale is not None
        rows = encoded.rows.float()
        return rows.mul_(encoded.row_scale.float()[:, None]).mul_(columns.scale).add_(columns.mean)

    def error_bound(self, rows: Tensor, encoded: Encoded, columns: Columns) -> Tensor:
        assert encoded.row_scale is not None
        half_step = 0.5 * encoded.row_scale.float()[:, None] * columns.scale
        return half_step * (1 + 2.0**-10) + 2.0**-20 * (rows.abs() + columns.mean.abs())


@dataclass(frozen=True)
class BFloat16:
    """The distance from the column's mean as bfloat16; its bits are stored as uint16 (Zarr has no bfloat16)."""

    name: ClassVar[str] = "bfloat16"
    numpy_dtype: ClassVar[str] = "<u2"
    fill: ClassVar[int | float] = 0xFFFF  # a NaN
    logical_dtype: ClassVar[str | None] = "bfloat16"
    has_row_scale: ClassVar[bool] = False
    zstd: int | None = None

    def encode(self, rows: Tensor, columns: Columns) -> Encoded:
        return Encoded((rows - columns.mean).bfloat16(), None)

    def expect(self, encoded: Encoded) -> None:
        pass

    def decode(self, encoded: Encoded, columns: Columns) -> Tensor:
        return encoded.rows.float().add_(columns.mean)

    def error_bound(self, rows: Tensor, encoded: Encoded, columns: Columns) -> Tensor:
        return (rows - columns.mean).abs() * 2.0**-8 + 2.0**-22 * (rows.abs() + columns.mean.abs()) + 2.0**-133


@dataclass(frozen=True)
class Float16:
    """Plain half precision."""

    name: ClassVar[str] = "float16"
    numpy_dtype: ClassVar[str] = "<f2"
    fill: ClassVar[int | float] = float("nan")
    logical_dtype: ClassVar[str | None] = None
    has_row_scale: ClassVar[bool] = False
    zstd: int | None = None

    def encode(self, rows: Tensor, columns: Columns) -> Encoded:
        return Encoded(rows.half(), None)

    def expect(self, encoded: Encoded) -> None:
        if not encoded.rows.isfinite().all():
            raise SaeError("codec = float16: an activation is beyond 65,504; use int8 or bfloat16")

    def decode(self, encoded: Encoded, columns: Columns) -> Tensor:
        return encoded.rows.float()

    def error_bound(self, rows: Tensor, encoded: Encoded, columns: Columns) -> Tensor:
        return rows.abs() * 2.0**-11 + 2.0**-25


@dataclass(frozen=True)
class Float32:
    """The rows as they are."""

    name: ClassVar[str] = "float32"
    numpy_dtype: ClassVar[str] = "<f4"
    fill: ClassVar[int | float] = float("nan")
    logical_dtype: ClassVar[str | None] = None
    has_row_scale: ClassVar[bool] = False
    zstd: int | None = None

    def encode(self, rows: Tensor, columns: Columns) -> Encoded:
        return Encoded(rows.float(), None)

    def expect(self, encoded: Encoded) -> None:
        pass

    def decode(self, encoded: Encoded, columns: Columns) -> Tensor:
        return encoded.rows.clone()

    def error_bound(self, rows: Tensor, encoded: Encoded, columns: Columns) -> Tensor:
        return rows.new_zeros(rows.shape)


def to_numpy(stored: Tensor) -> np.ndarray:
    """Stored numbers as NumPy holds them: bfloat16 as the uint16 of its bits."""
    import torch

    return stored.view(torch.uint16).numpy() if stored.dtype == torch.bfloat16 else stored.numpy()


def from_numpy(stored: np.ndarray) -> Tensor:
    """The inverse of `to_numpy`."""
    import torch

    tensor = torch.from_numpy(stored if stored.flags.writeable else stored.copy())
    return tensor.view(torch.bfloat16) if stored.dtype == np.uint16 else tensor


CODECS: dict[str, type[Int8] | type[BFloat16] | type[Float16] | type[Float32]] = {
    kind.name: kind for kind in (Int8, BFloat16, Float16, Float32)
}


def codec(text: str) -> Codec:
    """A codec from its name and settings: `int8`, `int8:step=0.11`, `bfloat16:zstd=1`, `int8:step=0,zstd=none`."""
    name, _, rest = text.partition(":")
    if name not in CODECS:
        raise SaeError(f"codec = {name}: no such codec; there are {', '.join(CODECS)}")
    value: Codec = CODECS[name]()
    for item in filter(None, rest.split(",")):
        setting, _, given = item.partition("=")
        try:
            if setting == "zstd":
                level = None if given == "none" else int(given)
                if level is not None and level not in LEVELS:
                    raise ValueError
                value = replace(value, zstd=level)  # type: ignore[type-var]
            elif setting == "step" and isinstance(value, Int8):
                value = replace(value, step=float(given))
            else:
                raise SaeError(
                    f"codec = {text}: {name} has no setting {setting!r}; it has {', '.join(settings(value))}"
                )
        except SaeError:
            raise
        except ValueError as error:
            usual = "zstd=1 to 22 or zstd=none" if setting == "zstd" else "step=0.08"
            raise SaeError(f"codec = {text}: {given!r} is not a value for {setting}; try {usual}") from error
    return value


def settings(value: Codec) -> dict[str, Any]:
    """The settings of a codec as JSON."""
    return asdict(value)  # type: ignore[call-overload]


def codec_recipe(value: Codec) -> dict[str, Any]:
    """The JSON form that goes into a store's recipe."""
    return {"name": value.name, **settings(value)}


def codec_from_recipe(recipe: dict[str, Any]) -> Codec:
    """The codec a store was written with. Raises ValueError for settings that it cannot have."""
    name = text(recipe, "name")
    if name not in CODECS:
        raise SaeError(f"codec {name}: unknown to this version; use the version that wrote the store")
    given = {setting: value for setting, value in recipe.items() if setting != "name"}
    if unknown := given.keys() - settings(CODECS[name]()):
        raise ValueError(f"codec {name} has no {min(unknown)}")
    if given.get("zstd") is not None:
        whole(given, "zstd", LEVELS[0], LEVELS[-1])
    if "step" in given and not (type(given["step"]) in (int, float) and 0 <= given["step"] <= 1):
        raise ValueError(f"step is {shown(given['step'])}, not a share of a standard deviation")
    return CODECS[name](**given)


def calibrate(rows: Tensor) -> Columns:
    """Mean and scale of every column from float32 rows [n, d], without the outlier rows.

    A column that hardly varies gets a floor of a tenth of the median scale (or 1). One that is quiet here and fires
    later would otherwise widen the int8 step of whole rows: at width 768 it added 74 % FVU with a floor of a thousandth
    and adds 0.02 % so; eight such columns add 0.16 %.
    Rows of zeros, of which sparse activations may have more than others, have no say in what the median norm is.
    """
    import torch

    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    usual = norms[norms > 0].median() if norms.any() else norms.new_zeros(())
    kept = rows[norms <= OUTLIER_NORM * usual].double()
    mean = kept.mean(dim=0)
    scale = (kept - mean).square().mean(dim=0).sqrt()
    positive = scale[scale > 0]
    floor = (
        SCALE_FLOOR * positive.median() if len(positive) else torch.ones((), dtype=torch.float64, device=scale.device)
    )
    return Columns(mean.float(), torch.maximum(scale, floor).float().clamp_min(torch.finfo(torch.float32).tiny))
