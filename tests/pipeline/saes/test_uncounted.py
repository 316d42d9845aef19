"""Latents of which nobody knows how many are active: sums by kernels are those of the plain way, at any number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.saes_kit import CASES, D, batches, one_thread, small
from support.watching import watched
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

from sae.pipeline import saes
from sae.pipeline.saes import SAE, Clock, Trainable, kernels, latents, placement, uncounted
from sae.pipeline.saes.encoder import Preactivations
from sae.pipeline.saes.jumprelu import JumpReLUSettings
from sae.pipeline.saes.kernels import lists
from sae.pipeline.saes.uncounted import Asked, Uncounted

single = pytest.fixture(autouse=True, scope="module")(one_thread)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's; conftest.py asks for it
M, B = 13, 6
CLOCK = Clock(60, 100, B)
LEARNED = ("l1", "hybrid", "shifted_relu", "p_anneal", "jumprelu", "gated")
BOTH = {"arch": "jumprelu", "straight_through": "both", "pre_act_coefficient": 0.1, "bandwidth": 0.5}
NORMS = {"arch": "gated", "penalty": "decoder_norm", "decoder_norm": "free"}
PER_TOKEN = {"arch": "l1", "penalty": "per_token", "input_scale": "per_token", "reduction": "fvu"}
FIRST: list[dict[str, Any]] = [BOTH, NORMS]
FURTHER: list[dict[str, Any]] = [case for case in CASES if case["arch"] in LEARNED] + [
    PER_TOKEN,
    {"arch": "p_anneal", "anneal_start": 0, "p_end": 0.3},
    {"arch": "crosscoder", "k": 32, "sparsity": "l1", "coefficient": 0.2, "target_l0": None},
    {"arch": "clt", "sparsity": "jumprelu"},
    {"arch": "l1", "skip": True},
]


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs ahead, and sizes at which some lists have room and others have not."""
    monkeypatch.setattr(placement, "HOSTS", set())
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    monkeypatch.setattr(lists, "STRIP", 4)
    if DEVICE == "cpu":
        monkeypatch.setattr(lists, "MEMBERS", 8)
        monkeypatch.setattr(kernels.family("uncounted"), "TILE", 32)


def made(case: dict[str, Any]) -> tuple[Trainable, Tensor, Tensor | None]:
    """Something to train, two of whose latents are dead, a batch and its targets."""
    several = case["arch"] == "clt"
    into = D if several else 7 if "skip" in case else None
    x, y = (None if one is None else one[:B].to(DEVICE) for one in next(batches(into, 1)))
    it = saes.trainable(small(case, d_sae=M), (5, 7) if several else D, (5, 7) if several else into).to(DEVICE)
    assert x is not None
    it.initialise(x, y)
    for one in parts(it):
        one.rows_since_fired[::8] = 10**9
        if isinstance(one.config, JumpReLUSettings):
            one.get_parameter("threshold").data[1] = -0.2  # as a file of another tool may have it
    return it, x, y


def parts(it: Trainable) -> list[SAE]:
    return [one for one in it.modules() if isinstance(one, SAE)]


def few(it: Trainable, few: bool = True) -> None:
    """Have it taken for one of which few latents are active, or many."""
    it.look_ahead(CLOCK._replace(step=CLOCK.step - 1))
    for one in parts(it):
        one._few_active = few


def expect_equal_steps(it: Trainable, x: Tensor, y: Tensor | None) -> None:
    """What is observed is so after the optimiser's step, as training does it."""
    other, found = copy.deepcopy(it), []
    for one, is_few in ((it, True), (other, False)):
        few(one, is_few)
        losses = one.loss(x, y, CLOCK)
        seen = losses.layers[0].latents if hasattr(losses, "layers") else losses.latents  # type: ignore[attr-defined]
        assert isinstance(seen, Uncounted) == is_few
        losses.total.backward()
        torch.optim.SGD(one.parameters(), lr=1e-3).step()
        one.track(one.observe(losses))
        found.append((losses.terms, losses.x_hat, losses.l0()))
    close = torch.testing.assert_close
    close(*found, atol=1e-5, rtol=1e-5)
    close(*(dict(one.named_buffers()) for one in (it, other)), atol=1e-5, rtol=1e-5)
    for name, parameter in it.named_parameters():
        grad, wanted = parameter.grad, other.get_parameter(name).grad
        close(grad, wanted, atol=2e-5, rtol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("case", [*FIRST, *(pytest.param(case, marks=pytest.mark.slow) for case in FURTHER)], ids=str)
def test_a_step_is_that_of_the_plain_way(case: dict[str, Any]) -> None:
    expect_equal_steps(*made(case))


@pytest.mark.parametrize("active", [0.0, 1.0])
@pytest.mark.parametrize("arch", ["l1", *(pytest.param(arch, marks=pytest.mark.slow) for arch in LEARNED[3:])])
def test_none_or_all_may_be_active(arch: str, active: float) -> None:
    it, x, y = made({"arch": arch})
    assert isinstance(it, SAE)
    with torch.no_grad():
        it.b_enc.fill_(9.0 if active else -9.0)
    expect_equal_steps(it, x, y)
    assert it.firing_rate.count_nonzero() == active * M


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (1, 1), (17, 20)])
def test_lists(by_row: bool, shape: tuple[int, int]) -> None:
    """Of those that have no room the number is told, and what is no number is above every bound."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(*shape, generator=generator).to(DEVICE)
    p[0, 0] = torch.nan
    bounds = torch.linspace(-1, 1, shape[1], device=DEVICE)
    named, counts = lists.listed(p, bounds, by_row=by_row)
    on = ~(p <= bounds) if by_row else ~(p <= bounds).T
    for members, count, its in zip(named.tolist(), counts.tolist(), on, strict=True):
        wanted = its.nonzero().view(-1).tolist()
        assert count == len(wanted)
        assert count > len(members) or members[:count] == wanted


def asked(arch: str = "l1") -> tuple[SAE, Tensor, Preactivations]:
    it, x, _ = made({"arch": arch})
    assert isinstance(it, SAE)
    return it, x, it._preactivations(x * it.scale, it.weights())


def test_values_of_a_choice_in_bfloat16_are_exact() -> None:
    it, _, pre = asked()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = uncounted.sums(pre, it.W_dec, Asked("linear"))
        chosen = pre.whole() > 0
    p = (pre.centred @ it.W_enc + it.b_enc) * chosen
    torch.testing.assert_close(found.mixture, p.relu() @ it.W_dec)
    torch.testing.assert_close(found.sums, p.relu().sum(1))
    found.mixture.square().sum().backward()
    mine = it.W_enc_rows.grad
    it.W_enc_rows.grad = None
    (p.relu() @ it.W_dec).square().sum().backward()
    torch.testing.assert_close(mine, it.W_enc_rows.grad)


def test_the_pull_on_dead_latents_is_exact_in_bfloat16() -> None:
    """It is a difference of sums, which a rounded product would leave little of."""
    it, x, _ = made(BOTH)
    few(it)
    wanted = it.loss(x, None, CLOCK).terms["pre_act"]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        torch.testing.assert_close(it.loss(x, None, CLOCK).terms["pre_act"], wanted)


def test_what_is_no_number_is_told() -> None:
    it, x, _ = made({"arch": "jumprelu"})
    few(it)
    x[2, 3] = torch.nan
    losses = it.loss(x, None, CLOCK)
    assert losses.total.isnan() and losses.x_hat.isnan().any(1).tolist() == [row == 2 for row in range(B)]


def test_values_of_other_weights_are_not_given() -> None:
    it, x, _ = made({"arch": "l1"})
    few(it)
    assert isinstance(it, SAE)
    losses = it.loss(x, None, CLOCK)
    it.observe(losses)
    with pytest.raises(RuntimeError, match="ask before"):
        losses.latents.dense()


@pytest.mark.slow
def test_two_equal_steps_have_the_same_bytes() -> None:
    found = []
    for _ in range(2):
        it, x, y = made(NORMS)
        few(it)
        it.loss(x, y, CLOCK).total.backward()
        found.append([parameter.grad for parameter in it.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


def test_a_step_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = kernels.launch

    def quiet(*args: Any, **constants: Any) -> None:
        with _disable_current_modes():  # the interpreter's own operations are no device's
            launch(*args, **constants)

    for family in ("lists", "uncounted", "rows"):
        monkeypatch.setattr(kernels.family(family), "launch", quiet)
    it, x, y = made(BOTH)
    few(it)

    def step() -> None:
        losses = it.loss(x, y, CLOCK)
        losses.total.backward()
        it.before_step()
        it.after_step()
        it.track(it.observe(losses))

    assert watched(step, DEVICE).waited == []


def test_values_are_there_for_whoever_asks() -> None:
    """As where dictionaries are aligned by their latents."""
    it, x, y = made({"arch": "gated"})
    few(it)
    mine = it.loss(x, y, CLOCK).latents  # type: ignore[attr-defined]
    few(it, False)
    plain = it.loss(x, y, CLOCK).latents  # type: ignore[attr-defined]
    torch.testing.assert_close(mine.dense(), plain.dense())
    torch.testing.assert_close(mine.sum_per_row(it.b_enc), plain.sum_per_row(it.b_enc))
    for table in (it.W_dec, it.W_enc_rows):
        torch.testing.assert_close(latents.decode(mine, table), latents.decode(plain, table))
    assert isinstance(mine, Uncounted) and mine.batch == B and mine.d_sae == M
    assert torch.equal(mine.fired(), plain.fired()) and torch.equal(mine.detach().values, plain.values)


def test_entries_wait_until_gates_take_the_dictionary_as_it_is() -> None:
    it, x, _ = made({"arch": "gated", "gate_to_decoder": 0.5})
    for step in (49, 50):
        clock = CLOCK._replace(step=step)
        few(it)
        found: Any = it.loss(x, None, clock)
        assert isinstance(found.latents, Uncounted) == (step == 50)


def test_which_way_is_taken_follows_what_was_last_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    it, x, pre = asked()
    for rate, is_few in ((0.0, False), (uncounted.FEW / 2, True), (2 * uncounted.FEW, False)):
        it.firing_rate.fill_(rate)
        it.look_ahead(CLOCK)
        assert isinstance(it.loss(x, None, CLOCK).latents, Uncounted) == is_few
    few(it)
    assert not isinstance(it.loss(x.clone().requires_grad_(), None, CLOCK).latents, Uncounted)
    with kernels.chosen("plain"):
        assert not isinstance(it.loss(x, None, CLOCK).latents, Uncounted)
    assert uncounted.usable(pre, it.W_dec) and not uncounted.usable(pre, it.W_dec.double())
    for owner, name, value in ((uncounted, "MOST_COLUMNS", D - 1), (placement, "HOSTS", {"cpu", "cuda"})):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert not uncounted.usable(pre, it.W_dec)


def test_values_are_raised_to_two_powers_where_the_exponent_falls() -> None:
    it, x, _ = made({"arch": "p_anneal", "anneal_start": 0, "stages": 10})
    few(it)
    seen = [it.loss(x, None, CLOCK._replace(step=step)) for step in (58, 59)]  # it falls after step 59
    assert [isinstance(losses.latents, Uncounted) for losses in seen] == [True, False]  # type: ignore[attr-defined]
