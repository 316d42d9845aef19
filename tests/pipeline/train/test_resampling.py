"""Dead latents between steps: resampled, or the whole dictionary started again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.saes_kit import DICTIONARIES, B, D, M, Planted, batches, made, one_thread, settings, train
from torch import Tensor, nn

from sae.cache.loader.loader import Batch
from sae.pipeline.saes import (
    SAE,
    Clock,
)
from sae.pipeline.saes.losses import LossInputs
from sae.pipeline.saes.topk import TopK
from sae.pipeline.train import resampling
from sae.pipeline.train.resampling import (
    Resample,
    firing_rate_skew,
    reinitialise,
    resample,
)

single = pytest.fixture(autouse=True, scope="module")(one_thread)

RESAMPLE = Resample(kind="resample", rows=512)
DEAD = 5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


AT = Clock(5, 10, B)


def rows(d_out: int | None, count: int) -> list[Batch]:
    """Batches as a dataset gives them."""
    return [Batch(x, x if y is None else y) for x, y in batches(d_out, count)]


def with_dead(case: dict[str, Any], d_out: int | None = None) -> tuple[SAE, torch.optim.Optimizer]:
    """A dictionary after a few steps, in which the first DEAD latents then died."""
    sae = made(settings({"dead_after": 1000, **case}), d_out)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True)
    train(sae, batches(d_out, 5), optimizer=optimiser)
    sae.rows_since_fired.zero_()
    sae.rows_since_fired[:DEAD] = 1000
    with torch.no_grad():
        sae.b_enc[:DEAD] = -5
    return sae, optimiser


def moments(sae: SAE, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name} {moment}": optimiser.state[parameter][moment].clone()
        for name, parameter in sae.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("arch", DICTIONARIES)
@pytest.mark.parametrize("d_out", [None, 7])
def test_only_dead_latents_and_their_moments_change(arch: str, d_out: int | None) -> None:
    sae, optimiser = with_dead({"arch": arch}, d_out)
    before, means = copy.deepcopy(sae.state_dict()), moments(sae, optimiser)
    assert resample(sae, optimiser, rows(d_out, 4), RESAMPLE, generator(), AT) == DEAD
    for name, tensor in sae.state_dict().items():
        if tensor.shape[:1] == (M,):
            assert torch.equal(tensor[DEAD:], before[name][DEAD:]), name
        elif name != "b_dec" or tensor.shape != (M,):
            assert torch.equal(tensor, before[name]), name
    for name, tensor in moments(sae, optimiser).items():
        if name.startswith("b_dec"):
            assert torch.equal(tensor, means[name])
        else:
            assert torch.equal(tensor[DEAD:], means[name][DEAD:]) and not tensor[:DEAD].any(), name
    assert not sae.dead(AT).any() and not sae.b_enc[:DEAD].any()
    living = before["W_dec"][DEAD:].norm(dim=1).mean()  # 1 where rows are kept there
    torch.testing.assert_close(sae.W_dec[:DEAD].norm(dim=1), living.expand(DEAD))
    alive = sae.W_enc_rows[DEAD:].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc_rows[:DEAD].norm(dim=1), (0.2 * alive).expand(DEAD))


class Sharpened(TopK):
    """TopK with a parameter that no latent has for itself, and one that is no architecture's so far."""

    def _build(self, generator: torch.Generator) -> None:
        self.sharpness = nn.Parameter(torch.ones(()))
        self.mixing = nn.Parameter(torch.eye(3))

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        return super()._terms(batch) | {"sharp": (self.sharpness - 2).square() + (self.mixing - 1).square().sum()}


def test_a_parameter_that_is_not_per_latent_keeps_what_the_optimiser_knows_of_it() -> None:
    sae = Sharpened(settings({"arch": "topk", "dead_after": 1000}), D)
    sae.initialise(Planted()(512))
    groups = sae.parameter_groups()
    optimiser = torch.optim.Adam([{"params": group.parameters} for group in groups], lr=1e-2, fused=True)
    train(sae, batches(None, 5), optimizer=optimiser)
    sae.rows_since_fired[:DEAD] = 1000
    means = moments(sae, optimiser)
    assert resample(sae, optimiser, rows(None, 4), RESAMPLE, generator(), AT) >= DEAD
    after = moments(sae, optimiser)
    for name in ("sharpness exp_avg", "mixing exp_avg", "mixing exp_avg_sq", "b_dec exp_avg"):
        assert means[name].any() and torch.equal(after[name], means[name]), name
    assert not after["W_dec exp_avg"][:DEAD].any()
    x = Planted()(512)
    reinitialise(sae, optimiser, Batch(x, x), generator())
    train(sae, batches(None, 2), optimizer=optimiser)


def test_new_directions_are_those_of_rows_by_their_error() -> None:
    """Rows without an error are never drawn, others in proportion to its square, and none twice."""
    sae, optimiser = with_dead({"arch": "l1", "decoder_norm": "free", "penalty": "decoder_norm"})
    x = next(batches(None, 1))[0]
    _, towards, _ = sae.directions(x)
    resample(sae, optimiser, Batch(x, x).split(2), RESAMPLE, generator(), AT)
    cosines = F.normalize(sae.W_dec[:DEAD], dim=1) @ towards.T
    chosen = cosines.argmax(1)
    torch.testing.assert_close(cosines.amax(1), torch.ones(DEAD))
    assert len(set(chosen.tolist())) == DEAD
    torch.testing.assert_close(sae.W_dec[:DEAD].norm(dim=1), sae.W_dec[DEAD:].norm(dim=1).mean().expand(DEAD))
    torch.testing.assert_close(F.normalize(sae.W_enc_rows[:DEAD], dim=1), F.normalize(sae.W_dec[:DEAD], dim=1))

    class Fixed:
        """Stands for a dictionary: three rows, of which one has no error and one has twice the other's."""

        W_enc_rows = W_dec = torch.zeros(1, 3)
        d_in = d_out = 3

        def directions(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.eye(3), torch.eye(3), torch.tensor([1.0, 2.0, 0.0])

    stands: Any = Fixed()
    drawn = torch.stack([resampling._draw(stands, [Batch(x, x)], 1, generator(seed))[0][0] for seed in range(600)])
    assert drawn.mean(0).tolist() == pytest.approx([0.2, 0.8, 0.0], abs=0.05)
    assert len(resampling._draw(stands, [Batch(x, x)], 9, generator())[0]) == 2


def test_a_resampled_latent_fires_again() -> None:
    sae, optimiser = with_dead({"arch": "l1", "coefficient": 0.05})
    train(sae, batches(None, 50), optimizer=optimiser)
    assert (sae.encode(Planted()(512)).fired()[:DEAD] == 0).all()
    sae.rows_since_fired[:DEAD] = 1000
    resample(sae, optimiser, rows(None, 4), RESAMPLE, generator(), AT)
    train(sae, batches(None, 100), optimizer=optimiser)
    assert (sae.encode(Planted()(512)).fired()[:DEAD] > 0).all()


def test_nothing_to_resample_and_nothing_alive() -> None:
    sae, optimiser = with_dead({"arch": "topk"})
    sae.rows_since_fired.zero_()
    before = copy.deepcopy(sae.state_dict())
    assert resample(sae, optimiser, rows(None, 1), RESAMPLE, generator(), AT) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    sae.rows_since_fired.fill_(10**6)
    assert resample(sae, torch.optim.Adam(sae.parameters()), rows(None, 1), RESAMPLE, generator(), AT) == M
    assert sae.W_enc_rows.isfinite().all()


def test_unequal_latents_start_again() -> None:
    sae, optimiser = with_dead({"arch": "topk"})
    sae.firing_rate.fill_(4 / M)
    assert firing_rate_skew(sae, 4) == 0
    sae.firing_rate[0] = 5 * 4 / M
    assert firing_rate_skew(sae, 4) == pytest.approx(64 / M)
    before = copy.deepcopy(sae.state_dict())
    x = Planted()(512)
    reinitialise(sae, optimiser, Batch(x, x), generator())
    assert not torch.equal(sae.W_dec, before["W_dec"])
    assert torch.equal(sae.W_enc_rows, sae.W_dec * sae.config.encoder_scale)
    assert not sae.firing_rate.any() and not sae.rows_since_fired.any() and not sae.b_enc.any()
    assert len(optimiser.state) == 0 and sae.scale != 1
    train(sae, batches(None, 2), optimizer=optimiser)


def test_rates_are_running_means() -> None:
    sae = made(settings({"arch": "topk"}))
    counts = []
    for step, (x, _) in enumerate(batches(None, 5)):
        losses = sae.loss(x, clock=Clock(step, 100, len(x)))
        counts.append(losses.latents.fired() / B)
        sae.track(sae.observe(losses))
        torch.testing.assert_close(sae.firing_rate, torch.stack(counts).mean(0))
    assert sae.firing_rate.sum().item() == pytest.approx(4, abs=0.2) and sae.d_in == D


def test_draws_depend_on_seed_purpose_and_step_alone() -> None:
    one, two = made(settings({"arch": "topk"}), seed=1), made(settings({"arch": "l1"}), seed=1)
    first = torch.rand(4, generator=one.generator("a", 3))
    assert torch.equal(first, torch.rand(4, generator=two.generator("a", 3)))
    others = [one.generator("a", 4), one.generator("b", 3), made(settings({"arch": "l1"}), seed=2).generator("a", 3)]
    assert not any(torch.equal(first, torch.rand(4, generator=other)) for other in others)
