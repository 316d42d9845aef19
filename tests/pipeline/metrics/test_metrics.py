"""Every metric against a slow, obvious twin that sees all rows at once."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.pipeline.metrics.downstream import Downstream
from sae.pipeline.metrics.metric import Encoded
from sae.pipeline.metrics.reconstruction import Reconstruction
from sae.pipeline.metrics.row_error import RowError
from sae.pipeline.metrics.sparsity import Sparsity
from sae.pipeline.saes import Latents
from sae.pipeline.saes.sparse import SparsePattern

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def pieces(x: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(x.split(sizes))


def reconstruction(x: Tensor, x_hat: Tensor, sizes: list[int]) -> Reconstruction:
    found = Reconstruction()
    for part, part_hat in zip(pieces(x, sizes), pieces(x_hat, sizes), strict=True):
        found.count(part, part_hat)
    return found


def slow_reconstruction(x: Tensor, x_hat: Tensor) -> dict[str, float]:
    """Row by row in numpy float64, the definitions as they are written."""
    rows, hats = x.double().numpy(), x_hat.double().numpy()
    mean = sum(rows) / len(rows)
    errors = [sum((a - b) ** 2) for a, b in zip(rows, hats, strict=True)]
    pairs = [(a, b) for a, b in zip(rows, hats, strict=True) if any(a)]
    fvu = sum(errors) / sum(sum((a - mean) ** 2) for a in rows)
    return {
        "rows": len(rows),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_features": np.mean(
            [1 - sum((a - b) ** 2) / sum((a - a.mean()) ** 2) for a, b in zip(rows.T, hats.T, strict=True)]
        ),
        "mse": np.mean(errors),
        "mse_per_feature": np.mean((rows - hats) ** 2),
        "cosine": np.mean([a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if any(b) else 0.0 for a, b in pairs]),
        "l2_ratio": np.mean([np.linalg.norm(b) / np.linalg.norm(a) for a, b in pairs]),
        "relative_bias": np.mean([b @ b for b in hats]) / np.mean([a @ b for a, b in zip(rows, hats, strict=True)]),
        "normalised_mse": np.mean([sum((a - b) ** 2) / (a @ a) for a, b in pairs]),
    }


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, d=st.integers(1, 9), shift=st.sampled_from([0.0, 1.0, 100.0]), seed=st.integers(0, 10**6))
def test_reconstruction_is_the_definition_however_batched(sizes: list[int], d: int, shift: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes) + 3, d, generator=random) + shift
    x_hat = x + 0.3 * torch.randn(x.shape, generator=random)
    x[0] = 0.0  # a row without a direction
    x_hat[-1] = 0.0
    scores = reconstruction(x, x_hat, [*sizes, 3]).scores()
    for name, expected in slow_reconstruction(x, x_hat).items():
        assert getattr(scores, name) == pytest.approx(expected, rel=1e-9, abs=1e-9), name


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, zeros=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_the_error_of_the_usual_row_is_the_definition_however_batched(sizes: list[int], zeros: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes) + zeros, 5, generator=random)
    x_hat = x + 0.3 * torch.randn(x.shape, generator=random)
    x[:zeros], x[zeros] = 0.0, 1e15  # rows that have no relative error, one beside which the others are nothing
    metric = RowError()
    for part, part_hat in zip(x.split([*sizes, zeros]), x_hat.split([*sizes, zeros]), strict=True):
        metric.update(Encoded(part, part, None, part_hat))
    rows, hats = x.double().numpy(), x_hat.double().numpy()
    errors = [sum((a - b) ** 2) / (a @ a) for a, b in zip(rows, hats, strict=True) if any(a)]
    assert metric.result()["row_error"] == pytest.approx(sorted(errors)[(len(errors) - 1) // 2], rel=1e-6)


def test_rows_of_zeros_have_no_relative_error() -> None:
    metric = RowError()
    assert metric.result() == {"row_error": None}
    metric.update(Encoded(torch.zeros(3, 2), torch.zeros(3, 2), None, torch.ones(3, 2)))
    assert metric.result() == {"row_error": None}


def test_fvu_survives_a_mean_far_from_zero() -> None:
    """One-pass sums of squares in float32 lose everything here: the mean is 10^4 standard deviations."""
    x = torch.randn(4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    x_hat = x + 0.1
    expected = 3 * 0.01 * len(x) / (x - x.mean(0)).square().sum().item()
    assert reconstruction(x, x_hat, [1000] * 4).scores().fvu == pytest.approx(expected, rel=1e-6)
    per_feature = reconstruction(x, x_hat, [4000]).explained_variance_per_feature()
    assert per_feature.shape == (3,)
    assert per_feature == pytest.approx(1 - 0.01 / x.var(0, correction=0).numpy(), rel=1e-6)


def test_reconstruction_at_its_ends() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)) + 2
    perfect = reconstruction(x, x, [50]).scores()
    assert (perfect.fvu, perfect.mse, perfect.relative_bias) == (0.0, 0.0, 1.0)
    assert perfect.cosine == pytest.approx(1.0)
    nothing = reconstruction(x, torch.zeros_like(x), [50]).scores()
    assert (nothing.cosine, nothing.l2_ratio, nothing.relative_bias) == (0.0, 0.0, None)
    assert nothing.normalised_mse == pytest.approx(1.0)
    mean = reconstruction(x, x.mean(0).expand_as(x), [20, 30]).scores()
    assert mean.fvu == pytest.approx(1.0, rel=1e-5)
    assert mean.explained_variance == pytest.approx(0.0, abs=1e-5)
    constant = reconstruction(torch.ones(3, 2), torch.zeros(3, 2), [3])
    assert constant.scores().fvu is None
    assert constant.explained_variance_per_feature().isnan().all()
    assert reconstruction(torch.zeros(3, 2), torch.ones(3, 2), [3]).scores().cosine is None
    with pytest.raises(ValueError, match="no rows"):
        Reconstruction().scores()


def latents(rows: int, d_sae: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense [rows, d_sae] and the same as values and indices [rows, k], some of the values 0."""
    random = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, d_sae, generator=random).argsort(1)[:, :k]
    values = torch.randn(rows, k, generator=random).relu() * 10.0 ** -torch.randint(0, 11, (rows, k), generator=random)
    return torch.zeros(rows, d_sae).scatter(1, indices, values), values, indices


def varying(values: Tensor, indices: Tensor, counts: Tensor, d_sae: int) -> Latents:
    """Latents with so many entries [B] a row."""
    return Latents(values, SparsePattern(indices, counts.cumsum(0) - counts, d_sae), d_sae)


def slow_hoyer(table: np.ndarray) -> float | None:
    """1 for a single latent, the mean of what is there for more, None where nothing fires."""
    root = np.sqrt(table.shape[1])
    each = [(root - row.sum() / np.linalg.norm(row)) / (root - 1) if root > 1 else 1.0 for row in table if row.any()]
    return float(np.mean(each)) if each else None


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, d_sae=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 10**6))
def test_sparsity_is_the_definition_in_every_form(sizes: list[int], d_sae: int, k: int, seed: int) -> None:
    dense, values, indices = latents(sum(sizes), d_sae, min(k, d_sae), seed)
    forms = [Sparsity(d_sae) for _ in range(3)]
    for f, v, i in zip(pieces(dense, sizes), pieces(values, sizes), pieces(indices, sizes), strict=True):
        forms[0].count(Latents.of_dense(f))
        forms[1].count(Latents.of_rows(v, i, d_sae))
        where = v > 0  # a varying number of entries
        forms[2].count(varying(v[where], i[where], where.sum(1), d_sae))
    table = dense.double().numpy()
    counts, hoyer = (table != 0).sum(0), slow_hoyer(table)
    expected = {
        "rows": len(table),
        "l0": np.mean([(row != 0).sum() for row in table]),
        "l0_above_tiny": np.mean([(row > 1e-8).sum() for row in dense.numpy()]),
        "l0_above_small": np.mean([(row > 1e-5).sum() for row in dense.numpy()]),
        "l0_relative": np.mean([((row != 0) & (row > 0.01 * row.max())).sum() for row in dense.numpy()]),
        "l1": np.mean([row.sum() for row in table]),
        "zeros": (table == 0).mean(),
        "dead": (counts == 0).sum(),
        "dead_share": (counts == 0).mean(),
        "dense": (counts / len(table) > 0.1).sum(),
        "dense_share": (counts / len(table) > 0.1).mean(),
    }
    for form in forms:
        scores = dataclasses.asdict(form.scores())
        assert scores.pop("rare") is None
        assert scores.pop("hoyer") == (None if hoyer is None else pytest.approx(hoyer, rel=1e-6))
        assert scores == pytest.approx(expected, rel=1e-6)
        assert form.density() == pytest.approx(counts / len(table))


def test_latents_below_zero_and_rare_ones() -> None:
    found = Sparsity(3)
    found.count(Latents.of_dense(torch.tensor([[-2.0, 0.0, 1.0]])))
    assert (found.scores().l0, found.scores().l1, found.scores().l0_relative) == (2.0, 3.0, 2.0)
    often = Sparsity(3)
    often.count(Latents.of_dense(torch.tensor([[1.0, 1.0, 0.0]])))
    nothing = torch.zeros(0)
    none = torch.zeros(0, dtype=torch.long)
    ones = torch.ones(300_000)
    often.count(varying(ones, torch.zeros(300_000, dtype=torch.long), ones.long(), 3))
    often.count(varying(nothing, none, torch.zeros(1_700_000, dtype=torch.long), 3))
    scores = often.scores()
    assert (scores.rows, scores.rare, scores.dead, scores.dense) == (2_000_001, 1, 1, 1)
    with pytest.raises(ValueError, match="no rows"):
        Sparsity(3).scores()


def made_losses(contexts: int, seed: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]:
    random = torch.Generator().manual_seed(seed)
    clean = torch.rand(contexts, 7, generator=random) + 2
    cost = torch.rand(contexts, 7, generator=random)
    spliced = {
        "same": (clean, torch.zeros_like(clean)),
        "sae": (clean + 0.1 * cost, 0.2 * cost),
        "zero": (clean + 2 + cost, 3 + cost),
        "mean": (clean + 1 + cost, 1 + cost),
    }
    return clean, spliced, torch.rand(contexts, 7, generator=random) > 0.2


@settings(deadline=None, max_examples=20)
@given(sizes=SIZES, seed=st.integers(0, 10**6))
def test_downstream_weighs_tokens_alike_however_batched(sizes: list[int], seed: int) -> None:
    clean, spliced, mask = made_losses(sum(sizes), seed)
    mask[0, 0] = True
    found = Downstream()
    at = 0
    for size in sizes:
        part = slice(at, at + size)
        found.count(clean[part], {name: (ce[part], kl[part]) for name, (ce, kl) in spliced.items()}, mask[part])
        at += size
    scores = found.scores(resamples=50)

    def ce(name: str) -> float:
        return spliced[name][0][mask].double().mean().item()

    base, sae = clean[mask].double().mean().item(), scores["sae"]
    assert (sae.contexts, sae.tokens) == (sum(sizes), int(mask.sum()))
    assert sae.ce_clean.value == pytest.approx(base)
    assert sae.ce.value == pytest.approx(ce("sae"))
    assert sae.degradation.value == pytest.approx(ce("sae") - base)
    assert sae.kl.value == pytest.approx(spliced["sae"][1][mask].double().mean().item())
    for baseline in ("zero", "mean"):
        recovered = getattr(sae, f"recovered_{baseline}")
        assert recovered.value == pytest.approx((ce(baseline) - ce("sae")) / (ce(baseline) - base))
        assert recovered.low <= recovered.high
    kl_zero = spliced["zero"][1][mask].double().mean().item()
    assert sae.kl_recovered_zero is not None
    assert sae.kl_recovered_zero.value == pytest.approx(1 - sae.kl.value / kl_zero)


def test_identity_recovers_all_and_each_baseline_nothing() -> None:
    clean, spliced, _ = made_losses(9, 0)
    found = Downstream()
    found.count(clean, spliced)
    scores = found.scores()
    same = scores["same"]
    assert (same.degradation.value, same.degradation.low, same.degradation.high) == (0.0, 0.0, 0.0)
    assert same.recovered_zero is not None and same.recovered_mean is not None
    assert (same.recovered_zero.value, same.recovered_zero.low, same.recovered_mean.value) == (1.0, 1.0, 1.0)
    assert scores["zero"].recovered_zero is not None and scores["zero"].recovered_zero.value == 0.0
    assert scores["mean"].recovered_mean is not None and scores["mean"].recovered_mean.value == 0.0


def test_no_recovery_is_claimed_from_a_baseline_that_costs_nothing() -> None:
    clean, spliced, _ = made_losses(9, 0)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    found = Downstream()
    found.count(clean, {"sae": spliced["sae"], "zero": (clean + 1e-4, clean * 0), "mean": (clean + noise, clean)})
    scores = found.scores()["sae"]
    assert (scores.recovered_zero, scores.recovered_mean, scores.kl_recovered_zero) == (None, None, None)
    alone = Downstream()
    alone.count(clean, {"sae": spliced["sae"]})
    assert (alone.scores()["sae"].ce_zero, alone.scores()["sae"].recovered_mean) == (None, None)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    random = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(60):
        level = torch.randn(40, 1, generator=random)  # contexts differ: tokens of one are not independent
        clean = 3 + level + 0.1 * torch.randn(40, 20, generator=random)
        found = Downstream()
        found.count(clean, {"sae": (clean, clean * 0)})
        interval = found.scores(resamples=200, seed=trial)["sae"].ce_clean
        hits += interval.low <= 3 <= interval.high
    assert 0.85 <= hits / 60 <= 1.0


def test_downstream_refuses_what_it_cannot_score() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        Downstream().scores()
    empty = Downstream()
    empty.count(torch.ones(2, 3), {}, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no tokens"):
        empty.scores()
    changing = Downstream()
    changing.count(torch.ones(2, 3), {"a": (torch.ones(2, 3), torch.ones(2, 3))})
    with pytest.raises(AssertionError, match="same replacements"):
        changing.count(torch.ones(2, 3), {})


def test_masked_values_do_not_leak() -> None:
    """A nan at a masked place (padding may hold anything) changes nothing."""
    clean, spliced, mask = made_losses(5, 0)
    found = Downstream()
    holes = torch.where(mask, 0.0, math.nan)
    found.count(clean + holes, {name: (ce + holes, kl + holes) for name, (ce, kl) in spliced.items()}, mask)
    assert found.scores()["sae"].ce_clean.value == pytest.approx(clean[mask].double().mean().item())
