"""The formulas of a decomposition against slow ones that were written anew: values, and gradients by differences."""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.pipeline.decompose.components import Components, Mask, components_of, lower_leaky, upper_leaky
from sae.pipeline.decompose.losses import (
    Decomposition,
    faithfulness,
    layerwise,
    minimality,
    reconstruction,
    stochastic,
)
from sae.pipeline.language_model.matrices import Product

D, HIDDEN, OUT, C, GATE, ROWS = 3, 4, 2, 5, 3, 7


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_matrices(gate: str = "scalar", seed: int = 0) -> Decomposition:
    """Components of W1 [HIDDEN, D] and W2 [OUT, HIDDEN], in float64, with gates that are neither all on nor all off."""
    random = seeded(seed)
    shapes = {"first": (HIDDEN, D), "second": (OUT, HIDDEN)}
    made = {
        name: Components(torch.randn(*shape, generator=random), C, gate, GATE, random) for name, shape in shapes.items()
    }  # type: ignore[arg-type]
    found = Decomposition(made).double()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random))
    return found


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def importance_of(part: Components, x: np.ndarray, c: int) -> float:
    """What a gate says of one component for one row, one number at a time."""
    w, b, v, s = (one.detach().numpy() for one in part.gates)
    reads = x if part.gate == "vector" else [sum(part.V[i, c].item() * x[i] for i in range(len(x)))]
    hidden = [gelu(sum(r * w[c, i, h] for i, r in enumerate(reads)) + b[c, h]) for h in range(GATE)]
    return float(sum(value * v[c, h] for h, value in enumerate(hidden)) + s[c])


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_importances(gate: str) -> None:
    part = two_matrices(gate).parts["first"]
    x = torch.randn(ROWS, D, generator=seeded(1)).double()
    expected = [[importance_of(part, row, c) for c in range(C)] for row in x.numpy()]
    torch.testing.assert_close(part.importance(x), torch.tensor(expected, dtype=torch.float64))


def test_hard_sigmoids_leak_where_they_would_have_no_slope() -> None:
    x = torch.tensor([-2.0, -0.0, 0.3, 1.0, 3.0], requires_grad=True)
    assert lower_leaky(x).tolist() == pytest.approx([-0.02, 0, 0.3, 1, 1])
    assert upper_leaky(x).tolist() == pytest.approx([0, 0, 0.3, 1, 1.02])
    assert torch.autograd.grad(lower_leaky(x).sum(), x)[0][[0, 2, 4]].tolist() == pytest.approx([0.01, 1, 0])
    assert torch.autograd.grad(upper_leaky(x).sum(), x)[0][[0, 2, 4]].tolist() == pytest.approx([0, 1, 0.01])


def test_a_masked_product_is_a_sum_over_components_and_what_they_leave() -> None:
    part = two_matrices().parts["first"]
    x, m, left = (torch.rand(ROWS, n, generator=seeded(2)).double() for n in (D, C, 1))
    U, V, W = (one.detach().numpy() for one in (part.U, part.V, part.weight))
    for mask, delta in ((Mask(m), False), (Mask(m, left), True)):
        found = part.product(x, mask).detach().numpy()
        for n in range(ROWS):
            expected = sum(m[n, c].item() * (V[:, c] @ x[n].numpy()) * U[c] for c in range(C))
            rest = W - sum(np.outer(U[c], V[:, c]) for c in range(C))
            np.testing.assert_allclose(found[n], expected + (left[n].item() * rest @ x[n].numpy() if delta else 0))


def test_a_transpose_has_the_components_of_the_other_turned_round_and_gates_of_its_own() -> None:
    random, weight = seeded(), torch.randn(HIDDEN, D, generator=seeded(1))
    found = components_of({"in": weight, "out": weight.T}, {"out": "in"}, C, "scalar", GATE, lambda _: random)
    one, other = found["in"], found["out"]
    torch.testing.assert_close(other.sum(), one.sum().T)
    assert {name for name, _ in other.named_parameters()} == {name for name, _ in one.named_parameters()} - {"V", "U"}
    assert not other.gate_in.equal(one.gate_in)
    y, mask = torch.randn(ROWS, HIDDEN, generator=seeded(2)), torch.rand(ROWS, C, generator=seeded(3))
    expected = sum(mask[:, c, None] * (y @ one.U[c])[:, None] * one.V[:, c] for c in range(C))
    torch.testing.assert_close(other.product(y, Mask(mask)), expected)
    faithfulness([one, other]).backward()
    assert one.V.grad is not None
    both, one.V.grad = one.V.grad.clone(), None
    (faithfulness([one])).backward()
    torch.testing.assert_close(both, one.V.grad)  # as a share of twice the squares, twice


def test_masks_lie_between_the_importance_and_one_and_differ_by_row_component_and_matrix() -> None:
    importances = {name: torch.full((4000, C), g) for name, g in (("a", 0.25), ("b", -3.0))}
    masks = stochastic(importances, seeded(), delta=True)
    a, b = masks["a"].components, masks["b"].components
    assert a.min() >= 0.25 and a.max() <= 1 and a.mean().item() == pytest.approx(0.625, abs=0.01)
    assert b.min() >= -0.03 and b.mean().item() == pytest.approx(0.485, abs=0.01)
    assert len(a.flatten().unique()) > 3900 * C and not (a - 0.25).div(0.75).allclose((b + 0.03).div(1.03))
    assert all(mask.delta is not None and mask.delta.shape == (4000, 1) for mask in masks.values())
    assert all(mask.delta is None for mask in stochastic(importances, seeded(), delta=False).values())


def run(x: Tensor, weights: Mapping[str, Tensor], products: Mapping[str, Product]) -> Tensor:
    for i, (name, weight) in enumerate(weights.items()):
        new = products[name](x) if name in products else None
        x = (x @ weight.T if new is None else new).relu() if i == 0 else (x @ weight.T if new is None else new)
    return x


def by_hand(found: Decomposition, x: Tensor, p: float) -> Tensor:
    """The whole loss, written out with products of matrices alone; masks are drawn as `stochastic` draws them."""
    first, second = found.parts["first"], found.parts["second"]
    hidden = (x @ first.weight.T).relu()
    y = hidden @ second.weight.T
    total = ((first.weight - first.U.T @ first.V.T) ** 2).sum() + ((second.weight - second.U.T @ second.V.T) ** 2).sum()
    total = total / ((first.weight**2).sum() + (second.weight**2).sum())
    g = {"first": first.importance(x), "second": second.importance(hidden)}
    random = seeded(5)
    lower = {name: torch.where(one < 0, one / 100, one.clamp(max=1)) for name, one in g.items()}

    def drawn() -> dict[str, tuple[Tensor, Tensor]]:
        made = {}
        for name, one in lower.items():
            r, d = torch.rand(one.shape, generator=random), torch.rand(len(one), 1, generator=random)
            made[name] = one + (1 - one) * r, d
        return made

    def masked(part: Components, row: Tensor, mask: tuple[Tensor, Tensor]) -> Tensor:
        rest = part.weight - part.U.T @ part.V.T
        return torch.einsum("ni,ic,nc,co->no", row, part.V, mask[0], part.U) + mask[1] * (row @ rest.T)

    both = drawn()
    out = masked(second, masked(first, x, both["first"]).relu(), both["second"])
    total = total + ((out - y) ** 2).mean()
    each = drawn()
    one = masked(first, x, each["first"]).relu() @ second.weight.T
    other = masked(second, hidden, each["second"])
    total = total + (((one - y) ** 2).mean() + ((other - y) ** 2).mean()) / 2
    upper = [torch.where(z > 1, 1 + (z - 1) / 100, z.clamp(min=0)) for z in g.values()]
    return total + 0.01 * sum(((z + 1e-12) ** p).sum(1).mean() for z in upper)


@pytest.mark.parametrize("p", [2.0, 0.5])
def test_the_whole_loss_and_its_gradient(p: float) -> None:
    found = two_matrices()
    x = torch.randn(ROWS, D, generator=seeded(4)).double()
    weights = {name: part.weight for name, part in found.parts.items()}
    y = run(x, weights, {})

    def loss() -> Tensor:
        g = found.importances({"first": x, "second": (x @ weights["first"].T).relu()})
        random = seeded(5)

        def divergence(products: Mapping[str, Product]) -> Tensor:
            in_float64 = {
                name: (lambda v, name=name: found.parts[name].product(v, products[name].args[1])) for name in products
            }  # type: ignore[attr-defined]
            return (run(x, weights, in_float64) - y).square().mean()

        total = faithfulness(found.parts.values())
        total = total + reconstruction(found, stochastic(g, random, delta=True), divergence)
        total = total + layerwise(found, stochastic(g, random, delta=True), divergence)
        return total + 0.01 * minimality(g.values(), p)

    torch.testing.assert_close(loss(), by_hand(found, x, p))
    parameters = [*found.parameters()]
    ours = torch.autograd.grad(loss(), parameters)
    theirs = torch.autograd.grad(by_hand(found, x, p), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    step = 1e-6
    for parameter, slope in zip(parameters, ours, strict=True):
        place = int(slope.abs().argmax())
        with torch.no_grad():
            ends = []
            for shift in (-step, 2 * step):
                parameter.view(-1)[place] += shift
                ends.append(loss().item())
            parameter.view(-1)[place] -= step
        assert [(b - a) / (2 * step) for a, b in pairwise(ends)] == pytest.approx(
            [slope.view(-1)[place].item()], rel=1e-4
        )


def test_instances_know_nothing_of_each_other() -> None:
    """Two models side by side have the values and the gradients that each has alone."""
    alone = [Components(torch.randn(HIDDEN, D, generator=seeded(i)), C, "scalar", GATE, seeded(i)) for i in (0, 1)]
    both = Components(torch.stack([one.weight for one in alone]), C, "scalar", GATE, seeded(9))
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            parameter.copy_(torch.stack([dict(one.named_parameters())[name] for one in alone]))
    x = torch.randn(2, ROWS, D, generator=seeded(3))

    def loss(part: Components, rows: Tensor, *, instances: bool) -> Tensor:
        g = part.importance(rows)
        out = part.product(rows, Mask(lower_leaky(g))).square()
        return faithfulness([part]) + out.mean((-2, -1)).sum() + minimality([g], 1.0, instances=instances)

    whole = loss(both, x, instances=True)
    each = [loss(part, rows, instances=False) for part, rows in zip(alone, x, strict=True)]
    torch.testing.assert_close(whole, sum(each))
    whole.backward()
    for one in each:
        one.backward()
    for name, parameter in both.named_parameters():
        grads = [dict(one.named_parameters())[name].grad for one in alone]
        torch.testing.assert_close(
            parameter.grad, torch.stack([g for g in grads if g is not None]), rtol=1e-4, atol=1e-6
        )


def test_rows_that_do_not_count_are_left_out_of_the_penalty() -> None:
    g = torch.rand(2, 3, C, generator=seeded())
    rows = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.cat([g[0, :2], g[1, :1]]).sum(1).mean()
    torch.testing.assert_close(minimality([g], 1.0, rows=rows), expected)
