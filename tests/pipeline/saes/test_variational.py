"""Variational SAEs: KLs against torch.distributions, what is drawn and when, and the mistakes that are easily made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.saes_kit import B, D, M, Planted, batches, made, one_thread, settings, train
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from sae.pipeline import saes
from sae.pipeline.saes import Clock
from sae.pipeline.saes.variational import Drawn, Posterior, Variational

single = pytest.fixture(autouse=True, scope="module")(one_thread)

ARCHS = ("vsae_iso", "vsae_mix", "vsae_multi")
TRAINING = Clock(50, 100, B)


def dictionary(arch: str = "vsae_iso", **changes: Any) -> Variational:
    found = made(settings({"arch": arch, **changes}))
    assert isinstance(found, Variational)
    return found


def posterior(rows: int = 40, m: int = M, seed: int = 0) -> Posterior:
    """Means of either sign and variances on both sides of 1."""
    generator = torch.Generator().manual_seed(seed)
    return Posterior(torch.randn(rows, m, generator=generator), torch.randn(rows, m, generator=generator) - 1)


def q(one: Posterior) -> Independent:
    assert one.logvar is not None
    return Independent(Normal(one.mean.double(), (0.5 * one.logvar.double()).exp()), 1)


def dense(sigma: Tensor) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(len(sigma), dtype=torch.float64), sigma)


def of_dense(one: Posterior, prior: MultivariateNormal) -> Tensor:
    return torch.stack(
        [
            kl_divergence(MultivariateNormal(mean, torch.diag(variance)), prior)
            for mean, variance in zip(one.mean.double(), one.variance.double(), strict=True)
        ]
    )


def equicorrelated(rho: float, m: int = M) -> Tensor:
    return torch.full((m, m), rho, dtype=torch.float64).fill_diagonal_(1)


def random_covariance(n: int) -> Tensor:
    root = torch.randn(n, n + 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return root @ root.T / n


# The KLs


def test_iso() -> None:
    one = posterior()
    expected = kl_divergence(q(one), Independent(Normal(torch.zeros(M).double(), 1.0), 1))
    assert expected.shape == (40,), "a row has a KL, summed over latents"
    torch.testing.assert_close(dictionary().kl(one).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_term_is_the_mean_over_rows_of_the_sum_over_latents() -> None:
    sae = dictionary(kl_coefficient=0.3)
    x = next(batches(None, 1))[0]
    prior = Independent(Normal(torch.zeros(M).double(), 1.0), 1)
    expected = 0.3 * kl_divergence(q(sae.posterior_of(x)), prior).mean()
    torch.testing.assert_close(sae.loss(x).terms["kl"].double(), expected, rtol=1e-5, atol=1e-5)
    half = sae.loss(x, clock=Clock(5, 100, B)).terms["kl"]
    assert half.item() == pytest.approx(0.5 * expected.item(), rel=1e-5), "while the weight rises"


def test_shifted() -> None:
    sae = dictionary("vsae_mix", prior="shifted", mean="identity", prior_shift=1.5, prior_std=0.7)
    at, std = torch.zeros(M).double(), torch.ones(M).double()
    at[:6], std[:6] = torch.tensor([1.5, 1.5, 1.5, 1.5, 1.5, -1.5]), 0.7
    one = posterior()
    torch.testing.assert_close(
        sae.kl(one).double(), kl_divergence(q(one), Independent(Normal(at, std), 1)), rtol=1e-5, atol=1e-5
    )


def mixture(components: list[tuple[float, float, float, float]]) -> MixtureSameFamily:
    weight, *means, std = (torch.tensor(column, dtype=torch.float64) for column in zip(*components, strict=True))
    return MixtureSameFamily(
        Categorical(weight), Independent(Normal(torch.stack(means, 1), std[:, None].expand(-1, 2)), 1)
    )


def prior_of_pairs(z: Tensor) -> Tensor:
    """log p [B] of latents [B, M], two correlated pairs and an anti-correlated one, as `mixed` has them."""
    together = mixture([(0.2, 2.0, 2.0, 0.5), (0.8, 0.0, 0.0, 1.0)])
    apart = mixture([(0.1, 2.0, 0.0, 0.5), (0.1, 0.0, 2.0, 0.5), (0.8, 0.0, 0.0, 1.0)])
    pairs = sum(kind.log_prob(z[:, i : i + 2]) for i, kind in ((0, together), (2, together), (4, apart)))
    return pairs + Normal(0.0, 1.0).log_prob(z[:, 6:]).sum(1)


def mixed(**changes: Any) -> Variational:
    return dictionary("vsae_mix", prior_shift=2.0, prior_std=0.5, presence=0.2, **changes)


def test_a_mixture_is_bounded_from_above_by_what_is_minimised() -> None:
    """Bound >= Monte-Carlo KL >= 0; a draw's density is exact; without variance the bound is exact, too."""
    sae, one = mixed(), posterior(8)
    noise = torch.randn(1000, 8, M, generator=torch.Generator().manual_seed(2))
    sampled = sae.sampled_kl(one, noise)
    z = one.mean + one.variance.sqrt() * noise[:50]
    exact = torch.stack([q(one).log_prob(each.double()) - prior_of_pairs(each.double()) for each in z]).mean(0)
    torch.testing.assert_close(sae.sampled_kl(one, noise[:50]).double(), exact, rtol=1e-4, atol=1e-4)
    error = 4 * 6 / 1000**0.5
    assert (sampled > 0).all() and (sae.kl(one) > sampled - error).all() and (sae.kl(one) - sampled).mean() > 0.05
    still = Posterior(one.mean, None)
    constant = -M / 2 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(
        sae.kl(still).double(), -prior_of_pairs(one.mean.double()) + constant, rtol=1e-5, atol=1e-5
    )


def test_a_mixture_without_a_shift_is_iso() -> None:
    one = posterior()
    for sae in (
        dictionary("vsae_mix", prior_shift=0.0),
        dictionary("vsae_mix", correlated_pairs=0, anticorrelated_pairs=0),
    ):
        torch.testing.assert_close(sae.kl(one), dictionary().kl(one), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            sae.marginals(one.mean, one.variance).sum(1), sae.cross_entropy(one.mean, one.variance)
        )


@pytest.mark.parametrize("rho", [0.5, 0.0, 0.99, -0.9 / (M - 1)])
def test_equicorrelated_is_the_dense_prior(rho: float) -> None:
    one = posterior()
    expected = of_dense(one, dense(equicorrelated(rho)))
    torch.testing.assert_close(
        dictionary("vsae_multi", correlation=rho).kl(one).double(), expected, rtol=1e-4, atol=1e-4
    )


def test_any_covariance_is_the_dense_prior() -> None:
    """Of the first latents; the others are independent. A unit matrix is iso."""
    sigma, one = random_covariance(5), posterior()
    whole = torch.block_diag(sigma, torch.eye(M - 5, dtype=torch.float64))
    sae = dictionary("vsae_multi", covariance=sigma.tolist())
    torch.testing.assert_close(sae.kl(one).double(), of_dense(one, dense(whole)), rtol=1e-4, atol=1e-4)
    assert {"whitening", "precision", "logdet"} <= sae.state_dict().keys(), "which move and are saved with it"
    assert next(value for name, value in sae.to("meta").named_buffers() if name == "whitening").is_meta
    for same in ({"correlation": 0.0}, {"covariance": torch.eye(7).tolist()}):
        torch.testing.assert_close(dictionary("vsae_multi", **same).kl(one), dictionary().kl(one), rtol=1e-5, atol=1e-5)


def test_many_equal_latents_lose_no_digits() -> None:
    """a |mu|^2 - b (1^T mu)^2 would: at rho 0.9 and 8192 latents all but three digits of float32."""
    m = 8192
    sae: Any = saes.create(saes.parse({"arch": "vsae_multi", "d_sae": m, "correlation": 0.9}), 2)
    one = Posterior(
        torch.full((1, m), 0.3) + 0.001 * torch.randn(1, m, generator=torch.Generator().manual_seed(0)), None
    )
    mean, along = one.mean.double(), 1 + (m - 1) * 0.9
    quadratic = 10 * mean.square().sum() - 9 / along * mean.sum() ** 2  # a = 10, b = 9 / along, in float64
    logdet = (m - 1) * torch.log(torch.tensor(0.1).double()) + torch.log(torch.tensor(along).double())
    torch.testing.assert_close(sae.kl(one).double(), 0.5 * (quadratic + logdet).view(1), rtol=1e-6, atol=0)


# Mistakes


def test_correlations_are_judged_row_by_row() -> None:
    """Rows of opposite means cancel in their mean: a KL of that would be next to nothing."""
    sae, one = dictionary("vsae_multi"), posterior(64)
    opposite = Posterior(torch.cat([one.mean, -one.mean]), torch.zeros(128, M))
    of_the_mean = sae.kl(Posterior(opposite.mean.mean(0, keepdim=True), torch.zeros(1, M)))
    rows = sae.kl(opposite).mean() - of_the_mean
    assert rows > 10, "what mu^T Sigma^-1 mu / 2 is on the average"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head", [{}, {"k": 4}])
def test_without_variance_nothing_is_drawn(arch: str, head: dict[str, int]) -> None:
    """z is mu: no error of sum_i sigma_i^2 |w_i|^2 that no training could reduce."""
    sae, x = dictionary(arch, variance="none", **head), next(batches(None, 1))[0]
    losses = sae.loss(x, clock=TRAINING)
    torch.testing.assert_close(losses.x_hat, sae(x))
    assert not hasattr(sae, "b_logvar")


def test_noise_adds_the_variance_times_the_rows_norms() -> None:
    """What is decoded in training is a draw, not the mean; and the draw has the variance it is said to have."""
    sae = dictionary(variance="fixed", sigma=0.5)
    x = Planted(seed=5)(4096)
    still = sae.loss(x).terms["reconstruction"]
    drawn = sae.loss(x, clock=TRAINING)
    expected = 0.25 * sae.W_dec.square().sum()
    assert (drawn.terms["reconstruction"] - still).item() == pytest.approx(expected.item(), rel=0.05)
    assert isinstance(drawn.latents, Drawn) and drawn.latents.z is not None
    apart = (drawn.latents.z - drawn.latents.dense()).detach()
    assert apart.mean().abs() < 0.01 and apart.var() == pytest.approx(0.25, rel=0.02)
    torch.testing.assert_close(drawn.l0(), sae.encode(x).l0(), msg="noise counts as no activity")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_error_of_draws_teaches_variances_that_may_be_far_below_1(arch: str) -> None:
    """log sigma^2 is any number: learned, it goes from 1 to where c / 2 (1 / sigma^2 - 1) = |w|^2."""
    sae, x = dictionary(arch, sigma=1.0, kl_coefficient=0.1, kl_warmup=0), next(batches(None, 1))[0]
    reconstruction = sae.loss(x, clock=TRAINING).terms["reconstruction"]
    gradients = torch.autograd.grad(reconstruction, (sae.W_logvar, sae.b_logvar))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    train(sae, batches(None, 120), lr=5e-2)
    found = sae.posterior_of(next(batches(None, 1))[0]).variance.median()
    assert 0.02 < found < 0.12  # c / (2 + c) = 0.048 for N(0, I)


@pytest.mark.parametrize("mean", ["relu", "identity"])
def test_a_latent_that_the_head_leaves_out_is_silent_and_costs_a_constant(mean: str) -> None:
    sae, x = dictionary(mean=mean, k=3), next(batches(None, 1))[0]
    losses = sae.loss(x, clock=TRAINING)
    assert isinstance(losses.latents, Drawn) and losses.latents.z is not None
    z, mu = losses.latents.z, losses.latents.dense()
    assert ((z != 0).sum(1) <= 3).all() and torch.equal(z != 0, mu != 0)
    p = (x * sae.scale - sae.b_dec) @ sae.W_enc + sae.b_enc
    largest = (p if mean == "relu" else p.abs()).topk(3).indices
    assert torch.equal(
        (mu != 0).gather(1, largest), p.gather(1, largest) > 0 if mean == "relu" else torch.ones_like(largest) > 0
    )
    found = sae.posterior_of(x)
    assert found.logvar is not None and (found.logvar[found.mean == 0] == 0).all()
    torch.testing.assert_close(sae.kl(found), 0.5 * ((mu**2 + found.variance - 1 - found.logvar) * (mu != 0)).sum(1))


def test_a_kl_turns_no_latent_off_and_a_head_does() -> None:
    """Its gradient vanishes where a latent does, unlike an L1 penalty's: L0 is told as it is."""
    rows = Planted(width=16, features=24, active=2)

    def l0(**changes: Any) -> float:
        sae = saes.create(saes.parse({"arch": "vsae_iso", "d_sae": 48, "variance": "none", **changes}), 16)
        sae.initialise(rows(512))
        train(sae, ((rows(64), None) for _ in range(100)), lr=2e-2)
        return sae.encode(rows(512)).l0().float().mean().item()

    with_kl = l0(kl_coefficient=1.0)
    assert with_kl > 8 and l0(kl_coefficient=1.0, coefficient=2.0, warmup=0) < 0.5 * with_kl
    assert l0(k=2) <= 2


@pytest.mark.parametrize("arch", ARCHS)
def test_no_gradient_is_cut_off_near_the_prior(arch: str) -> None:
    one = posterior()
    mean, logvar = (0.01 * value for value in (one.mean, one.mean.roll(1, 0)))
    mean.requires_grad_()
    logvar.requires_grad_()
    gradients = torch.autograd.grad(dictionary(arch).kl(Posterior(mean, logvar)).sum(), (mean, logvar))
    assert all((gradient != 0).all() for gradient in gradients)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mean that ReLU does not reach": (
        {"arch": "vsae_mix", "prior": "shifted"}, r"prior: shifted has the mean -1.*mean: relu does not reach",
    ),
    "more pairs than latents": ({"arch": "vsae_mix", "d_sae": 5}, "are 6 latents, but d_sae: 5"),
    "too many to differ so": (
        {"arch": "vsae_multi", "d_sae": 4, "correlation": -0.4}, r"correlation: -0\.4 .* above -0\.333",
    ),
    "not symmetric": ({"arch": "vsae_multi", "covariance": [[1, 0.5], [0.2, 1]]}, "not symmetric"),
    "not finite": ({"arch": "vsae_multi", "covariance": [[1, float("inf")], [float("inf"), 1]]}, "finite"),
    "no rows of one length": ({"arch": "vsae_multi", "covariance": [[1, 0.5], [0.5]]}, "n rows of n numbers"),
    "wider than the dictionary": (
        {"arch": "vsae_multi", "d_sae": 1, "covariance": [[1, 0], [0, 1]]}, "n from 1 to d_sae: 1",
    ),
    "a variance of 0": ({"arch": "vsae_multi", "covariance": [[0, 0], [0, 1]]}, "variance on its diagonal"),
    "singular": ({"arch": "vsae_multi", "covariance": [[1, 1], [1, 1]]}, r"which shrink: 0\.01 mends"),
    "indefinite": ({"arch": "vsae_multi", "covariance": [[1, 2], [2, 1]]}, r"which shrink: 0\.51 mends"),
    "more than there are": ({"arch": "vsae_iso", "d_sae": 4, "k": 5}, "k: 5 latents per input, but d_sae: 4"),
    "a target without a start": ({"arch": "vsae_iso", "target_l0": 3, "coefficient": 0}, "coefficient: 0 stays 0"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_priors_that_are_none_are_refused(why: str) -> None:
    case, said = REFUSED[why]
    with pytest.raises(ValidationError, match=said):
        saes.parse(case)


def test_a_shrunk_covariance_is_one() -> None:
    case = {"arch": "vsae_multi", "d_sae": 4, "covariance": [[1, 2], [2, 1]], "shrink": 0.75}
    one = posterior(m=4)
    sigma = torch.block_diag(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.eye(2)).double()
    sae: Any = saes.create(saes.parse(case), D)
    torch.testing.assert_close(sae.kl(one).double(), of_dense(one, dense(sigma)), rtol=1e-5, atol=1e-5)


def test_a_target_of_l0_starts_somewhere() -> None:
    found: Any = saes.parse({"arch": "vsae_iso", "target_l0": 8})
    assert found.coefficient == 5 and saes.parse(found.model_dump()) == found
    plain: Any = saes.parse({"arch": "vsae_iso"})
    assert (plain.coefficient, plain.target_l0, plain.k) == (0, None, None)


# Noise


def losses_in_parts(cut: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
    sae, x = dictionary(), Planted(seed=2)(200)
    first, drawn = 0, []
    for part in cut(x):
        latents = sae.loss(part, clock=TRAINING._replace(first=first)).latents
        assert isinstance(latents, Drawn) and latents.z is not None
        drawn.append(latents.z)
        first += len(part)
    return torch.cat(drawn)


def test_a_batch_in_parts_draws_what_it_draws_whole() -> None:
    """And no two parts, steps or seeds draw the same."""
    whole = losses_in_parts(lambda x: (x,))
    for cut in (lambda x: x.split(64), lambda x: x.split(37), lambda x: x.split(1)):
        torch.testing.assert_close(losses_in_parts(cut), whole)
    sae, like = dictionary(), torch.zeros(())
    draws = [sae.noise(64, sae.d_sae, Clock(step, 9, 128, first), like) for step in (0, 1) for first in (0, 64)]
    sae.seed = 5
    draws.append(sae.noise(64, sae.d_sae, Clock(0, 9, 128), like))
    assert torch.stack([one.view(-1) for one in draws]).corrcoef().fill_diagonal_(0).abs().max() < 0.15


@pytest.mark.parametrize("arch", ARCHS)
def test_after_training_the_mean_is_what_is_encoded(arch: str) -> None:
    sae, x = dictionary(arch), next(batches(None, 1))[0]
    for mode in (sae.train(), sae.eval()):
        assert torch.equal(mode.encode(x).dense(), mode.encode(x).dense())
        torch.testing.assert_close(mode.encode(x).dense(), mode.posterior_of(x).mean)
        torch.testing.assert_close(mode.loss(x).x_hat, mode(x))


def test_an_outlier_leaves_numbers() -> None:
    sae = dictionary(input_scale="none")
    x = next(batches(None, 1))[0]
    x[0] *= 1e6
    losses = sae.loss(x, clock=TRAINING)
    losses.total.backward()
    assert losses.total.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in sae.parameters())
