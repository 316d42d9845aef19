"""TopK and L1: their formulas written out, their exported form, and what they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saes_kit import CASES, B, D, M, Planted, batches, made, one_thread, settings, train
from torch import Tensor

from pipeline import saes
from pipeline.saes import Clock

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def saelens_encode(tensors: dict[str, Tensor], described: dict[str, Any], x: Tensor) -> Tensor:
    p = (x - described["apply_b_dec_to_input"] * tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    if described["architecture"] == "topk":
        top = p.topk(described["k"], dim=1)
        p = torch.zeros_like(p).scatter(1, top.indices, top.values)
    return p.relu()


@pytest.mark.parametrize("case", [case for case in CASES if case["arch"] in ("topk", "l1")], ids=str)
def test_exported_tensors_run_by_saelens_rules(case: dict[str, Any]) -> None:
    sae = made(settings(case))
    train(sae, batches(None, 10), lr=1e-2)
    x, tensors = Planted(seed=5)(), sae.export_tensors()
    found = saelens_encode(tensors, sae.saelens_config(), x) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(found, sae(x), rtol=1e-4, atol=1e-4)


def test_topk_by_its_formula() -> None:
    """Reconstruction and AuxK written out densely: their values and all gradients, in float64."""
    sae = made(settings({"arch": "topk", "aux_k": 5, "dead_after": 10})).double()
    sae.rows_since_fired[:9] = 10
    x = Planted(seed=2)().double()
    losses = sae.loss(x)

    y = x * sae.scale
    p = (y - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc
    kept = torch.zeros_like(p).scatter(1, p.topk(4, dim=1).indices, 1.0)
    y_hat = (p * kept).relu() @ sae.W_dec + sae.b_dec
    e = (y - y_hat).detach()
    p_dead = p[:, :9].relu()
    kept = torch.zeros_like(p_dead).scatter(1, p_dead.topk(5, dim=1).indices, 1.0)
    auxk = (e - (p_dead * kept) @ sae.W_dec[:9]).square().sum() / (e - e.mean(0)).square().sum()
    expected = {"reconstruction": (y - y_hat).square().sum(1).mean(), "auxk": auxk / 32}

    torch.testing.assert_close(losses.terms, expected)
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(losses.total, parameters), torch.autograd.grad(sum(expected.values()), parameters)
    )


@pytest.mark.parametrize(
    ("penalty", "norm"), [("plain", "unit"), ("per_token", "unit"), ("decoder_norm", "unit"), ("decoder_norm", "free")]
)
def test_l1_by_its_formula(penalty: str, norm: str) -> None:
    case = {"arch": "l1", "penalty": penalty, "decoder_norm": norm, "coefficient": 0.7, "warmup": 10}
    sae = made(settings(case)).double()
    with torch.no_grad():
        sae.W_dec *= 1.0 if norm == "unit" else 1.7
    x = Planted(seed=2)().double()
    losses = sae.loss(x, clock=Clock(5, 100))

    y = x * sae.scale
    f = ((y - sae.b_dec) @ sae.W_enc_rows.T + sae.b_enc).relu()
    y_hat = f @ sae.W_dec + sae.b_dec
    sums = {
        "plain": f.sum(1),
        "per_token": f.sum(1) / y.norm(dim=1),
        "decoder_norm": (f * sae.W_dec.norm(dim=1)).sum(1),
    }
    expected = {"reconstruction": (y - y_hat).square().sum(1).mean(), "l1": 0.35 * sums[penalty].mean()}

    torch.testing.assert_close(losses.terms, expected)
    parameters = list(sae.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(losses.total, parameters), torch.autograd.grad(sum(expected.values()), parameters)
    )


@pytest.mark.parametrize("reduction", ["sum_d", "mean_d", "fvu"])
def test_reductions(reduction: str) -> None:
    sae = made(settings({"arch": "topk", "reduction": reduction}))
    y, y_hat = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
    total = (y - y_hat).square().sum()
    expected = {"sum_d": total / B, "mean_d": total / (B * D), "fvu": total / (y - y.mean(0)).square().sum()}
    torch.testing.assert_close(sae.squared_error(y_hat, y), expected[reduction])


# What TopK is for


def test_topk_recovers_a_planted_dictionary() -> None:
    rows = Planted(width=16, features=24, active=2)
    sae = saes.create(saes.parse({"arch": "topk", "d_sae": 32, "k": 2, "dead_after": 5000}), 16)
    sae.initialise(rows(2048))
    train(sae, ((rows(128), None) for _ in range(250)), lr=1e-2)
    cosines = (sae.W_dec @ rows.features.T).amax(0)
    assert (cosines > 0.95).float().mean() > 0.9
    x = rows(1024)
    assert (x - sae(x)).square().sum() < 0.1 * (x - x.mean(0)).square().sum()


def test_auxk_revives_planted_dead_latents() -> None:
    half, alive = M // 2, {}
    for coefficient in (0.0, 1 / 32):
        rows = Planted(features=64)
        sae = saes.create(settings({"arch": "topk", "aux_coefficient": coefficient, "dead_after": 2 * B}), D)
        sae.initialise(rows(512))
        with torch.no_grad():
            sae.b_enc[:half] = -3
        history = train(sae, ((rows(), None) for _ in range(60)), lr=1e-2)
        alive[coefficient] = int((sae.encode(rows(512)).fired()[:half] > 0).sum())
        aux = [losses.terms["auxk"].item() for losses in history if "auxk" in losses.terms]
        assert all(value == 0 for value in aux[:2])
        assert any(value > 0 for value in aux) == (coefficient > 0)
    assert alive[0.0] <= half // 4 and alive[1 / 32] >= half // 2
