"""Crosscoders and cross-layer transcoders: their loss against the formula written out, and planted ones found again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.saes_kit import one_thread
from torch import Tensor
from torch.nn import functional as F

from sae.pipeline import saes
from sae.pipeline.saes import Clock, Trainable
from sae.pipeline.saes.clt import CLT
from sae.pipeline.saes.jumprelu import jump

WIDTHS, M, B = (5, 8), 12, 16
CLOCK = Clock(5, 10, B)

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def rows(n: int = B, seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> Tensor:
    """Rows of stores whose sizes are far apart, float64."""
    random = torch.Generator().manual_seed(seed)
    parts = [10.0**place * torch.randn(n, d, generator=random, dtype=torch.float64) for place, d in enumerate(widths)]
    return torch.cat(parts, 1) + 1


def made(case: dict[str, Any], d_out: tuple[int, ...] | None = None) -> Trainable:
    aux = {"aux_coefficient": 0.0} if "k" in case else {}
    sae = saes.trainable(saes.parse({"d_sae": M, "b_dec_init": "mean"} | aux | case), WIDTHS, d_out)
    sae.double().initialise(rows(64), None if d_out is None else rows(64, 1, d_out))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    return sae


def gradients(sae: Trainable, loss: Tensor) -> dict[str, Tensor]:
    sae.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}


def expect_alike(sae: Trainable, loss: Tensor, formula: Tensor) -> None:
    torch.testing.assert_close(loss, formula, rtol=1e-10, atol=1e-12)
    mine, its = gradients(sae, loss), gradients(sae, formula)
    assert mine.keys() == its.keys() and len(mine) > 2
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, its[name], rtol=1e-8, atol=1e-10, msg=name)


def scales(sample: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    """The numbers that give each store's rows a mean squared norm of their width."""
    parts = zip(sample.split(widths, 1), widths, strict=True)
    return [(d / part.square().sum(1).mean()).sqrt() for part, d in parts]


# Crosscoders


@pytest.mark.parametrize("case", [{"k": 3}, {"coefficient": 0.3, "warmup": 0}], ids=["batchtopk", "l1"])
def test_a_crosscoder_is_its_formula(case: dict[str, Any]) -> None:
    """sum_l |x_l - x_l'|^2 + c sum_i f_i sum_l |W_dec_i,l| (or the B k largest of those), stores being scaled alike."""
    sae, x = made({"arch": "crosscoder"} | case), rows()
    scaled = [part * scale for part, scale in zip(x.split(WIDTHS, 1), scales(rows(64), WIDTHS), strict=True)]
    encoders, decoders, biases = (value.split(WIDTHS, -1) for value in (sae.W_enc_rows, sae.W_dec, sae.b_dec))
    p = sae.b_enc + sum((y - b) @ w.T for y, b, w in zip(scaled, biases, encoders, strict=True))
    f, norms = p.relu(), sum(torch.linalg.vector_norm(w, dim=1) for w in decoders)
    weighed = f * norms
    if "k" in case:
        f = f * (weighed >= weighed.flatten().topk(3 * B).values[-1])
    error = sum((f @ w + b - y).square().sum(1).mean() for y, b, w in zip(scaled, biases, decoders, strict=True))
    expected = error if "k" in case else error + 0.3 * (f * norms).sum(1).mean()
    losses = sae.loss(x, None, CLOCK)
    expect_alike(sae, losses.total, expected)
    assert losses.l0().float().mean() == pytest.approx((f > 0).sum(1).double().mean().item())


def test_the_way_to_be_sparse_is_what_the_settings_mean() -> None:
    def way(**given: Any) -> str:
        return saes.parse({"arch": "crosscoder", "d_sae": 64} | given).sparsity

    assert [way(), way(k=3), way(target_l0=3.0), way(coefficient=1.0)] == ["batchtopk", "batchtopk", "l1", "l1"]
    layers = [saes.parse({"arch": "clt", "d_sae": 64} | given).sparsity
              for given in ({}, {"k": 3}, {"threshold_start": 5}, {"penalty": "tanh"}, {"target_l0": 3.0})]  # fmt: skip
    assert layers == ["topk", "topk", "batchtopk", "jumprelu", "jumprelu"]
    for given, line in (
        ({"k": 3, "sparsity": "l1"}, r"k: 3 counts for nothing with sparsity: l1; take batchtopk"),
        ({"k": 3, "target_l0": 4.0}, r"target_l0: 4\.0 counts for nothing with sparsity: batchtopk; take l1"),
        ({"decoder_norm": "unit"}, "should be 'free'"),
    ):
        with pytest.raises(ValidationError, match=line):
            way(**given)
    config = saes.parse({"arch": "crosscoder", "target_l0": 3.0})
    assert saes.parse(config.model_dump(mode="json")) == config and {"k", "k_start", "aux_k"} <= config.idle


SHARED, ONLY = 8, 4


def planted(n: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of two stores made of features that both have and of features of one, and those features [F, widths]."""
    fixed, widths = torch.Generator().manual_seed(5), (10, 14)
    parts = [F.normalize(torch.randn(SHARED + 2 * ONLY, d, generator=fixed), dim=1) for d in widths]
    parts[0][SHARED + ONLY :] = 0
    parts[1][SHARED : SHARED + ONLY] = 0
    features = torch.cat([parts[0], 8 * parts[1]], 1)
    chosen = torch.rand(n, len(features), generator=random).topk(2, 1).indices
    sizes = 1 + torch.rand(n, 2, generator=random)
    return torch.zeros(n, len(features)).scatter_(1, chosen, sizes) @ features, features


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"k": 2}, {"coefficient": 0.3}], ids=["batchtopk", "l1"])
def test_a_planted_crosscoder_is_found_shared_and_exclusive_latents_apart(case: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(0)
    x, features = planted(8192, random)
    sae = saes.create(saes.parse({"arch": "crosscoder", "d_sae": 24} | case), (10, 14))
    sae.initialise(x)
    optimiser = torch.optim.Adam(sae.parameters(), lr=4e-3, fused=True)
    for step in range(900):
        losses = sae.loss(x[torch.randint(len(x), (256,), generator=random)], None, Clock(step, 900, 256))
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        sae.track(sae.observe(losses))
    found = sae.eval().formula()
    scale = torch.tensor([1.0] * 10 + [8.0] * 14)
    alike = F.normalize(features / scale, dim=1) @ F.normalize(found.W_dec / scale, dim=1).T
    cosine, which = alike.max(1)
    assert cosine.min() > 0.97
    norms = torch.stack([part.norm(dim=1) for part in (found.W_dec / scale).split((10, 14), 1)], 1)[which]
    share = norms[:, 1] / norms.sum(1)
    assert ((share[:SHARED] - 0.5).abs() < 0.25).all()
    assert (share[SHARED : SHARED + ONLY] < 0.25).all() and (share[SHARED + ONLY :] > 0.75).all()


# Cross-layer transcoders

INTO = (6, 7)


@pytest.mark.parametrize(
    "case", [{"k": 3}, {"coefficient": 0.3, "warmup": 0, "bandwidth": 0.5}], ids=["topk", "jumprelu"]
)
def test_a_cross_layer_transcoder_is_its_formula(case: dict[str, Any]) -> None:
    clt, x, y = made({"arch": "clt"} | case, INTO), rows(), rows(B, 3, INTO)
    out = scales(rows(64, 1, INTO), INTO)
    read = [part * scale for part, scale in zip(x.split(WIDTHS, 1), scales(rows(64), WIDTHS), strict=True)]
    wanted = [part * scale for part, scale in zip(y.split(INTO, 1), out, strict=True)]
    fs, penalty = [], 0.0
    for sae, part in zip(clt.saes, read, strict=True):
        p = part @ sae.W_enc_rows.T + sae.b_enc
        if "k" in case:
            fs.append(p.relu() * (p >= p.topk(3, 1).values[:, -1:]))
        else:
            f, _ = jump(p, sae.threshold, 0.5)
            _, counted = jump(p.detach(), sae.threshold, 0.5)
            fs.append(f)
            penalty = penalty + 0.3 * counted.sum(1).mean()
    first, second = clt.saes
    hats = [fs[0] @ first.W_dec[:, :6], fs[0] @ first.W_dec[:, 6:] + fs[1] @ second.W_dec]
    biases = clt.b_dec.split(INTO)
    error = sum((h + b - w).square().sum(1).mean() for h, b, w in zip(hats, biases, wanted, strict=True))
    losses = clt.loss(x, y, CLOCK)
    expect_alike(clt, losses.total, error + penalty)
    given = torch.cat([(h + b) / s for h, b, s in zip(hats, biases, out, strict=True)], 1)
    torch.testing.assert_close(losses.x_hat, given)
    clt.eval()
    torch.testing.assert_close(clt(x), given)
    assert torch.equal(clt.encode(x).l0(), losses.l0()) and clt.encode(x).dense().shape == (B, 2 * M)
    torch.testing.assert_close(clt.encode(x).dense(), torch.cat(fs, 1))


@pytest.mark.parametrize("sparsity", ["topk", "batchtopk", "jumprelu"])
def test_no_layer_writes_to_an_earlier_one_and_the_layers_add_up(sparsity: str) -> None:
    clt, x = made({"arch": "clt", "sparsity": sparsity} | ({"k": 3} if "topk" in sparsity else {}), INTO), rows()
    assert isinstance(clt, CLT)
    clt.eval()
    later = torch.cat([x[:, :5], x[:, 5:] + 100], 1)
    torch.testing.assert_close(clt(x)[:, :6], clt(later)[:, :6])
    assert not torch.allclose(clt(x)[:, 6:], clt(later)[:, 6:])
    added = clt.constant(B)
    for layer, part in enumerate(x.split(WIDTHS, 1)):
        place, rows_of_layer = clt.written_by(layer, part)
        added[:, place:] += rows_of_layer
    torch.testing.assert_close(added, clt(x))
    norms = clt.decoder_norms()
    assert norms.shape == (2 * M, 2) and (norms[M:, 0] == 0).all() and (norms[:M] > 0).all()
    deep = x.reshape(4, 4, -1)
    torch.testing.assert_close(clt(deep).reshape(B, -1), clt(x))


def test_layers_keep_rows_of_unit_norm_and_count_their_own_dead() -> None:
    clt = made({"arch": "clt", "k": 1, "dead_after": 2 * B}, INTO).float()
    optimiser = torch.optim.Adam(clt.parameters(), lr=1e-2, fused=True)
    fired = torch.zeros(2 * M, dtype=torch.bool)
    for step in range(3):
        x = rows(B, step).float()
        losses = clt.loss(x, rows(B, step + 9, INTO).float(), Clock(step, 3, B))
        optimiser.zero_grad()
        losses.total.backward()
        clt.before_step()
        optimiser.step()
        clt.after_step()
        halves = [clt.observe(losses)]
        clt.track(*halves)
        fired = fired | (halves[0].fired > 0) if step else fired
    for sae in clt.saes:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
    assert torch.equal(clt.dead(Clock(3, 3, B)), ~fired) and 0 < fired.sum() < 2 * M
    grouped = [one for group in clt.parameter_groups() for one in group.parameters]
    assert {id(one) for one in grouped} == {id(one) for one in clt.parameters()} and len(grouped) == len(
        {*map(id, grouped)}
    )


def test_what_is_no_cross_layer_transcoder_is_one_line() -> None:
    for widths, into, line in (
        ((4, 4), None, "these are 2 read and none written; name them in pairs"),
        ((4, 4), (4,), "these are 2 read and 1 written"),
        (4, 4, None),
    ):
        config = saes.parse({"arch": "clt", "d_sae": 8, "k": 2})
        if line is None:
            assert saes.trainable(config, widths, into).d_out == 4
        else:
            with pytest.raises(ValueError, match=line):
                saes.trainable(config, widths, into)
