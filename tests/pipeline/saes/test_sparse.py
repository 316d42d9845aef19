"""The sparse products against the dense ones they stand for, in value and in gradient."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae.pipeline.saes import auxk, encoder, initial, latents, linears, sparse
from sae.pipeline.saes.encoder import Preactivations
from sae.pipeline.saes.latents import Latents
from sae.pipeline.saes.sparse import SparsePattern

B, D_IN, M, D_OUT = 6, 5, 9, 4


def made(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def pattern(kind: str) -> SparsePattern:
    """SparsePattern of every shape the package uses; the ragged one has empty rows at both ends and in the middle."""
    if kind == "per row":
        return SparsePattern.per_row(made(B, M).topk(3, dim=1).indices, M)
    counts = torch.tensor([0, 4, 0, 1, 2, 0]) if kind == "ragged" else torch.zeros(B, dtype=torch.int64)
    rows = [made(M, seed=row).topk(int(count)).indices for row, count in enumerate(counts)]
    return SparsePattern(torch.cat(rows), counts.cumsum(0) - counts, M)


def dense(entries: SparsePattern, values: Tensor) -> Tensor:
    full = torch.zeros(entries.batch, entries.d_sae, dtype=values.dtype)
    return full.index_put((entries.row_ids, entries.indices), values)


@pytest.fixture(params=["per row", "ragged", "empty"])
def entries(request: pytest.FixtureRequest) -> SparsePattern:
    return pattern(request.param)


def test_the_products_are_those_of_the_dense_matrix(entries: SparsePattern) -> None:
    weights, table, rows = made(entries.indices.numel(), seed=1), made(M, D_IN, seed=2), made(B, D_IN, seed=3)
    full = dense(entries, weights)
    torch.testing.assert_close(sparse.spmm(entries, weights, table), full @ table)
    torch.testing.assert_close(sparse.spmm_t(entries, weights, rows), full.T @ rows)
    torch.testing.assert_close(sparse.sddmm(entries, rows, table), (rows @ table.T)[entries.row_ids, entries.indices])
    torch.testing.assert_close(sparse.sum_by_latent(entries, weights), full.sum(0))
    torch.testing.assert_close(sparse.row_dots(table, table), table.square().sum(1))


def test_gradcheck_decode(entries: SparsePattern) -> None:
    values, table = made(entries.indices.numel(), grad=True), made(M, D_OUT, grad=True)
    assert torch.autograd.gradcheck(lambda v, t: sparse.decode(v, entries, t), (values, table))


def test_gradcheck_preactivations(entries: SparsePattern) -> None:
    x, centre, weight, bias = (made(*shape, grad=True) for shape in ((B, D_IN), (D_IN,), (M, D_IN), (M,)))

    def at_the_entries(x: Tensor, centre: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pre = Preactivations(x, centre, weight, bias)
        full = torch.cat([p.clone() for _, p in pre.blocks()])
        return pre.gather(entries, full[entries.row_ids, entries.indices])

    assert torch.autograd.gradcheck(at_the_entries, (x, centre, weight, bias))
    assert torch.autograd.gradcheck(linears.centred_linear, (x, centre, weight, bias))


@pytest.mark.parametrize("activate", ["topk", "positive"])
def test_nothing_is_computed_for_an_input_that_asks_for_no_gradient(
    activate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pre = Preactivations(made(B, D_IN), made(D_IN), made(M, D_IN, grad=True), made(M, grad=True))
    chosen = pre.topk(2) if activate == "topk" else pre.above_threshold(0.0)
    monkeypatch.setattr(sparse, "spmm", None)  # the input's gradient would need it
    chosen.values.sum().backward()
    assert pre.weight.grad is not None and pre.x.grad is None


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "BLOCK_ELEMENTS", 2 * M)
    monkeypatch.setattr(encoder, "MIN_BLOCK_ROWS", 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_topk_is_torchs_over_any_number_of_blocks(batch: int) -> None:
    x, centre, weight, bias = made(batch, D_IN), made(D_IN, seed=1), made(M, D_IN, seed=2), made(M, seed=3)
    found = Preactivations(x, centre, weight, bias).topk(3)
    expected = ((x - centre) @ weight.T + bias).topk(3, dim=1)
    assert found.indices is not None
    order = found.values.argsort(dim=1, descending=True)
    torch.testing.assert_close(found.values.gather(1, order), expected.values)
    assert torch.equal(found.indices.gather(1, order), expected.indices)


@given(
    rows=st.integers(1, 5), k=st.integers(1, 6), groups=st.integers(1, 12), levels=st.integers(1, 40),
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None)
def test_the_quick_topk_is_torchs(rows: int, k: int, groups: int, levels: int, seed: int, dtype: torch.dtype) -> None:
    """With many ties, with negative numbers, where it applies and where it does not."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randint(-levels, levels, (rows, 32 * groups), generator=generator) / 3).to(dtype)
    values, indices = encoder._row_topk(p, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, p.topk(k, dim=1).values)
    assert torch.equal(p.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


@given(
    bound=st.floats(-3, 3), seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    or_equal=st.booleans(), levels=st.integers(1, 9),
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None)
def test_where_is_the_comparison(bound: float, seed: int, dtype: torch.dtype, or_equal: bool, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randint(-levels, levels, (5, 7), generator=generator) / 3).to(dtype)
    p[0, 0], p[0, 1] = -0.0, 0.0
    for limit in (0.0, torch.as_tensor(bound).to(dtype).item(), torch.full((7,), bound)):
        other = torch.as_tensor(limit, dtype=dtype)
        expected = p >= other if or_equal else p > other
        assert torch.equal(encoder._where(p, limit, or_equal=or_equal), expected.view(-1).nonzero().view(-1))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("guess", [None, 0.0, 1e9])
@pytest.mark.parametrize("count", [1, 7, 20, B * M])
def test_largest_is_torchs_whatever_the_guess(guess: float | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over blocks, with a bound that is too low and one that is too high."""
    if guess is not None:
        monkeypatch.setattr(encoder, "_bound", lambda p, share: guess)
    x, centre, weight, bias = made(B, D_IN), made(D_IN, seed=1), made(M, D_IN, seed=2), made(M, seed=3)
    found = Preactivations(x, centre, weight, bias).batch_topk(count)
    p = ((x - centre) @ weight.T + bias).relu().flatten()
    top = p.topk(count)
    expected = torch.zeros_like(p).index_copy(0, top.indices, top.values).view(B, M)
    torch.testing.assert_close(found.dense(), expected)
    assert found.entries is not None and (found.values > 0).all()
    assert found.values.numel() == min(count, int((p > 0).sum()))


def test_the_quick_topk_lets_what_is_no_number_through() -> None:
    """So that the loss is no number either, and somebody notices."""
    p = torch.randn(3, 128)
    p[1] = torch.nan
    values, _ = encoder._row_topk(p, 2)
    assert values.isnan().any(dim=1).tolist() == [False, True, False]


def test_the_sample_leaves_out_no_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stride that shares a factor with the width would see some latents only."""
    monkeypatch.setattr(encoder, "SAMPLE", 96)
    p = torch.zeros(96, 12)
    p[:, 5] = 1.0
    assert encoder._bound(p, 1e-3) == 1.0 and encoder._bound(p, 1 / 2) == 0.0


def test_ties_keep_exactly_k() -> None:
    pre = Preactivations(torch.ones(4, D_IN), torch.zeros(D_IN), torch.ones(M, D_IN), torch.zeros(M))
    found = pre.topk(3)
    assert found.indices is not None
    assert found.l0().tolist() == [3] * 4
    assert all(len(set(row)) == 3 for row in found.indices.tolist())


@pytest.mark.usefixtures("small_blocks")
def test_above_is_the_same_by_either_path(monkeypatch: pytest.MonkeyPatch) -> None:
    table, results = made(M, D_OUT, seed=4), []
    for limit in (1.0, -1.0):
        monkeypatch.setattr(encoder, "SPARSE_BELOW", limit)
        x, centre, weight, bias = (
            made(*shape, seed=seed, grad=True) for seed, shape in enumerate(((B, D_IN), (D_IN,), (M, D_IN), (M,)))
        )
        found = Preactivations(x, centre, weight, bias).above_threshold(0.0).map(Tensor.relu)
        assert (found.entries is None) == (limit < 0)
        (latents.decode(found, table).square().sum() + found.sum_per_row().sum()).backward()
        results.append([found.dense().detach(), *(leaf.grad for leaf in (x, centre, weight, bias))])
    torch.testing.assert_close(results[0], results[1])


def test_two_batches_share_scratch_and_one_backward() -> None:
    """Scratch is overwritten by the second batch before the first one's backward; nothing saved may refer to it."""
    weight, bias, centre = made(M, D_IN, grad=True), made(M, grad=True), made(D_IN, grad=True)
    batches = [made(B, D_IN, seed=seed) for seed in (1, 2)]
    together = [Preactivations(x, centre, weight, bias).topk(2).values.square().sum() for x in batches]
    torch.add(*together).backward()
    dense_terms = [((x - centre) @ weight.T + bias).topk(2, dim=1).values.square().sum() for x in batches]
    expected = torch.autograd.grad(torch.add(*dense_terms), [weight, bias, centre])
    torch.testing.assert_close([weight.grad, bias.grad, centre.grad], list(expected))


def test_threads_do_not_share_scratch() -> None:
    def run(seed: int) -> bool:
        x, weight = made(64, D_IN, seed=seed), made(M, D_IN, seed=seed + 100)
        pre = Preactivations(x, torch.zeros(D_IN, dtype=x.dtype), weight, torch.zeros(M, dtype=x.dtype))
        return all(torch.allclose(pre.topk(1).values[:, 0], (x @ weight.T).amax(1)) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_under_autocast_the_kept_values_are_exact() -> None:
    x, weight = made(B, 32).float(), made(64, 32).float()
    pre = Preactivations(x, torch.zeros(32), weight, torch.zeros(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pre.topk(8)
    assert found.indices is not None and found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, (x @ weight.T).gather(1, found.indices))


@pytest.mark.parametrize("kind", ["per row", "ragged", "empty", "dense"])
def test_latents_mean_the_same_in_every_form(kind: str) -> None:
    if kind == "dense":
        found = Latents.of_dense(made(B, M).relu())
    else:
        entries = pattern(kind)
        values = made(entries.indices.numel(), seed=1).relu()
        found = Latents(values.view(B, 3) if kind == "per row" else values, entries, M)
    full, weights = found.dense(), made(M, seed=2)
    assert found.batch == B and full.shape == (B, M)
    assert torch.equal(found.l0(), (full > 0).sum(1))
    assert torch.equal(found.fired(), (full > 0).sum(0))
    torch.testing.assert_close(found.sum_per_row(), full.sum(1))
    torch.testing.assert_close(found.sum_per_row(weights), full @ weights)
    torch.testing.assert_close(found.map(lambda values: 2 * values).dense(), 2 * full)


@pytest.mark.parametrize("dead_latents", [2, 4, M])
def test_auxk_is_its_formula_by_every_path(dead_latents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All dead latents used (2 of 2), chosen among few (dense), chosen among many (sparse)."""
    monkeypatch.setattr(auxk, "DENSE_UP_TO", 2)
    k_aux = 2
    leaves = [made(*s, seed=i, grad=True) for i, s in enumerate(((D_IN,), (M, D_IN), (M,), (M, D_OUT)))]
    centre, weight, bias, table = leaves
    x, residual = made(B, D_IN, seed=5), made(B, D_OUT, seed=6)
    dead = torch.arange(M) < dead_latents
    who = dead.nonzero().view(-1)
    e_hat = auxk.explained(Preactivations(x, centre, weight, bias), who, k_aux, table)
    found = (residual - e_hat).square().sum()

    p = ((x - centre) @ weight.T + bias).relu()[:, dead]
    kept = torch.zeros_like(p).scatter(1, p.topk(k_aux, dim=1).indices, 1.0) * p
    expected = (residual - kept @ table[dead]).square().sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize(("width", "expected"), [(768, 512), (512, 256), (1024, 512), (64, 32), (2, 1), (1, 1)])
def test_default_aux_k_is_half_the_width_as_a_power_of_two(width: int, expected: int) -> None:
    assert auxk.default_k(width) == expected


def test_geometric_median() -> None:
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0]], dtype=torch.float64)
    assert abs(initial.geometric_median(line, steps=1000).item() - 2) < 1e-3
    corners = torch.tensor([[0.0, 0], [0, 2], [2, 0], [2, 2]])
    torch.testing.assert_close(initial.geometric_median(corners), torch.ones(2))
    same = torch.full((10, 3), 7.0)
    torch.testing.assert_close(initial.geometric_median(same), same[0])


@pytest.mark.parametrize("sample", [torch.zeros(4, 3), torch.full((4, 3), torch.nan)])
def test_rows_without_a_scale_are_refused(sample: Tensor) -> None:
    with pytest.raises(ValueError, match="input_scale: a scale needs"):
        initial.rms_scale(sample)


@pytest.mark.parametrize(("count", "width"), [(10, 4), (3, 8)])
def test_orthogonal_rows_are_orthonormal_within_a_block(count: int, width: int) -> None:
    rows = initial.rows("orthogonal", count, width, torch.Generator().manual_seed(0))
    for block in rows.split(width):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
