"""MOLT: norms and losses against formulas written out, a planted mixture, the collapse and what is done about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.saes_kit import B, D, batches, one_thread, small
from torch import Tensor

from sae.pipeline import saes
from sae.pipeline.saes import Clock, molt
from sae.pipeline.saes.molt import MOLT

single = pytest.fixture(autouse=True, scope="module")(one_thread)
OUT = 7


def made(d_out: int | None = OUT, **case: Any) -> MOLT:
    found = saes.trainable(small({"arch": "molt", **case}), D, d_out)
    assert isinstance(found, MOLT)
    found.initialise(*next(batches(d_out, 1)))
    return found


def matrices(it: MOLT) -> list[Tensor]:
    """U_t V_t [d_out, d_in], formed."""
    return [U.T @ V for V, U in zip(it.V.split([*it.ranks]), it.U.split([*it.ranks]), strict=True)]


@pytest.mark.parametrize("d", [768, 64, 10, 3])
def test_ranks_follow_the_width(d: int) -> None:
    it = saes.trainable(saes.parse({"arch": "molt"}), d)
    assert isinstance(it, MOLT) and it.width == 31
    ranks = [max(1, round(d / 3 / 2**i)) for i in range(5)]
    assert it.groups == list(zip(ranks, (1, 2, 4, 8, 16), strict=True))
    assert len(it.V) == sum(rank * count for rank, count in it.groups) == int(it.ranks.sum())
    published = saes.trainable(saes.parse({"arch": "molt", "ranks": (3, 2, 1), "counts": (2, 4, 8)}), d)
    assert sum(p.numel() for p in published.parameters()) == 2 * d * 22 + 14 * (d + 2) + d


def test_norms_are_those_of_the_matrices_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    it = made()
    with torch.no_grad():
        it.U.mul_(torch.rand_like(it.U) + 0.5)
    dense = torch.stack([torch.linalg.matrix_norm(one) for one in matrices(it)])
    torch.testing.assert_close(it.norms(), dense)
    gradients = torch.autograd.grad(it.norms().sum(), (it.U, it.V))
    expected = torch.autograd.grad(
        torch.stack([torch.linalg.matrix_norm(one) for one in matrices(it)]).sum(), (it.U, it.V)
    )
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)
    it.after_step()
    torch.testing.assert_close(it.norms(), torch.full((5,), OUT**0.5))
    it.loss(*next(batches(OUT, 1))).total.backward()
    it.before_step()
    assert it.U.grad is not None and it.V.grad is not None
    for step in (1e-4, -1e-4):  # a step along what is left of the gradient changes no norm, to first order
        with torch.no_grad():
            moved = [
                torch.linalg.matrix_norm((U + step * gU).T @ (V + step * gV))
                for U, V, gU, gV in zip(
                    *(t.split([*it.ranks]) for t in (it.U, it.V, it.U.grad, it.V.grad)), strict=True
                )
            ]
        assert (torch.stack(moved) - OUT**0.5).abs().max() < 1e-4


@pytest.mark.parametrize("gate", ["jumprelu", "relu"])
@pytest.mark.parametrize("penalty", ["tanh", "l1"])
@pytest.mark.parametrize("below", [-1.0, 2.0], ids=["at once", "one by one"])
def test_the_loss_and_its_gradients_are_the_formulas(
    gate: str, penalty: str, below: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(molt, "SPARSE_BELOW", below)
    it = made(gate=gate, penalty=penalty, coefficient=0.7, warmup=0, dead_after=10)
    with torch.no_grad():
        it.b_gate.sub_(0.4)
        it.rows_since_fired[1] = 100
    x, y = next(batches(OUT, 1))
    assert y is not None
    losses = it.loss(x, y, Clock(3, 10, B))
    z = (x - it.centre) * it.scale
    p = z @ it.gates.T + it.b_gate
    phi = p.relu() if gate == "relu" else p * (p > it.threshold)
    contributions = torch.stack([(z @ one.T) for one in matrices(it)], dim=1)
    y_hat = (phi[:, :, None] * contributions).sum(1) + it.b_dec
    reconstruction = (y_hat - y * it.target_scale).square().sum(1).mean()
    u = phi * torch.stack([torch.linalg.matrix_norm(one) for one in matrices(it)]).detach() / OUT**0.5
    penalised = (it.config.tanh_scale * u).tanh() if penalty == "tanh" else u
    residual = (y * it.target_scale - y_hat).detach()
    aux = (F.softplus(p[:, 1, None]) * contributions[:, 1] - residual).square().sum(1).mean()
    total = reconstruction + 0.7 * penalised.sum(1).mean() + it.config.aux_coefficient * aux
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(losses.x_hat, y_hat / it.target_scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(it(x), losses.x_hat, rtol=1e-4, atol=1e-4)
    losses.total.backward()
    smooth = [name for name, _ in it.named_parameters() if name != "threshold"]
    for name, expected in zip(smooth, torch.autograd.grad(total, [it.get_parameter(n) for n in smooth]), strict=True):
        torch.testing.assert_close(it.get_parameter(name).grad, expected, rtol=1e-3, atol=1e-4)
    if gate == "jumprelu" and penalty == "l1":  # -(theta / eps) K((p - theta) / eps) times what phi gets
        q = phi.detach().requires_grad_()
        again = (q[:, :, None] * contributions.detach()).sum(1) + it.b_dec.detach() - y * it.target_scale
        (by_phi,) = torch.autograd.grad(again.square().sum(1).mean() + 0.7 * q.sum(1).mean(), q)
        kernel = ((p - it.threshold).abs() < it.config.bandwidth / 2).float()
        expected = (-(it.threshold / it.config.bandwidth) * kernel * by_phi).sum(0).detach()
        torch.testing.assert_close(it.threshold.grad, expected, rtol=1e-3, atol=1e-4)
        assert expected.any()


def test_going_one_by_one_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    it, x = made(), next(batches(OUT, 1))[0]
    found = []
    for below in (-1.0, 2.0):
        monkeypatch.setattr(molt, "SPARSE_BELOW", below)
        found.append(it(x))
    torch.testing.assert_close(*found)
    codes = it.encode(x)
    torch.testing.assert_close(it.decode(codes.edited(codes.dense())), it(x))
    assert torch.equal(it.decode(codes.edited(torch.zeros(B, 5))), (it.b_dec / it.target_scale).expand(B, OUT))


class Mixture:
    """Rows, and what a few linear maps make of them, each where its gate is open: half of the rows have none."""

    def __init__(self, d: int = 8, transforms: int = 3, rank: int = 2) -> None:
        random = torch.Generator().manual_seed(1)
        self.gates = torch.linalg.qr(torch.randn(d, transforms, generator=random)).Q.T
        self.maps = torch.randn(transforms, d, rank, generator=random) @ torch.randn(
            transforms, rank, d, generator=random
        )

    def __call__(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, self.gates.shape[1], generator=torch.Generator().manual_seed(seed))
        p = x @ self.gates.T
        return x, torch.einsum("bt,bi,tio->bo", p * (p > 0.8), x, self.maps)


def fit(data: Mixture, steps: int = 500, lr: float = 1e-2, **case: Any) -> MOLT:
    config = {"arch": "molt", "ranks": (2,), "counts": (5,), "target_l0": 0.65, "dead_after": 5000, **case}
    it = saes.trainable(saes.parse(config), data.gates.shape[1], data.gates.shape[1])
    assert isinstance(it, MOLT)
    it.initialise(*data(4096, 10**6))
    optimiser = torch.optim.Adam(it.parameters(), lr=lr)
    for step in range(steps):
        losses = it.loss(*data(256, step), Clock(step, steps, 256))
        optimiser.zero_grad()
        losses.total.backward()
        it.before_step()
        optimiser.param_groups[0]["lr"] = lr * min(1, 3 * (steps - step) / steps)
        optimiser.step()
        it.after_step()
        it.track(it.observe(losses))
    return it


@pytest.mark.slow
@torch.no_grad()
def test_a_planted_mixture_is_recovered() -> None:
    data = Mixture()
    with torch.enable_grad():
        it = fit(data, steps=1000)
    x, y = data(4096, 10**7)
    codes = it.encode(x)
    assert codes.l0().float().mean().item() == pytest.approx(0.65, rel=0.2)
    assert ((it.decode(codes) - y).square().sum() / (y - y.mean(0)).square().sum()).item() < 0.05
    learned = torch.stack([one.T.flatten() / it.scale.repeat_interleave(it.d_out) for one in matrices(it)])
    alike = F.normalize(learned, dim=1) @ F.normalize(data.maps.flatten(1), dim=1).T
    assert alike.abs().amax(0).min() > 0.95
    gates = F.normalize(it.gates * it.scale, dim=1) @ data.gates.T
    assert gates.amax(0).min() > 0.95


@pytest.mark.slow
def test_without_its_remedies_it_collapses() -> None:
    """Gates that start shut, a strong penalty from the first step on, and nothing for what is dead: one is left. Where
    those that are dead go on learning, or the penalty is steered, more are.
    """
    data = Mixture()
    bare: dict[str, Any] = {"coefficient": 8.0, "warmup": 0, "gate_start": -1.5, "aux_coefficient": 0.0}
    bare |= {"target_l0": None}

    def alive(**case: Any) -> int:
        return int((fit(data, steps=250, **case).encode(data(4096, 10**7)[0]).fired() > 40).sum())

    assert alive(**bare) <= 1
    assert alive(**bare | {"aux_coefficient": 1.0, "warmup": 0.5}) >= 3
    assert alive() >= 3


@pytest.mark.slow
def test_l0_falls_as_the_coefficient_rises() -> None:
    data = Mixture()
    found = [
        fit(data, steps=150, coefficient=c, target_l0=None).encode(data(2048, 5)[0]).l0().float().mean().item()
        for c in (0.1, 2.0)
    ]
    assert found[1] < 0.6 * found[0]


def test_what_does_not_go_together_is_refused() -> None:
    for said, names in (
        ({"ranks": (3, 2), "counts": (1,)}, "ranks: 2 of them, but counts: 1"),
        ({"ranks": (2.5,), "counts": (1,)}, "ranks are whole, or shares below 1"),
        ({"ranks": (2,), "counts": (0,)}, "counts are 1 or more"),
        ({"target_l0": 31}, "target_l0: 31 of 31 transforms leaves nothing to choose"),
        ({"target_l0": 3.0, "coefficient": 0}, "coefficient: 0 stays 0"),
    ):
        with pytest.raises(ValueError, match=names):
            saes.parse({"arch": "molt", **said})
    with pytest.raises(ValueError, match="ranks: 13 is more than the 7 dimensions there are"):
        saes.trainable(saes.parse({"arch": "molt", "ranks": (13,), "counts": (8,)}), 20, 7)
