"""A step on a device that runs ahead: it never waits, and computes what the host's own way computes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.saes_kit import CASES, DICTIONARIES, D, batches, one_thread, small
from support.watching import watched
from torch import Tensor

from sae.cache.device import landing
from sae.pipeline import saes
from sae.pipeline.saes import SAE, Clock, Losses, Trainable, auxk, placement
from sae.pipeline.saes.encoder import Preactivations

single = pytest.fixture(autouse=True, scope="module")(one_thread)
FURTHER: list[dict[str, Any]] = [
    {"arch": "l1", "decoder_norm": "none", "ghost_grads": True},
    {"arch": "jumprelu", "pre_act_coefficient": 3e-3},
    {"arch": "topk", "aux_share": "variance"},
    {"arch": "vae"},
    {"arch": "nvae"},
    {"arch": "fsq"},
    {"arch": "molt"},
    {"arch": "clt"},
    {"arch": "clt", "sparsity": "jumprelu"},
]
STEPS = [{"arch": tag} for tag in DICTIONARIES] + FURTHER
CLOCK = Clock(60, 100, 64)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device that runs ahead."""
    monkeypatch.setattr(placement, "HOSTS", set())


def made(case: dict[str, Any]) -> tuple[Trainable, Tensor, Tensor | None]:
    """Something to train with a third of its latents dead, a batch and its targets."""
    several = case["arch"] == "clt"
    x, y = next(batches(D if several else None, 1))
    it = saes.trainable(small(case), (5, 7) if several else D, (5, 7) if several else None)
    it.initialise(x, y)
    for name, buffer in it.named_buffers():
        if name.endswith("rows_since_fired"):
            buffer[::3] = 10**9
    return it, x, y


def step(it: Trainable, x: Tensor, y: Tensor | None, optimiser: torch.optim.Optimizer) -> Losses:
    losses = it.loss(x, y, CLOCK)
    optimiser.zero_grad()
    losses.total.backward()
    it.before_step()
    optimiser.step()
    it.after_step()
    it.track(it.observe(losses))
    return losses


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_does_not_wait(case: dict[str, Any]) -> None:
    it, x, y = made(case)
    optimiser = torch.optim.Adam(it.parameters(), fused=True)
    step(it, x, y, optimiser)
    assert watched(lambda: step(it, x, y, optimiser)).waited == []


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_device_without_numbers_can_take_it(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's device without numbers refuses what needs one, whatever its name; and nothing is copied to it."""
    monkeypatch.setattr(landing, "moved", lambda x, device: torch.empty_like(x, device=device))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know the device
    it, x, y = made(case)
    it, x, y = it.to("meta"), x.to("meta"), None if y is None else y.to("meta")
    optimiser = torch.optim.SGD(it.parameters())
    monkeypatch.setattr(Trainable, "noise", lambda self, rows, width, clock, like: like.new_empty(rows, width))
    assert watched(lambda: step(it, x, y, optimiser), "meta").waited == []


def test_what_waits_is_seen() -> None:
    x = torch.rand(4, 3)
    for waiting in (
        lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool((x > 2).any()), lambda: x[x > 0.5],
        lambda: torch.arange(3).repeat_interleave(torch.ones(3, dtype=torch.int64)), lambda: x.new_tensor([1.0]),
    ):  # fmt: skip
        assert watched(waiting).waited
    assert watched(lambda: x.to("meta"), "meta").waited and not watched(lambda: x.relu().sum()).waited


@pytest.mark.parametrize("case", [*CASES, *FURTHER], ids=str)
def test_it_is_the_same_function(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    it, x, y = made(case)
    other = copy.deepcopy(it)
    here = it.loss(x, y, CLOCK)
    here.total.backward()
    it.track(it.observe(here))
    monkeypatch.setattr(placement, "HOSTS", set())
    there = other.loss(x, y, CLOCK)
    there.total.backward()
    other.track(other.observe(there))
    torch.testing.assert_close(there.terms, here.terms, atol=1e-5, rtol=1e-5)
    for name, parameter in it.named_parameters():
        grad = other.get_parameter(name).grad
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert grad is not None
        torch.testing.assert_close(grad, wanted, atol=2e-5, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}")
    torch.testing.assert_close(dict(other.named_buffers()), dict(it.named_buffers()), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("case", [{"arch": "topk"}, {"arch": "molt"}, {"arch": "l1", "ghost_grads": True}], ids=str)
def test_without_dead_latents_nothing_is_asked_of_them(case: dict[str, Any]) -> None:
    it, x, y = made(case)
    for name, buffer in it.named_buffers():
        if name.endswith("rows_since_fired"):
            buffer.zero_()
    losses = it.loss(x, y, CLOCK)
    name = {"topk": "auxk", "molt": "aux", "l1": "ghosts"}[case["arch"]]
    assert losses.terms[name].item() == 0
    found = torch.autograd.grad(losses.terms[name], [*it.parameters()], allow_unused=True)
    assert not any(grad.any() for grad in found if grad is not None)


def test_steps_before_which_no_latent_can_be_dead_are_known() -> None:
    it = made({"arch": "topk", "dead_after": 300})[0]
    assert isinstance(it, SAE)
    it.rows_since_fired.fill_(0)
    it.rows_since_fired[3] = 100
    clock = Clock(10, 1000, 64)
    assert not it.none_dead(clock)
    it.look_ahead(clock)  # 100 rows after step 10, 292 before step 14, 356 before step 15
    it.rows_since_fired += 3 * 64
    assert it.none_dead(clock._replace(step=14)) and not it.dead(clock).any()
    it.rows_since_fired += 64
    assert not it.none_dead(clock._replace(step=15)) and it.dead(clock).any()
    it.look_ahead(clock._replace(step=14))
    assert not it.none_dead(clock._replace(step=15))


def test_many_dead_latents_have_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 dead ones 8 at a step, and over the steps all; where there is room for all, they are what the host has."""
    m, dead = 40, torch.arange(40) % 4 > 0
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((64, 6), (m, 6), (m,)))
    pre, table = Preactivations(x, torch.zeros(6), weight, bias), torch.eye(m)  # e_hat says which latents explain
    seen = torch.zeros(m, dtype=torch.bool)
    monkeypatch.setattr(auxk, "AHEAD_UP_TO", 1)
    for number in range(10):
        e_hat = auxk.explained_ahead(pre, dead, 8, table, Clock(number, 10, 64))
        used = (e_hat > 0).any(0)
        assert used.sum() <= 8 and not (used & ~dead).any()
        seen |= used
    assert torch.equal(seen, dead)
    monkeypatch.setattr(auxk, "AHEAD_UP_TO", 20)
    torch.testing.assert_close(
        auxk.explained_ahead(pre, dead, 2, table, Clock(3, 10, 64)),
        auxk.explained(pre, dead.nonzero().view(-1), 2, table),
    )


def test_values_of_products_in_tf32_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 4), torch.randn(9, 4)
    pre = Preactivations(x, torch.zeros(4), weight, torch.zeros(9))
    chosen = pre.topk(2)
    assert chosen.entries is not None
    off = chosen.values.reshape(-1) + 1  # as a rounded product would be, and more so
    assert torch.equal(pre.gather(chosen.entries, off), off)
    monkeypatch.setattr(placement, "rounds", lambda x: True)
    torch.testing.assert_close(pre.gather(chosen.entries, off), chosen.values.reshape(-1))


def test_a_batch_of_few_positive_ones_keeps_what_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "HOSTS", set())
    x, weight, bias = torch.randn(5, 4), torch.randn(9, 4), torch.full((9,), -3.0)
    found = Preactivations(x, torch.zeros(4), weight, bias).batch_topk(20)
    p = x @ weight.T + bias
    assert found.values.shape == (20,)
    torch.testing.assert_close(found.map(Tensor.relu).dense(), p.relu())
