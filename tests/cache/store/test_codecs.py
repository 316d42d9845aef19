"""The contract of every codec, and what each one promises by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from support.heavy_tails import HeavyTails
from support.small_stores import few, heavy_rows
from torch import Tensor

from sae.cache.errors import SaeError
from sae.cache.store.codecs import (
    CODECS,
    Codec,
    Columns,
    Encoded,
    Int8,
    calibrate,
    codec,
    codec_from_recipe,
    codec_recipe,
    from_numpy,
    to_numpy,
)

VARIANTS = [*CODECS, "int8:step=0", "int8:step=0.5"]
every_codec = pytest.mark.parametrize("name", VARIANTS)


def through(value: Codec, rows: Tensor, columns: Columns) -> tuple[Encoded, Tensor]:
    """Encoded rows and what they decode to, by way of NumPy as on disk."""
    encoded = value.encode(rows, columns)
    value.expect(encoded)
    stored = to_numpy(encoded.rows)
    assert stored.dtype.str == value.numpy_dtype
    assert (encoded.row_scale is not None) == value.has_row_scale
    decoded = value.decode(Encoded(from_numpy(stored), encoded.row_scale), columns)
    assert decoded.dtype == torch.float32
    assert decoded.shape == rows.shape
    return encoded, decoded


def added_fvu(rows: Tensor, decoded: Tensor) -> float:
    """Share of the rows' variance that the codec's error makes up."""
    rows, decoded = rows.double(), decoded.double()
    return float((decoded - rows).square().sum() / (rows - rows.mean(dim=0)).square().sum())


@every_codec
def test_every_value_is_within_the_bound(name: str) -> None:
    value = codec(name)
    rows = heavy_rows(2000, 48, massive=3)
    assert rows.mean(dim=0)[0] > 50 * rows[10:].std(dim=0)[0]
    columns = calibrate(rows)
    encoded, decoded = through(value, rows, columns)
    assert bool(((decoded - rows).abs() <= value.error_bound(rows, encoded, columns)).all())


@few
@given(
    st.sampled_from(VARIANTS), st.integers(1, 40), st.integers(1, 9), st.integers(-20, 20), st.integers(-3, 6),
    st.integers(0, 5), st.integers(0, 1 << 30),
)  # fmt: skip
def test_every_value_is_within_the_bound_at_any_scale(
    name: str, n: int, d: int, power: int, mean: int, power_spread: int, seed: int
) -> None:
    """Scales from 1e-20 to 1e20, means of up to a million standard deviations, columns of very different scales."""
    value = codec(name)
    random = torch.Generator().manual_seed(seed)
    spread = torch.empty(d).uniform_(-power_spread, power_spread, generator=random)
    rows = (torch.randn(n, d, generator=random) + 10.0**mean) * 10.0 ** (spread + power)
    if value.name == "float16" and rows.abs().max() > 60_000:
        rows = rows / rows.abs().max()
    columns = calibrate(rows)
    if value.name == "int8" and ((rows - columns.mean).abs() / columns.scale).max() > 8e6:
        with pytest.raises(SaeError, match="standard deviations from its column's mean"):
            through(value, rows, columns)  # no float16 scale reaches that far: refused, never stored wrong
        return
    encoded, decoded = through(value, rows, columns)
    assert bool(((decoded - rows).abs() <= value.error_bound(rows, encoded, columns)).all())


@pytest.mark.parametrize(
    ("name", "most"),
    [("int8", 1e-3), ("int8:step=0", 5e-4), ("bfloat16", 5e-5), ("float16", 1e-5), ("float32", 0.0)],
)
@pytest.mark.parametrize("kind", ["heavy", "student", "cubed"])
def test_added_fvu(name: str, most: float, kind: str) -> None:
    """On rows like a language model's, calibrated on the first quarter, without the massive row."""
    random = torch.Generator().manual_seed(1)
    normal = torch.randn(8000, 64, generator=random)
    rows = {
        "heavy": heavy_rows(8000, 64, massive=0),
        "student": normal / torch.randn(8000, 3, generator=random).square().mean(dim=1, keepdim=True).sqrt() + 5,
        "cubed": normal**3,
    }[kind]
    columns = calibrate(rows[:2000])
    assert added_fvu(rows, through(codec(name), rows, columns)[1]) <= most


@pytest.fixture(scope="module")
def heavy() -> tuple[Tensor, Tensor, Tensor]:
    """Rows of width 768 to calibrate on (massive ones among them), other rows of the same kind, and massive rows."""
    source = HeavyTails(768)
    return source.rows(2048, seed=0, massive=8), source.rows(2048, seed=1), source.rows(16, seed=2, massive=16)


def test_the_heavy_tails_are_what_they_should_be(heavy: tuple[Tensor, Tensor, Tensor]) -> None:
    """Not normal, with columns whose mean is far from 0, outlier columns and massive rows: what breaks naive codecs."""
    rows = heavy[1]
    scale = rows.std(dim=0)
    kurtosis = ((rows - rows.mean(dim=0)) / scale).pow(4).mean(dim=0)
    assert float(kurtosis.median()) > 4.5
    assert float(rows.mean(dim=0).abs().max() / scale.median()) > 90
    assert float(scale.max() / scale.median()) > 6
    assert float(heavy[2].abs().max()) == 3000.0
    naive = (rows / rows.abs().amax(dim=1, keepdim=True) * 127).round() / 127 * rows.abs().amax(dim=1, keepdim=True)
    assert added_fvu(rows, naive) > 0.01


@pytest.mark.parametrize(
    ("name", "most"), [("int8", 1e-3), ("int8:step=0", 2e-4), ("bfloat16", 5e-5), ("float16", 1e-5)]
)
def test_added_fvu_on_heavy_tails(name: str, most: float, heavy: tuple[Tensor, Tensor, Tensor]) -> None:
    """Overall, and in the worst column; a massive row keeps its direction, and every value its bound."""
    value, (first, rows, massive) = codec(name), heavy
    columns = calibrate(first)
    encoded, decoded = through(value, rows, columns)
    assert added_fvu(rows, decoded) <= most
    error, scatter = (
        (decoded - rows).double().square().sum(dim=0),
        (rows - rows.mean(dim=0)).double().square().sum(dim=0),
    )
    assert float((error / scatter).max()) <= 4 * most if name != "float16" else True
    assert bool(((decoded - rows).abs() <= value.error_bound(rows, encoded, columns)).all())
    encoded, decoded = through(value, massive, columns)
    assert bool(((decoded - massive).abs() <= value.error_bound(massive, encoded, columns)).all())
    assert bool(((decoded - massive).norm(dim=1) <= 0.07 * massive.norm(dim=1)).all())


def test_the_default_stores_a_fifth_of_float32(heavy: tuple[Tensor, Tensor, Tensor]) -> None:
    """Numbers and scales, compressed."""
    value, (first, rows, _) = codec("int8"), heavy
    encoded = value.encode(rows, calibrate(first))
    assert encoded.row_scale is not None
    parts = (to_numpy(encoded.rows), encoded.row_scale.numpy())
    assert sum(len(Zstd(level=1).encode(part)) for part in parts) <= 0.20 * 4 * rows.numel()


def test_a_column_that_is_quiet_at_first_does_little_harm(heavy: tuple[Tensor, Tensor, Tensor]) -> None:
    """It hardly varies where the columns are calibrated, and like the others afterwards."""
    first, rows, _ = heavy
    quiet = first.clone()
    quiet[:, -1] = 0.5 + 1e-4 * first[:, -1]
    assert added_fvu(rows, through(Int8(), rows, calibrate(quiet))[1]) <= 1e-3
    assert added_fvu(quiet[8:], through(Int8(), quiet[8:], calibrate(quiet))[1]) <= 1e-3


@every_codec
def test_a_row_is_encoded_by_itself(name: str) -> None:
    value = codec(name)
    rows = heavy_rows(257, 33)
    columns = calibrate(rows)
    whole = value.encode(rows, columns)
    for part in (slice(0, 1), slice(5, 6), slice(100, 257), slice(None, None, 3)):
        encoded = value.encode(rows[part], columns)
        assert to_numpy(encoded.rows).tobytes() == to_numpy(whole.rows[part].contiguous()).tobytes()
        if encoded.row_scale is not None and whole.row_scale is not None:
            assert torch.equal(encoded.row_scale, whole.row_scale[part])


@every_codec
@pytest.mark.parametrize("kind", ["zeros", "constant", "one constant column", "zero rows among others"])
def test_rows_that_hardly_vary(name: str, kind: str) -> None:
    value = codec(name)
    rows = heavy_rows(200, 5, massive=0)
    if kind == "zeros":
        rows = torch.zeros(200, 5)
    elif kind == "constant":
        rows = torch.tensor([0.0, 1.0, -3.5, 1e-3, 1e3]).repeat(200, 1)
    elif kind == "one constant column":
        rows[:, 2] = 7.25
    else:
        rows[::2] = 0.0
    columns = calibrate(rows)
    encoded, decoded = through(value, rows, columns)
    assert bool(torch.isfinite(decoded).all())
    assert bool(((decoded - rows).abs() <= value.error_bound(rows, encoded, columns)).all())
    if kind in ("zeros", "constant") and name != "float16":
        torch.testing.assert_close(decoded, rows, rtol=1e-6, atol=0)


@every_codec
def test_decoding_leaves_the_stored_rows_alone(name: str) -> None:
    value = codec(name)
    rows = heavy_rows(20, 5)
    columns = calibrate(rows)
    encoded = value.encode(rows, columns)
    before = encoded.rows.clone()
    first = value.decode(encoded, columns)
    first.add_(1)
    assert torch.equal(encoded.rows, before)
    assert torch.equal(value.decode(encoded, columns) + 1, first)


@few
@given(st.floats(0, 1), st.integers(0, 1 << 30))
def test_int8_never_makes_minus_128_and_never_clips(step: float, seed: int) -> None:
    """-128 is what a missing chunk reads as. The widest value of a row is as exact as the others."""
    value = Int8(step=step)
    rows = heavy_rows(100, 7, seed=seed, massive=2)
    columns = calibrate(rows)
    encoded, decoded = through(value, rows, columns)
    assert int(encoded.rows.min()) >= -127
    assert encoded.row_scale is not None
    assert float(encoded.row_scale.min()) >= float(torch.tensor(step).half()) * (1 - 1e-3)
    assert bool(((decoded - rows).abs() <= value.error_bound(rows, encoded, columns)).all())


def test_int8_refuses_what_no_scale_can_hold() -> None:
    columns = calibrate(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(SaeError, match=r"8 million standard deviations .*; use bfloat16"):
        through(Int8(), torch.tensor([[1.0, 1e8, 0.0]]), columns)


def test_float16_refuses_what_it_cannot_hold() -> None:
    columns = calibrate(torch.randn(100, 3))
    with pytest.raises(SaeError, match=r"beyond 65,504; use int8 or bfloat16"):
        through(codec("float16"), torch.tensor([[1.0, 7e4, 0.0]]), columns)


def test_calibration_ignores_outlier_rows() -> None:
    rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)) + 1
    plain = calibrate(rows)
    with_outliers = torch.cat([rows, torch.full((20, 8), 3000.0)])
    columns = calibrate(with_outliers)
    torch.testing.assert_close(columns.mean, plain.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(columns.scale, plain.scale, rtol=0, atol=1e-6)


def test_calibration_of_mostly_empty_rows() -> None:
    """Rows of zeros do not make every other row an outlier."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 8, generator=random) * 0.01 * (torch.rand(4000, 1, generator=random) < 0.3)
    assert float(calibrate(rows).scale.max()) < 0.01
    assert added_fvu(rows, through(Int8(), rows, calibrate(rows))[1]) < 1e-3


def test_every_scale_is_a_usable_divisor() -> None:
    for rows in (torch.zeros(5, 3), torch.full((5, 3), 1e-42), torch.full((1, 3), 2.0), torch.eye(3) * 1e-44):
        columns = calibrate(rows)
        assert bool((columns.scale >= torch.finfo(torch.float32).tiny).all())
        assert bool(torch.isfinite(Int8().encode(rows, columns).row_scale).all())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("int8", {"name": "int8", "step": 0.08, "zstd": 1}),
        ("int8:step=0.11", {"name": "int8", "step": 0.11, "zstd": 1}),
        ("int8:step=0,zstd=none", {"name": "int8", "step": 0.0, "zstd": None}),
        ("bfloat16:zstd=3", {"name": "bfloat16", "zstd": 3}),
        ("float16", {"name": "float16", "zstd": None}),
        ("float32:zstd=22", {"name": "float32", "zstd": 22}),
    ],
)
def test_settings(text: str, recipe: dict[str, object]) -> None:
    assert codec_recipe(codec(text)) == recipe
    assert codec_from_recipe(recipe) == codec(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4", "codec = int4: no such codec; there are int8, bfloat16, float16, float32"),
        ("int8:bits=4", "codec = int8:bits=4: int8 has no setting 'bits'; it has step, zstd"),
        ("float32:step=1", "codec = float32:step=1: float32 has no setting 'step'; it has zstd"),
        ("int8:step=2", "codec = int8:step=2: the step is a share of a standard deviation, 0 to 1"),
        ("int8:step=nan", "codec = int8:step=nan: the step is a share of a standard deviation, 0 to 1"),
        ("int8:step=big", "codec = int8:step=big: 'big' is not a value for step; try step=0.08"),
        ("int8:zstd=0", "codec = int8:zstd=0: '0' is not a value for zstd; try zstd=1 to 22 or zstd=none"),
        ("int8:zstd", "codec = int8:zstd: '' is not a value for zstd; try zstd=1 to 22 or zstd=none"),
    ],
)
def test_settings_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(SaeError) as caught:
        codec(text)
    assert str(caught.value) == message


def test_a_codec_of_the_future_is_named() -> None:
    with pytest.raises(SaeError, match="codec int5: unknown to this version"):
        codec_from_recipe({"name": "int5"})
