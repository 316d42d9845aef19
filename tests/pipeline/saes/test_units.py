"""A weight that is a share of the loss means the same whatever the loss is measured in."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from support.saes_kit import D, Planted, one_thread
from torch import Tensor

from sae.pipeline import saes
from sae.pipeline.saes import Clock, SparseLosses
from sae.pipeline.train.alignment import AlignConfig, Alignment

single = pytest.fixture(autouse=True, scope="module")(one_thread)

STEPS, ROWS, M = 12, 96, 24
WITHOUT_BIASES = {"b_dec_init": "none", "pre_encoder_bias": False, "encoder_bias": False}
"""An offset is in the units of the rows, so that Adam's steps of one size move it by other shares of them."""

SCALES = [*product(("sum_d", "mean_d", "fvu"), ("rms", "unit", "none"))]


def trained(case: dict[str, Any], reduction: str, scale: str, align: AlignConfig | None = None) -> list[Tensor]:
    """The weights of two dictionaries after a few steps on one batch, pulled together where `align` says so.

    One batch, for `fvu` is a share of each batch's own variance.
    """
    common = {"d_sae": M, "reduction": reduction, "input_scale": scale, "dead_after": 3 * ROWS, **WITHOUT_BIASES}
    x = (7 * Planted(seed=1)(ROWS)).double()
    members = [saes.create(saes.parse(common | case), D, seed=seed).double() for seed in range(2)]
    for sae in members:
        sae.initialise(x)
    alignment = None if align is None else Alignment(align, members)
    parameters = [parameter for sae in members for parameter in sae.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=0.01, eps=1e-300)
    for step in range(STEPS):
        losses = [sae.loss(x, clock=Clock(step, STEPS, ROWS)) for sae in members]
        total = torch.stack([one.total for one in losses]).sum()
        if alignment is not None:
            alignment.search(losses, step)
            total = total + alignment.weighted(alignment.term(losses), losses, step)
        optimiser.zero_grad()
        total.backward()
        for sae, one in zip(members, losses, strict=True):
            sae.before_step()
            sae.track(sae.observe(one))
        optimiser.step()
        for sae in members:
            sae.after_step()
    return [table.detach() for sae in members for table in (sae.W_enc_rows, sae.W_dec)]


def at_work(case: dict[str, Any], without: dict[str, Any], align: AlignConfig | None = None) -> None:
    """Check that every reduction and scale leads to the same weights, and that the term has a part in them."""
    expected = trained(case, *SCALES[0], align)
    for reduction, scale in SCALES[1:]:
        torch.testing.assert_close(trained(case, reduction, scale, align), expected, rtol=1e-6, atol=1e-8)
    other = trained(without, *SCALES[0])
    assert max((a - b).abs().max().item() for a, b in zip(expected, other, strict=True)) > 1e-3


@pytest.mark.parametrize("share", ["error", "variance"])
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_auxk(arch: str, share: str) -> None:
    case = {"arch": arch, "k": 1, "aux_k": 3, "aux_coefficient": 0.5, "aux_share": share}
    at_work(case, case | {"aux_coefficient": 0.0})


def test_ghost_gradients() -> None:
    case = {"arch": "topk", "k": 1, "aux_coefficient": 0.0, "ghost_grads": True}
    # exp(p) is in the units of p, so scales differ by definition: reductions alone
    expected = trained(case, "sum_d", "rms")
    for reduction in ("mean_d", "fvu"):
        torch.testing.assert_close(trained(case, reduction, "rms"), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("by", ["dec", "hid", "x_hat"])
def test_alignment(by: Any) -> None:
    case = {"arch": "topk", "k": 3, "aux_coefficient": 0.0}
    at_work(case, case, AlignConfig(by=by, weight=0.5, warmup=4))


def test_a_target_of_l0() -> None:
    case = {
        "arch": "jumprelu",
        "penalty": "l0_target",
        "target_l0": 3.0,
        "coefficient": 0.5,
        "warmup": 0,
        "theta_init": 0.3,
        "bandwidth": 0.4,
        "pre_act_coefficient": 0,  # is no share
    }
    # thresholds are in the units of latents: reductions alone
    expected = trained(case, "sum_d", "rms")
    for reduction in ("mean_d", "fvu"):
        torch.testing.assert_close(trained(case, reduction, "rms"), expected, rtol=1e-6, atol=1e-8)


def test_a_share_of_the_data_is_one_of_the_loss_of_the_mean() -> None:
    y = Planted(seed=3)(ROWS)
    for reduction in ("sum_d", "mean_d", "fvu"):
        sae = saes.create(saes.parse({"arch": "topk", "d_sae": M, "k": 2, "reduction": reduction}), D)
        losses = SparseLosses({}, Clock(0, 1, ROWS), sae.encode(y), y, sae.target_scale, y)
        alignment = Alignment(AlignConfig(weight=0.25, warmup=0), [sae, sae])
        expected = 0.25 * sae.squared_error(y.mean(0).expand_as(y), y)
        torch.testing.assert_close(alignment.weighted(torch.ones(()), [losses, losses], 0), expected)
