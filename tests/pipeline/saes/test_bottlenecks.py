"""FSQ, VAE and NVAE against formulas written out, and what their codes cost beside a sparse dictionary's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.saes_kit import D, Planted, batches, one_thread, settings, small
from support.saes_kit import made as made_sae
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from sae.pipeline import saes
from sae.pipeline.metrics.code_rate import CodeRate, entropies
from sae.pipeline.metrics.metric import Encoded
from sae.pipeline.saes import Clock, Coder
from sae.pipeline.saes.fsq import FSQ
from sae.pipeline.saes.nvae import NVAE
from sae.pipeline.saes.vae import VAE

single = pytest.fixture(autouse=True, scope="module")(one_thread)


def made(arch: str, **case: Any) -> Any:
    found = saes.trainable(small({"arch": arch, **case}), D)
    found.initialise(Planted()(512))
    return found


def trained(it: Any, steps: int = 120) -> Any:
    optimiser = torch.optim.Adam(it.parameters(), lr=5e-3)
    for step, (x, _) in enumerate(batches(None, steps)):
        losses = it.loss(x, None, Clock(step, steps, len(x)))
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        it.after_step()
        it.track(it.observe(losses))
    return it


@pytest.mark.parametrize("levels", [(3,), (8, 6, 5), (4, 7)])
def test_a_channel_has_its_levels_and_rounding_lets_gradients_pass(levels: tuple[int, ...]) -> None:
    it: FSQ = made("fsq", levels=levels, groups=2)
    x = 100 * torch.randn(4000, D)
    rounded = it._rounded(it._bounded(it._scaled(x)))
    for channel, count in enumerate(levels):
        assert rounded[:, :, channel].unique().tolist() == [float(v - count // 2) for v in range(count)]
    codes = it.encode(x)
    assert codes.l0().eq(2).all() and codes.dense().shape == (4000, 2 * it.config.codebook)
    values = (rounded / torch.tensor(levels).div(2, rounding_mode="floor")).flatten(1)
    torch.testing.assert_close(it.decode(codes), (values @ it.W_dec + it.b_dec) / it.target_scale, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(it.loss(x).x_hat, it(x), rtol=1e-4, atol=1e-3)
    x = Planted()(5)
    unit = torch.tensor(levels).div(2, rounding_mode="floor")
    half, offset = (torch.tensor(levels) - 1) * 0.999 / 2, torch.tensor([0.5 * (n % 2 == 0) for n in levels])
    z = it.encoder(it._scaled(x)).view(5, 2, -1).detach().requires_grad_()
    bounded = (z + (offset / half).atanh()).tanh() * half - offset
    passed_by = (bounded + (bounded.round() - bounded).detach()) / unit
    y_hat = passed_by.flatten(1) @ it.W_dec.detach() + it.b_dec.detach()
    (y_hat - x * it.target_scale).square().sum(1).mean().backward()
    it.loss(x).total.backward()
    assert z.grad is not None
    torch.testing.assert_close(it.encoder[0].bias.grad, z.grad.flatten(1).sum(0), rtol=1e-3, atol=1e-4)


def test_kls_are_torchs() -> None:
    it: VAE = made("vae", hidden=6)
    x = Planted()(20)
    q = it.posterior(x)
    assert q.logvar is not None
    expected = kl_divergence(Normal(q.mean, (q.logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(it.kls(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(it.unit_means(x), q.mean)
    free = made("vae", hidden=6, free_bits=0.3)
    free.load_state_dict(it.state_dict())
    torch.testing.assert_close(free.loss(x).terms["kl"], expected.clamp_min(0.3).sum(1).mean())
    half = (it(x) - x).square().sum(1).mean() * it.target_scale**2 / 2
    torch.testing.assert_close(it.loss(x).total, half + expected.sum(1).mean(), rtol=1e-4, atol=1e-4)


def test_the_hierarchys_kls_are_torchs_and_every_group_speaks() -> None:
    it: NVAE = trained(made("nvae", groups=2, units=3, hidden=16, beta=0.3))
    x = Planted()(64)
    found, units = it._pass(it._scaled(x), None), it.config.units
    seen = [it.upwards[0](it.stem(it._scaled(x)))]
    seen.append(it.upwards[1](seen[0]))
    h = it.start.expand(64, -1)
    for group in range(2):
        mean, logvar = (
            (torch.zeros(64, units),) * 2 if group == 0 else it.priors[0](torch.nn.functional.silu(h)).chunk(2, 1)
        )
        shift, change = it.posteriors[group](torch.cat([h, seen[1 - group]], 1)).chunk(2, 1)
        prior, scale = Normal(mean, (logvar / 2).exp()), (logvar / 2).exp()
        posterior = Normal(mean + scale * shift, scale * (change / 2).exp())
        own = slice(group * units, (group + 1) * units)
        torch.testing.assert_close(found.kls[:, own], kl_divergence(posterior, prior), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.z[:, own], posterior.mean, rtol=1e-4, atol=1e-5)
        assert found.kls[:, own].sum(1).mean() > 0.05
        h = it.downwards[group](h + it.takes[group](posterior.mean))
    codes = it.encode(x)
    torch.testing.assert_close(it.decode(codes), it(x))
    assert it.spoken.min() > 0 and not torch.equal(it.spoken, torch.ones(2))


def test_the_largest_singular_values_are_found() -> None:
    it: NVAE = trained(made("nvae", spectral=1e-3, hidden=8), steps=60)
    for _ in range(60):
        it.after_step()
    expected = torch.stack([torch.linalg.matrix_norm(one, 2) for one in it._matrices().values()])
    torch.testing.assert_close(it._largest(), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("arch", ["vae", "nvae", "fsq"])
def test_it_learns(arch: str) -> None:
    it = made(arch, **({"sigma": "learned"} if arch != "fsq" else {}))
    x = Planted()(512)
    before = it.loss(x).total.item()
    trained(it)
    assert it.loss(x).total.item() < before
    if arch == "fsq":
        assert ((it(x) - x).square().sum() / (x - x.mean(0)).square().sum()).item() < 0.8


def test_noise_does_not_depend_on_the_parts_of_a_batch() -> None:
    it, x = made("vae"), Planted()(150)
    whole = it.loss(x, None, Clock(5, 10, 150)).x_hat
    parts = [it.loss(part, None, Clock(5, 10, 150, first)).x_hat for first, part in ((0, x[:70]), (70, x[70:]))]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ({"arch": "fsq", "levels": (2, 5)}, "a channel has 3 values or more"),
        ({"arch": "fsq", "levels": (8,) * 8}, "16,777,216|134,217,728"),
        ({"arch": "vae", "reduction": "fvu"}, "sigma: learned is for a loss in nats.* reduction: fvu"),
        ({"arch": "nvae", "groups": 1}, "groups"),
        ({"arch": "vae", "d_sae": 3}, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused(case: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        saes.parse(case)


# What codes cost


def told(coder: Coder, x: Tensor) -> dict[str, Any]:
    metric = CodeRate(coder)
    with torch.no_grad():
        for part in x.split(100):
            codes = coder.encode(part)
            metric.update(Encoded(part, part, codes, coder.decode(codes)))
        return dict(metric.result())


def test_entropies_of_columns() -> None:
    numbers = torch.randint(-2, 3, (200, 5)).float() * (torch.rand(200, 5) < 0.5)
    expected = 0.0
    for column in numbers.T:
        shares = column.unique(return_counts=True)[1].double() / 200
        expected -= (shares * shares.log()).sum().item()
    assert entropies(numbers) == pytest.approx(expected)
    assert entropies(torch.zeros(20, 3)) == 0


def test_what_codes_cost_is_counted_alike() -> None:
    x = Planted()(600)
    fsq: FSQ = trained(made("fsq", groups=3))
    found = told(fsq, x)
    counts = fsq.encode(x).fired().view(3, -1).double()
    shares = counts / counts.sum(1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(1)
    assert found["bits"] == pytest.approx(entropy.sum().item() / 0.6931471805599453)
    assert found["perplexity"] == pytest.approx(entropy.mean().exp().item())
    assert (
        found["codebook_usage"] == pytest.approx((counts > 0).double().mean().item()) and found["active_units"] is None
    )
    sae = made_sae(settings({"arch": "topk"})).eval()
    sparse = told(sae, x)
    assert sparse["active_parameters"] == pytest.approx(sae.encode(x).l0().double().mean().item() * 2 * D)
    assert 0 < sparse["bits"] < 32 * sae.d_sae and sparse["codebook_usage"] is None
    vae = told(trained(made("vae", beta=0.1)), x)
    assert 0 < vae["active_units"] <= 4 and vae["bits"] > 0
    assert vae["active_parameters"] == sum(p.numel() for p in made("vae").parameters())
