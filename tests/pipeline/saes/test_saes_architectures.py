"""What each architecture is for: the facts that make it itself, on hand-made and planted data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from support.saes_kit import DICTIONARIES, B, D, GroundTruth, M, Planted, batches, made, one_thread, settings, train
from torch import Tensor

from sae.pipeline import saes
from sae.pipeline.saes import FINISHED, Clock
from sae.pipeline.saes.coherence import jl
from sae.pipeline.saes.jumprelu import jump
from sae.pipeline.saes.p_anneal import power_sum

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def unit_rows(m: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# Warm-ups and annealing


def test_the_published_warm_ups() -> None:
    """L1: 0, c / 2, c. JL: 2.5, 0.5 + 2 cos(pi / 4), 0.5. At steps 0, 1000 and 2000."""
    hybrid: Any = saes.parse({"arch": "hybrid"})
    clocks = [Clock(step, 10_000) for step in (0, 1000, 2000, 5000)]
    dictionary: Any = saes.create(hybrid, D)
    assert [dictionary.weight(clock) for clock in clocks] == [0, 0.05, 0.1, 0.1]
    found = [saes.config.anneal(hybrid.jl_start, hybrid.jl_coefficient, hybrid.jl_warmup, clock) for clock in clocks]
    assert found == pytest.approx([2.5, 0.5 + 2 * math.cos(math.pi / 4), 0.5, 0.5])
    assert saes.config.anneal(2.5, 0.0, 0.5, Clock(5, 10)) == 0 and saes.config.anneal(1, 2, 0, Clock(0, 1)) == 2


def test_k_goes_evenly_from_its_start() -> None:
    config: Any = settings({"arch": "topk", "k": 4, "k_start": 20, "k_anneal": 8})
    assert [config.k_at(Clock(step, 100)) for step in (0, 1, 4, 8, 50)] == [20, 18, 12, 4, 4]
    sae = made(config)
    x = next(batches(None, 1))[0]
    assert sae.loss(x, clock=Clock(0, 100, B)).latents.values.shape == (B, 20)
    assert sae.encode(x).values.shape == (B, 4)
    assert settings({"arch": "topk", "k": 4}).k_at(Clock(0, 100)) == 4  # type: ignore[attr-defined]


# Coherence


def test_jl_of_random_directions_and_of_right_angles() -> None:
    assert jl(unit_rows(1024, 256)).item() == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    assert jl(torch.eye(12)).item() == 0


@pytest.mark.parametrize("form", ["abs", "abs_squared", "relu", "relu_squared"])
def test_jl_by_its_formula_in_blocks_and_with_duplicates(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saes.coherence, "BLOCK_ELEMENTS", 30)  # blocks of 3 rows, and a last one of 1
    rows = unit_rows(10, 6).double()
    cosines = (rows @ rows.T).fill_diagonal_(0)
    size = (cosines.abs() if form.startswith("abs") else cosines.relu()).atanh()
    expected = math.sqrt(6) / 100 * (size**2 if form.endswith("squared") else size).sum()
    torch.testing.assert_close(jl(rows, form), expected)
    assert torch.autograd.gradcheck(lambda table: jl(table, form), rows.clone().requires_grad_())
    twice = torch.cat([rows[:5], rows[:5]]).requires_grad_()
    value = jl(twice, form)
    value.backward()
    assert twice.grad is not None and value.isfinite() and twice.grad.isfinite().all()


def test_jl_of_some_rows_is_right_on_average() -> None:
    rows = unit_rows(8, 5).double().requires_grad_()
    picks = torch.combinations(torch.arange(8), 3)
    some = torch.stack([jl(rows, "abs", pick) for pick in picks]).mean()
    torch.testing.assert_close(some, jl(rows))
    torch.testing.assert_close(torch.autograd.grad(some, rows), torch.autograd.grad(jl(rows), rows))
    assert torch.autograd.gradcheck(lambda table: jl(table, "abs", torch.tensor([1, 6])), rows)


def test_training_spreads_the_directions() -> None:
    sae = made(settings({"arch": "jl"}))
    history = train(sae, batches(None, 40), lr=1e-2)
    assert jl(sae.W_dec) < 0.9 * jl(made(settings({"arch": "jl"})).W_dec)
    assert set(history[0].terms) == {"reconstruction", "jl"}


# Selection over a batch


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
def test_inference_does_not_depend_on_the_batch_and_keeps_l0(arch: str) -> None:
    rows = Planted(width=16, features=24, active=2)
    sae = saes.create(saes.parse({"arch": arch, "d_sae": 32, "k": 2, "dead_after": 5000}), 16)
    sae.initialise(rows(2048))
    assert train(sae, ((rows(128), None) for _ in range(200)), lr=1e-2)[-1].latents.l0().sum() == 2 * 128
    sae.eval()
    x = rows(1024)
    together = sae.encode(x).dense()
    alone = torch.cat([sae.encode(row[None]).dense() for row in x[:20]])
    torch.testing.assert_close(together[:20], alone)
    assert (together > 0).sum(1).float().mean() == pytest.approx(2, rel=0.05)
    assert (together[together > 0] > sae.threshold).all()


def test_the_threshold_is_the_mean_of_the_least_kept_value() -> None:
    sae: Any = made(settings({"arch": "batchtopk", "threshold_start": 2}))
    least = []
    for step, (x, _) in enumerate(batches(None, 5)):
        losses = sae.loss(x, clock=Clock(step, 100, B))
        least.append(losses.latents.values[losses.latents.values > 0].min())
        sae.track(sae.observe(losses))
        expected = least[-1] if step < 2 else torch.stack(least[2:]).mean()
        torch.testing.assert_close(sae.threshold, expected.detach())
    assert sae.threshold_batches == 3
    sae.track(sae.observe(sae.loss(x, clock=Clock(1, 2, B))))  # which is past half of so short a training
    assert sae.threshold_batches == 4


def test_prefixes() -> None:
    def config(**changes: Any) -> Any:
        return settings({"arch": "matryoshka", **changes})

    assert saes.parse({"arch": "matryoshka"}).sizes == (256, 768, 1792, 3840)  # type: ignore[attr-defined]
    assert config(prefixes=(4, 0.5)).sizes == (4, 16)
    for wrong in ((8, 8), (32,), (0.5, 4), (0,)):
        with pytest.raises(ValidationError, match="prefixes"):
            config(prefixes=wrong)


def test_the_first_latents_reconstruct_better_when_they_must() -> None:
    def error(arch: str) -> float:
        sae = made(settings({"arch": arch, **({"prefixes": (8,)} if arch == "matryoshka" else {})}))
        train(sae, batches(None, 80), lr=1e-2)
        x = Planted(seed=0)(512) * sae.scale
        latents = sae.encode(x / sae.scale).dense()
        return (x - latents[:, :8] @ sae.W_dec[:8] - sae.b_dec).square().sum().item()

    assert error("matryoshka") < 0.9 * error("batchtopk")


# Thresholds


def test_the_gradients_of_a_jump_by_hand() -> None:
    p = torch.tensor([0.50, 0.96, 1.04, 2.00, -0.03], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.01], dtype=torch.float64, requires_grad=True)
    f, step = jump(p, theta, 0.1)
    assert f.tolist() == [0, 0, 1.04, 2.0, 0] and step.tolist() == [0, 0, 1, 1, 0]
    into_p, into_theta = torch.autograd.grad(f.sum(), (p, theta), retain_graph=True)
    assert into_p.tolist() == [0, 0, 1, 1, 0]
    assert into_theta.tolist() == pytest.approx([0, -10, -10, 0, -0.1])  # -theta / eps, also where p is negative
    (into_theta,) = torch.autograd.grad(step.sum(), theta)
    assert into_theta.tolist() == pytest.approx([0, -10, -10, 0, -10])


def test_thresholds_move_and_l0_follows_the_coefficient() -> None:
    def trained(coefficient: float, **changes: Any) -> tuple[Any, float]:
        case = {"arch": "jumprelu", "input_scale": "rms", "theta_init": 0.3, "bandwidth": 0.3, "warmup": 0, **changes}
        sae = made(settings({**case, "coefficient": coefficient}))
        train(sae, batches(None, 120), lr=1e-2)
        return sae, sae.encode(Planted()(512)).l0().float().mean().item()

    weak, strong = trained(0.0), trained(1.0)
    assert strong[1] < 0.7 * weak[1]
    assert (strong[0].threshold - 0.3).abs().min() > 1e-4
    assert trained(10.0, target_l0=4.0, penalty="l0_target")[1] == pytest.approx(4, abs=0.6)


def test_dead_latents_are_pulled_up_to_their_thresholds() -> None:
    sae = made(settings({"arch": "jumprelu", "pre_act_coefficient": 0.1, "dead_after": 1}))
    with torch.no_grad():
        sae.b_enc[:8] = -5
    sae.rows_since_fired[:8] = 1
    x = next(batches(None, 1))[0]
    assert (sae.encode(x).dense()[:, :8] == 0).all()
    sae.loss(x).total.backward()
    assert sae.b_enc.grad is not None and (sae.b_enc.grad[:8] < 0).all()
    sae.rows_since_fired.zero_()
    assert sae.loss(x).terms["pre_act"] == 0


# p-annealing


@pytest.mark.parametrize(
    ("given", "rate", "steps", "multiple"),
    [
        ({}, 3e-3, 2000, 4 / 3),  # 4 times the root of 64 / 16 in so many steps
        ({}, 6e-3, 2000, 1),  # they come as far at the encoder's rate
        ({}, 1e-3, 10, 25),  # half a kernel a step, and no more
        ({"target_l0": None}, 1e-3, 1000, 32**0.5),
        ({"input_scale": "unit", "theta_init": 1e-3, "bandwidth": 1e-3}, 1e-4, 100_000, 1),
        ({"input_scale": "unit", "theta_init": 1e-3, "bandwidth": 1e-3}, 1e-4, 4000, 2.5),
        ({"input_scale": "none"}, 1e-3, 10, 1),  # nobody knows how far that is
        ({"threshold_rate": 3.0}, 1e-3, 10, 3),
    ],
)
def test_thresholds_come_to_where_preactivations_are(
    given: dict[str, Any], rate: float, steps: int, multiple: float
) -> None:
    sae = saes.create(saes.parse({"arch": "jumprelu", "d_sae": 8, "target_l0": 16.0} | given), 64)
    found = [one for one in sae.parameter_groups() if one.kept == "not negative"]
    assert [one.multiple(rate, steps) for one in found] == [pytest.approx(multiple)]


def test_the_exponent_falls_in_stages_and_the_penalty_keeps_its_size() -> None:
    config: Any = settings({"arch": "p_anneal", "anneal_start": 10, "stages": 4, "p_end": 0.2, "warmup": 0})
    powers = [config.p_at(Clock(step, 50)) for step in range(50)]
    assert powers[:10] == [1.0] * 10
    assert powers[10::10] == pytest.approx([0.8, 0.6, 0.4, 0.2]) and config.p_at(FINISHED) == pytest.approx(0.2)
    sae: Any = made(config)
    x = next(batches(None, 1))[0]
    at = [sae.loss(x, clock=Clock(step, 50, B)) for step in (9, 10)]
    sae.track(sae.observe(at[0]))
    torch.testing.assert_close(sae.loss(x, clock=Clock(10, 50, B)).terms["lp"], at[0].terms["lp"])
    assert sae.factor != 1
    before = sae.factor.clone()
    sae.track(sae.observe(at[1]))
    assert torch.equal(sae.factor, before)


def test_a_power_of_one_is_the_sum() -> None:
    active = saes.Latents.of_dense(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.5]]))
    torch.testing.assert_close(power_sum(active, 1.0), torch.tensor(1.75))
    low = power_sum(active, 1e-3) / ((1 + 1e-3) ** 1e-3 - 1e-3**1e-3)
    assert low.item() == pytest.approx(1.5, rel=0.02)  # as p falls, the number of active latents


# Ghosts, and what rows are before they are encoded


def test_ghosts_teach_dead_latents_what_is_left_over() -> None:
    """Without them a dead latent has no gradient; with them its ghosts come closer to the residual."""
    x, away = next(batches(None, 1))[0], []
    for ghosts in (False, True):
        sae = made(settings({"arch": "l1", "decoder_norm": "unit", "ghost_grads": ghosts, "dead_after": 1}))
        sae.rows_since_fired[:8] = 1
        with torch.no_grad():
            sae.b_enc[:8] = -6
        for _ in range(50):
            sae.zero_grad()
            sae.loss(x).total.backward()
            assert sae.W_enc_rows.grad is not None and sae.W_dec.grad is not None
            assert (sae.W_enc_rows.grad[:8].abs().sum() > 0) == ghosts
            with torch.no_grad():
                sae.W_enc_rows[:8] -= 0.01 * sae.W_enc_rows.grad[:8]
                sae.W_dec[:8] -= 0.01 * sae.W_dec.grad[:8]
                y, p = x * sae.scale, (x * sae.scale - sae.b_dec) @ sae.W_enc_rows[:8].T - 6
                residual, ghost = y - sae.loss(x).reconstruction, p.exp() @ sae.W_dec[:8]
                away.append((1 - F.cosine_similarity(residual, ghost)).mean().item())
    assert away[49] == pytest.approx(away[0], abs=1e-5) and away[99] < 0.8 * away[50]


def test_rows_standardised_one_by_one_come_back() -> None:
    """What a row's mean and deviation were does not matter to its latents, and is in its reconstruction."""
    sae = made(settings({"arch": "topk", "input_scale": "per_token"}))
    x = next(batches(None, 1))[0]
    factors, shifts = torch.rand(B, 1) + 0.5, torch.randn(B, 1)
    other = factors * x + shifts
    torch.testing.assert_close(sae.encode(other).dense(), sae.encode(x).dense(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sae(other), factors * sae(x) + shifts, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(sae.loss(other).total, sae.loss(x).total, rtol=1e-3, atol=0)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="l0_target needs target_l0"):
        settings({"arch": "jumprelu", "penalty": "l0_target", "coefficient": 1.0})
    with pytest.raises(ValidationError, match="coefficient: 0 stays 0"):
        saes.parse({"arch": "l1", "target_l0": 3, "coefficient": 0})
    with pytest.raises(ValidationError, match=r"theta_init: 0\.5 is out of reach under input_scale: unit"):
        saes.parse({"arch": "jumprelu", "input_scale": "unit"})


@pytest.mark.parametrize("arch", DICTIONARIES)
def test_stretching_free_rows_changes_nothing(arch: str) -> None:
    """No penalty shrinks and no choice changes when a row grows and its latent falls by as much."""
    sae = made(settings({"arch": arch, "decoder_norm": "free"}))
    x, factors = next(batches(None, 1))[0], 0.5 + torch.rand(M, 1, generator=torch.Generator().manual_seed(0))
    clock = Clock(5, 10, B)
    before = {name: term.item() for name, term in sae.loss(x, clock=clock).terms.items()}
    with torch.no_grad():
        sae.W_dec.mul_(factors)
        sae.W_enc_rows.div_(factors)
        sae.b_enc.div_(factors.view(-1))
    after = {name: term.item() for name, term in sae.loss(x, clock=clock).terms.items()}
    assert after == pytest.approx(before, rel=1e-5)
    folded = sae.eval().fold()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(M))
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-5, atol=1e-5)


# Recovery


def test_the_ground_truth_is_what_it_says() -> None:
    truth = GroundTruth(32, 30, active=3, groups=4)
    assert torch.bincount(truth.group).tolist() == [8, 7, 8, 7]
    x = truth(4000)
    coefficients = torch.linalg.lstsq(truth.features[truth.group == 0].T, x.T).solution
    inside = (truth.features[truth.group == 0].T @ coefficients - x.T).norm(dim=0) < 1e-4
    assert inside.float().mean() == pytest.approx(0.25, abs=0.03)
    active = (coefficients[:, inside].abs() > 1e-4).float()
    assert active.sum(0).mean() == pytest.approx(3, abs=0.01) and (active.mean(1) > 0.2).all()


@pytest.mark.slow
def test_batchtopk_recovers_the_ground_truth() -> None:
    """Mean over true features of the best cosine, against 0.19 by chance. (TopK: in test_synthetic.py.)"""
    truth = GroundTruth(256, 512, active=8, groups=1)
    config = {
        "arch": "batchtopk",
        "d_sae": 512,
        "k": 8,
        "aux_coefficient": 0.0,
        "input_scale": "none",
        "b_dec_init": "zeros",
    }
    sae = saes.create(saes.parse(config), 256)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3, fused=True)
    train(sae, ((truth(512), None) for _ in range(700)), optimizer=optimiser)
    assert (sae.W_dec @ truth.features.T).amax(0).mean() >= 0.9


# Steering


STEERED = [arch for arch in DICTIONARIES if "target_l0" in saes.ARCHITECTURES[arch].config_type.model_fields]
LIKE_L1 = ("p_anneal", "vsae_iso", "vsae_mix", "vsae_multi")  # whose L0 falls and rises with l1's, to two digits


@pytest.mark.parametrize(
    ("arch", "start"),
    [(arch, start) for arch in STEERED for start in (0.1, 0.5) if start == 0.1 or arch not in LIKE_L1],
)
def test_a_target_of_l0_is_reached_from_far_off(arch: str, start: float) -> None:
    """From a coefficient that by itself leaves nearly all latents active, or nearly none."""
    rows = Planted(width=16, features=48, active=4)
    case = {"arch": arch, "d_sae": 64, "target_l0": 3.0, "coefficient": start, "theta_init": 0.1, "warmup": 0}
    names = saes.ARCHITECTURES[arch].config_type.model_fields
    sae = saes.create(saes.parse({name: value for name, value in case.items() if name in names}), 16)
    sae.initialise(rows(2048))
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    l0s = []
    for step in range(400):
        losses = sae.loss(rows(64), clock=Clock(step, 400, 64))
        optimiser.zero_grad()
        losses.total.backward()
        sae.before_step()
        optimiser.step()
        sae.after_step()
        sae.track(sae.observe(losses))
        l0s.append(losses.l0().float().mean().item())
    assert sum(l0s[-50:]) / 50 == pytest.approx(3, rel=0.25)


def test_a_coefficient_is_raised_where_l0_falls_too_slowly_and_lowered_below_the_target() -> None:
    """L0 may take half of the training for its way from 64 to 4; its logarithm falls by ln 16 / 50 a step."""
    sae: Any = made(settings({"arch": "l1", "target_l0": 4.0, "warmup": 0.1}))

    def moved(step: int, l0: float) -> float:
        before = sae.pressure.item()
        sae._steer(torch.tensor(l0), Clock(step, 100, 64))
        return math.log(sae.pressure.item() / before)

    gain = sae.gain / 100
    assert [moved(step, 64.0) for step in (9, 10)] == [0, 0]  # in the warm-up, and where the line begins
    line = 64 * 16 ** (-20 / 50)
    assert moved(30, 0.9 * line) == moved(30, 4.0) == 0 and sae.excess.item() == 0
    assert moved(30, 1.2 * line) == pytest.approx(gain * math.log(1.2), rel=1e-4)
    assert moved(30, 2.0) == pytest.approx(-gain / 2, rel=1e-4)
    assert [moved(60, 5.0), moved(99, 5.0)] == pytest.approx([gain * math.log(5 / 4)] * 2, rel=1e-4)


def test_a_coefficient_that_is_given_stays() -> None:
    assert saes.parse({"arch": "l1"}).target_l0 == 32  # type: ignore[attr-defined]
    fixed: Any = saes.parse({"arch": "l1", "coefficient": 2})
    assert fixed.target_l0 is None and saes.parse(fixed.model_dump()) == fixed
    both: Any = saes.parse({"arch": "l1", "coefficient": 2, "target_l0": 8})
    assert both.target_l0 == 8 and saes.parse(both.model_dump()) == both
    sae = made(settings({"arch": "l1", "coefficient": 2}))
    assert "pressure" not in sae.state_dict()
