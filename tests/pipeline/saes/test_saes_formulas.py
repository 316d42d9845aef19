"""Every architecture's formula written out, its exported form, and what it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.saes_kit import CASES, DICTIONARIES, B, D, M, Planted, batches, made, one_thread, settings, train
from torch import Tensor

from sae.pipeline import saes
from sae.pipeline.formats import Metadata, saelens
from sae.pipeline.saes import Clock, encoder
from sae.pipeline.saes.dictionary import Weights

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def by_saelens(tensors: dict[str, Tensor], described: dict[str, Any], x: Tensor) -> Tensor:
    """What SAELens computes from these files, by the rules of its inference classes."""
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
    if described["normalize_activations"] == "layer_norm":
        x = (x - mean) / std
    p = (x - described["apply_b_dec_to_input"] * tensors["b_dec"]) @ tensors["W_enc"] + tensors.get("b_enc", 0)
    match described["architecture"]:
        case "standard":
            f = p.relu()
        case "topk":
            top = p.topk(described["k"], dim=1)
            f = torch.zeros_like(p).scatter(1, top.indices, top.values).relu()
        case "jumprelu":
            f = p.relu() * (p > tensors["threshold"])
        case "gated":
            f = (p + tensors["b_gate"] > 0) * (p * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
    found = f @ tensors["W_dec"] + tensors["b_dec"]
    return found * std + mean if described["normalize_activations"] == "layer_norm" else found


SAELENS = {
    "standard": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "topk": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "jumprelu": {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"},
    "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"},
}
"""The tensors of its classes: it refuses others and misses none."""


@pytest.mark.parametrize("case", [case for case in CASES if case.get("mean") != "identity"], ids=str)
def test_exported_tensors_run_by_saelens_rules(case: dict[str, Any]) -> None:
    sae = made(settings(case))
    train(sae, batches(None, 10), lr=1e-2)
    sae.eval()
    x, (tensors, described) = Planted(seed=5)(), saelens.written(sae.formula(), Metadata())
    assert set(tensors) == SAELENS[described["architecture"]]
    assert all(tensors[name].shape == (M,) for name in {"threshold", "b_gate", "b_mag", "r_mag"} & set(tensors))
    torch.testing.assert_close(by_saelens(tensors, described, x), sae(x), rtol=1e-4, atol=1e-4)


# Each architecture's loss, written out densely and left to autograd

Terms = dict[str, Tensor]


def squared_error(y: Tensor, y_hat: Tensor) -> Tensor:
    return (y - y_hat).square().sum(1).mean()


def before(sae: Any, y: Tensor) -> Tensor:
    centre = sae.b_dec if sae.config.pre_encoder_bias else 0
    weights = acting(sae)
    return (y - centre) @ weights.W_enc_rows.T + weights.b_enc


def spread(y: Tensor) -> Tensor:
    return (y - y.mean(0)).square().sum()


def auxk(sae: Any, p: Tensor, y: Tensor, y_hat: Tensor) -> Tensor:
    e, p_dead = (y - y_hat).detach(), p[:, sae.dead(AT)].relu()
    kept = torch.zeros_like(p_dead).scatter(1, p_dead.topk(5, dim=1).indices, 1.0)
    error = squared_error(e, (p_dead * kept) @ acting(sae).W_dec[sae.dead(AT)])
    share = {"error": 1.0, "variance": spread(y) / spread(e), "none": B / spread(e)}
    return 0.3 * share[sae.config.aux_share] * error


def acting(sae: Any) -> Weights:
    """The weights as they act, written out."""
    g = sae.W_dec.norm(dim=1) if sae.config.decoder_norm == "free" else torch.ones_like(sae.b_enc)
    return Weights(sae.W_enc_rows * g[:, None], sae.b_enc * g, sae.W_dec / g[:, None])


def topk(sae: Any, y: Tensor) -> Terms:
    p = before(sae, y)
    f = (p * torch.zeros_like(p).scatter(1, p.topk(4, dim=1).indices, 1.0)).relu()
    y_hat = f @ acting(sae).W_dec + sae.b_dec
    return {"reconstruction": squared_error(y, y_hat), "auxk": auxk(sae, p, y, y_hat)}


def of_batch(p: Tensor) -> Tensor:
    chosen = p.relu().flatten().topk(4 * B).indices
    return p.relu() * torch.zeros(p.numel(), dtype=p.dtype).index_fill(0, chosen, 1.0).view(p.shape)


def batchtopk(sae: Any, y: Tensor) -> Terms:
    p = before(sae, y)
    y_hat = of_batch(p) @ acting(sae).W_dec + sae.b_dec
    return {"reconstruction": squared_error(y, y_hat), "auxk": auxk(sae, p, y, y_hat)}


def matryoshka(sae: Any, y: Tensor) -> Terms:
    p = before(sae, y)
    f = of_batch(p)
    y_hats = [f[:, :size] @ acting(sae).W_dec[:size] + sae.b_dec for size in (8, 20, M)]
    errors = [squared_error(y, y_hat) for y_hat in y_hats]
    return {
        "reconstruction": errors[2],
        "prefix_8": errors[0],
        "prefix_20": errors[1],
        "auxk": auxk(sae, p, y, y_hats[2]),
    }


def relu(sae: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    f = before(sae, y).relu()
    error = squared_error(y, f @ acting(sae).W_dec + sae.b_dec)
    return f, error / D if sae.config.reduction == "mean_d" else error


def l1(sae: Any, y: Tensor) -> Terms:
    f, error = relu(sae, y)
    sums = {
        "plain": f.sum(1),
        "per_token": f.sum(1) / y.norm(dim=1),
        "decoder_norm": (f * acting(sae).W_dec.norm(dim=1)).sum(1),
    }
    return {"reconstruction": error, "l1": 0.35 * sums[sae.config.penalty].mean()}


def coherence(rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    apart = (unit @ unit.T)[~torch.eye(M, dtype=torch.bool)]
    return D**0.5 / M**2 * apart.abs().atanh().sum()


def jl(sae: Any, y: Tensor) -> Terms:
    _, error = relu(sae, y)
    both = coherence(sae.W_dec) + coherence(sae.W_enc_rows)
    return {"reconstruction": error, "jl": (0.5 + 2 * math.cos(math.pi / 4)) * both}


def hybrid(sae: Any, y: Tensor) -> Terms:
    f, error = relu(sae, y)
    penalty = (f.sum(1) / y.norm(dim=1)).mean()
    return {"reconstruction": error, "l1": 0.35 * penalty, "jl": 0.5 * coherence(acting(sae).W_dec)}


def jumped(p: Tensor, theta: Tensor, eps: float, *, both: bool = False) -> tuple[Tensor, Tensor]:
    """f and H with the gradients the straight-through kernel gives theta (and p, if both), as a term of value 0."""
    kernel = ((p - theta).abs() < eps / 2).double().detach()
    zero = theta - theta.detach()
    if both:
        zero = zero - (p - p.detach())
    step = (p > theta).double()
    return p * step - theta.detach() / eps * kernel * zero, step - kernel / eps * zero


def jumprelu(sae: Any, y: Tensor) -> Terms:
    theta, eps, norms = sae.threshold, sae.config.bandwidth, acting(sae).W_dec.norm(dim=1)
    p = before(sae, y)
    both = sae.config.straight_through == "both"
    f, step = jumped(p, theta, eps, both=both)
    y_hat = f @ acting(sae).W_dec + sae.b_dec
    terms = {"reconstruction": squared_error(y, y_hat)}
    l0 = jumped(p if both else p.detach(), theta, eps, both=both)[1].sum(1).mean()
    if sae.config.penalty == "tanh":
        terms["tanh"] = 0.35 * (4 * f * norms).tanh().sum(1).mean()
    else:
        target = sae.config.target_l0 if sae.config.penalty == "l0_target" else None
        value = l0 if target is None else (l0 / target - 1).square() * spread(y) / B
        terms[sae.config.penalty] = 0.35 * value
    if sae.config.pre_act_coefficient:
        below = (theta - p).relu() * norms
        terms["pre_act"] = sae.config.pre_act_coefficient * below[:, sae.dead(AT)].sum(1).mean()
    if sae.config.aux_coefficient:
        terms["auxk"] = auxk(sae, p, y, y_hat)
    assert step.sum() > 0
    return terms


def gated(sae: Any, y: Tensor) -> Terms:
    weights = acting(sae)
    q = (y - sae.b_dec) @ weights.W_enc_rows.T
    pi = q + weights.b_enc
    f = (pi > 0) * (q * sae.r_mag.exp() + sae.b_mag).relu()
    fixed, share = weights.W_dec.detach(), 1 - 5 / 30 if sae.config.gate_to_decoder == 0.3 else 0
    gate = pi.relu() @ (fixed + share * (weights.W_dec - fixed)) + sae.b_dec.detach()
    return {
        "reconstruction": squared_error(y, f @ weights.W_dec + sae.b_dec),
        "l1": 0.35 * pi.relu().sum(1).mean(),
        "gate": squared_error(y, gate),
    }


def p_anneal(sae: Any, y: Tensor) -> Terms:
    f, error = relu(sae, y)
    return {"reconstruction": error, "lp": 0.35 * 3 * ((f + 1e-3) ** 0.6 - 1e-3**0.6).sum(1).mean()}


def shifted_relu(sae: Any, y: Tensor) -> Terms:
    f = (before(sae, y) - sae.shift).relu()
    return {"reconstruction": squared_error(y, f @ acting(sae).W_dec + sae.b_dec)}


def ghosts(sae: Any, y: Tensor) -> Terms:
    terms = l1(sae, y)
    e = (y - before(sae, y).relu() @ acting(sae).W_dec - sae.b_dec).detach()
    g = before(sae, y)[:, sae.dead(AT)].clamp_max(20).exp() @ acting(sae).W_dec[sae.dead(AT)]
    g = g * (e.norm(dim=1, keepdim=True) / (2 * g.norm(dim=1, keepdim=True) + 1e-6)).detach()
    error = (g - e).square().mean()
    return {**terms, "ghosts": error * (terms["reconstruction"] / error).detach()}


def variational(kl: Any, sae: Any, y: Tensor) -> Terms:
    """With the noise that it draws; `kl` of means and variances, row by row."""
    mu = before(sae, y).relu()
    if sae.config.k is not None:
        mu = mu * torch.zeros_like(mu).scatter(1, mu.topk(sae.config.k, dim=1).indices, 1.0)
    logvar = (y - sae.b_dec) @ sae.W_logvar.T + sae.b_logvar
    if sae.config.k is not None:
        logvar = logvar * (mu != 0)
    noise = sae.noise(B, sae.d_sae, AT, y) * (1.0 if sae.config.k is None else (mu != 0))
    z = mu + (0.5 * logvar).exp() * noise
    terms = {"reconstruction": squared_error(y, z @ acting(sae).W_dec + sae.b_dec)}
    terms["kl"] = 0.1 * (kl(sae, mu, logvar.exp()) - 0.5 * (1 + logvar).sum(1)).mean()
    return terms | ({"l1": 0.35 * mu.sum(1).mean()} if sae.config.coefficient else {})


def vsae_iso(sae: Any, y: Tensor) -> Terms:
    return variational(lambda _, mu, var: 0.5 * (mu**2 + var).sum(1), sae, y)


def vsae_mix(sae: Any, y: Tensor) -> Terms:
    """One pair of each kind."""

    def kl(_: Any, mu: Tensor, var: Tensor) -> Tensor:
        def there(pair: int, *at: float) -> Tensor:
            two = slice(2 * pair, 2 * pair + 2)
            far = (mu[:, two] - torch.tensor(at)) ** 2 + var[:, two]
            return (-far / (2 * 0.5**2) - math.log(0.5)).sum(1).exp()

        def away(pair: int) -> Tensor:
            return 0.8 * (-0.5 * (mu**2 + var)[:, 2 * pair : 2 * pair + 2].sum(1)).exp()

        first = (0.2 * there(0, 2.0, 2.0) + away(0)).log()
        second = (0.1 * there(1, 2.0, 0.0) + 0.1 * there(1, 0.0, 2.0) + away(1)).log()
        return 0.5 * (mu**2 + var)[:, 4:].sum(1) - first - second

    return variational(kl, sae, y)


def vsae_multi(sae: Any, y: Tensor) -> Terms:
    sigma = torch.full((M, M), 0.3, dtype=torch.float64).fill_diagonal_(1)

    def kl(_: Any, mu: Tensor, var: Tensor) -> Tensor:
        inverse = sigma.inverse()
        return 0.5 * ((mu @ inverse * mu).sum(1) + var @ inverse.diagonal() + sigma.logdet())

    return variational(kl, sae, y)


AT = Clock(5, 100, B)

AUXK: dict[str, Any] = {"aux_k": 5, "aux_coefficient": 0.3}

HALFWAY: dict[str, Any] = {"coefficient": 0.7, "warmup": 10}
"""At step 5 the coefficient is 0.35."""

KL: dict[str, Any] = {"kl_coefficient": 0.2, "kl_warmup": 10}

FORMULAS: list[tuple[Any, dict[str, Any]]] = [
    (topk, {"arch": "topk", **AUXK}),
    (topk, {"arch": "topk", "decoder_norm": "free", "init": "april", **AUXK}),
    (topk, {"arch": "topk", **AUXK, "aux_share": "variance"}),
    (topk, {"arch": "topk", **AUXK, "aux_share": "none"}),
    (batchtopk, {"arch": "batchtopk", **AUXK}),
    (batchtopk, {"arch": "batchtopk", "decoder_norm": "free", **AUXK}),
    (matryoshka, {"arch": "matryoshka", "decoder_norm": "free", **AUXK}),
    (l1, {"arch": "l1", "penalty": "plain", **HALFWAY}),
    (l1, {"arch": "l1", "penalty": "per_token", **HALFWAY}),
    (l1, {"arch": "l1", "penalty": "decoder_norm", **HALFWAY}),
    (l1, {"arch": "l1", "penalty": "decoder_norm", "decoder_norm": "free", **HALFWAY}),
    (ghosts, {"arch": "l1", "ghost_grads": True, **HALFWAY}),
    (
        jl,
        {
            "arch": "jl",
            "jl_on": "both",
            "jl_coefficient": 0.5,
            "jl_start": 2.5,
            "jl_warmup": 10,
            "decoder_norm": "none",
        },
    ),
    (hybrid, {"arch": "hybrid", "jl_coefficient": 0.5, "jl_warmup": 0, **HALFWAY}),
    (jumprelu, {"arch": "jumprelu", "theta_init": 0.3, "bandwidth": 0.4, **AUXK, **HALFWAY}),
    (
        jumprelu,
        {"arch": "jumprelu", "theta_init": 0.3, "bandwidth": 0.4, "straight_through": "both", "aux_coefficient": 0}
        | HALFWAY,
    ),
    (
        jumprelu,
        {"arch": "jumprelu", "penalty": "l0_target", "target_l0": 3.0, "pre_act_coefficient": 0.2, **AUXK} | HALFWAY,
    ),
    (jumprelu, {"arch": "jumprelu", "penalty": "tanh", "decoder_norm": "free", "bandwidth": 0.4, **AUXK, **HALFWAY}),
    (gated, {"arch": "gated", **HALFWAY}),
    (gated, {"arch": "gated", "decoder_norm": "unit", **HALFWAY}),
    (gated, {"arch": "gated", "gate_to_decoder": 0, **HALFWAY}),
    (p_anneal, {"arch": "p_anneal", "anneal_start": 1, "stages": 1, "p_end": 0.6, **HALFWAY}),
    (shifted_relu, {"arch": "shifted_relu"}),
    (vsae_iso, {"arch": "vsae_iso", **KL}),
    (vsae_iso, {"arch": "vsae_iso", "k": 4, "decoder_norm": "free", **KL, **HALFWAY}),
    (
        vsae_mix,
        {
            "arch": "vsae_mix",
            "correlated_pairs": 1,
            "prior_shift": 2.0,
            "prior_std": 0.5,
            "presence": 0.2,
            **KL,
        },
    ),
    (vsae_multi, {"arch": "vsae_multi", "correlation": 0.3, **KL}),
]


def by_its_formula(formula: Any, case: dict[str, Any]) -> tuple[tuple[Terms, Any], tuple[Terms, Any]]:
    """(terms, gradients) of the dictionary and of the formula, in float64, with dead latents and uneven parameters."""
    sae = made(settings({"dead_after": 10, **case})).double()
    sae.rows_since_fired[:9] = 10
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not (name == "W_dec" and sae.config.decoder_norm == "unit"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
        if case["arch"] == "p_anneal":
            sae.factor.fill_(3)
    x, parameters = Planted(seed=2)().double(), list(sae.parameters())
    terms = sae.loss(x, clock=AT).terms
    expected = formula(sae, x * sae.scale)
    found = torch.autograd.grad(sum(terms.values()), parameters)
    return (terms, found), (expected, torch.autograd.grad(sum(expected.values()), parameters))


@pytest.mark.parametrize(("formula", "case"), FORMULAS, ids=lambda value: str(value) if isinstance(value, dict) else "")
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_the_loss_and_its_gradients_are_the_formulas(
    formula: Any, case: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "SPARSE_BELOW", 1 if way == "sparse" else -1)
    found, expected = by_its_formula(formula, case)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_every_architecture_has_a_formula() -> None:
    """That of several stores is in test_crosscoder.py."""
    assert {case["arch"] for _, case in FORMULAS} == {*DICTIONARIES} - {"crosscoder"}


@pytest.mark.parametrize("reduction", ["sum_d", "mean_d", "fvu"])
def test_reductions(reduction: str) -> None:
    sae = made(settings({"arch": "topk", "reduction": reduction}))
    y, y_hat = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
    total = (y - y_hat).square().sum()
    expected = {"sum_d": total / B, "mean_d": total / (B * D), "fvu": total / (y - y.mean(0)).square().sum()}
    torch.testing.assert_close(sae.squared_error(y_hat, y), expected[reduction])


# What they are for


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
    for coefficient in (0.0, 1.0):
        rows = Planted(features=64)
        case = {"arch": "topk", "aux_coefficient": coefficient, "dead_after": 2 * B, "encoder_scale": 1}
        sae = saes.create(settings(case), D)
        sae.initialise(rows(512))
        with torch.no_grad():
            sae.b_enc[:half] = -3
        history = train(sae, ((rows(), None) for _ in range(60)), lr=1e-2)
        alive[coefficient] = int((sae.encode(rows(512)).fired()[:half] > 0).sum())
        aux = [losses.terms["auxk"].item() for losses in history if "auxk" in losses.terms]
        assert all(value == 0 for value in aux[:2])
        assert any(value > 0 for value in aux) == (coefficient > 0)
    assert alive[0.0] <= half // 4 and alive[1.0] >= half // 2
