"""What the tests of dictionaries share: small settings, planted data, a bare training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.pipeline import saes
from sae.pipeline.saes import SAE, Clock

D, M, B = 12, 32, 64

SMALL: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4, "prefixes": (8, 20)},
    "l1": {"coefficient": 0.2},
    "jl": {"jl_warmup": 0.1},
    "hybrid": {"coefficient": 0.02, "warmup": 0.1, "jl_coefficient": 0.05, "jl_start": 0.2, "jl_warmup": 0.1},
    "jumprelu": {"coefficient": 0.01, "theta_init": 0.05, "bandwidth": 0.1, "warmup": 0},
    "gated": {"coefficient": 0.2},
    "p_anneal": {"coefficient": 0.2},
    "crosscoder": {"k": 4},
    "molt": {"ranks": (4, 2), "counts": (1, 4), "target_l0": 2.0},
    "fsq": {"levels": (5, 4), "groups": 3},
    "vae": {"units": 4, "beta_warmup": 0},
    "nvae": {"units": 3, "groups": 2, "hidden": 8, "beta_warmup": 0},
}
"""What an architecture needs set to work at these sizes."""

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "topk": [
        {"decoder_norm": "free", "ghost_grads": True, "k_start": 8},
        {"b_dec_init": "none", "pre_encoder_bias": False, "encoder_bias": False},
        {"input_scale": "per_token"},
    ],
    "l1": [
        {"target_l0": 5.0},
        {"decoder_norm": "free", "penalty": "decoder_norm", "init": "april"},
        {"penalty": "per_token", "pre_encoder_bias": False, "reduction": "mean_d", "coefficient": 0.05},
        {"penalty": "decoder_norm", "encoder_bias": False, "input_scale": "none", "reduction": "fvu"},
        {"decoder_norm": "none", "ghost_grads": True, "input_scale": "unit", "coefficient": 0.02},
    ],
    "jl": [{"jl_on": "both", "jl_form": "relu_squared", "jl_rows": 9, "encoder_bias": True}],
    "batchtopk": [{"input_scale": "per_token", "k_start": 8}],
    "matryoshka": [{"prefixes": (0.5,), "aux_coefficient": 0.0}],
    "jumprelu": [
        {"penalty": "l0_target", "target_l0": 3.0, "coefficient": 0.1, "pre_act_coefficient": 3e-3},
        {"penalty": "tanh", "decoder_norm": "free", "input_scale": "rms", "theta_init": 0.3, "bandwidth": 0.5},
    ],
    "gated": [{"encoder_bias": False, "penalty": "decoder_norm", "decoder_norm": "free"}],
    "p_anneal": [{"target_l0": 5.0}],
    "shifted_relu": [{"coefficient": 0.1}],
    "vsae_iso": [{"mean": "identity", "variance": "fixed", "decoder_norm": "free", "k": 6}],
    "vsae_mix": [{"prior": "shifted", "mean": "identity", "coefficient": 0.1, "input_scale": "per_token"}],
    "vsae_multi": [{"covariance": ((1.0, 0.5), (0.5, 2.0)), "k": 4}],
    "crosscoder": [{"k": 32, "sparsity": "l1", "coefficient": 0.2, "target_l0": None}],
}
"""Further settings to meet the contract with, beside an architecture's defaults."""

DICTIONARIES = [tag for tag, kind in saes.ARCHITECTURES.items() if issubclass(kind, SAE)]

CASES = [{"arch": tag} | variant for tag in DICTIONARIES for variant in ({}, *VARIANTS.get(tag, []))]

Batches = Iterator[tuple[Tensor, Tensor | None]]


def settings(case: dict[str, Any]) -> saes.Config:
    """Small settings of a sparse dictionary."""
    found = small(case)
    assert isinstance(found, saes.Config)
    return found


def small(case: dict[str, Any], **common: Any) -> saes.TrainableConfig:
    """Small settings of anything; those that are not everybody's where it has them."""
    known = saes.ARCHITECTURES[case["arch"]].config_type.model_fields
    common = {"d_sae": M, "b_dec_init": "mean"} | common
    return saes.parse({k: v for k, v in common.items() if k in known} | SMALL.get(case["arch"], {}) | case)


class Planted:
    """Rows that are sparse sums of unit features, far from the origin: what a dictionary should find."""

    def __init__(self, width: int = D, features: int = 24, active: int = 3, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.features = F.normalize(torch.randn(features, width, generator=self.generator), dim=1)
        self.active = active

    def __call__(self, count: int = B) -> Tensor:
        scores = torch.rand(count, len(self.features), generator=self.generator)
        sizes = 0.5 + torch.rand(count, self.active, generator=self.generator)
        which = scores.topk(self.active, dim=1).indices
        return 3 * F.embedding_bag(which, self.features, per_sample_weights=sizes, mode="sum") + 1


class GroundTruth:
    """Synthetic ground truth: unit features in groups; a row picks a group and distinct members of it.

    A member of rank r in its group is drawn with weight 0.99^r; coefficients are uniform on [0, 1]. groups = 1 is the
    sparse mode in which every feature may meet every other.
    """

    def __init__(self, width: int, features: int, active: int, groups: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.features = F.normalize(torch.randn(features, width, generator=self.generator), dim=1)
        self.active = active
        self.group = torch.arange(features) * groups // features  # sizes differ by one at most, none is left out
        rank = torch.cat([torch.arange(int((self.group == g).sum())) for g in range(groups)])
        self.log_weight = rank * torch.log(torch.tensor(0.99))
        self.groups = groups

    def __call__(self, count: int) -> Tensor:
        picked = torch.randint(0, self.groups, (count, 1), generator=self.generator)
        uniform = torch.rand(count, len(self.features), generator=self.generator)
        keys = self.log_weight - (-uniform.log()).log()  # Gumbel keys: the largest are a draw without replacement
        which = keys.masked_fill(self.group != picked, -torch.inf).topk(self.active, dim=1).indices
        sizes = torch.rand(count, self.active, generator=self.generator)
        return F.embedding_bag(which, self.features, per_sample_weights=sizes, mode="sum")


def batches(d_out: int | None, count: int) -> Batches:
    """Planted rows, with targets of width d_out for a transcoder."""
    rows, into = Planted(), torch.randn(D, d_out or 1, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        x = rows()
        yield x, None if d_out is None else (x @ into).relu()


def made(config: saes.Config, d_out: int | None = None, seed: int = 0) -> SAE:
    sae = saes.create(config, D, d_out, seed=seed)
    sae.initialise(*next(batches(d_out, 1)))
    return sae


def train(
    sae: SAE, data: Batches, lr: float = 3e-3, optimizer: torch.optim.Optimizer | None = None
) -> list[saes.SparseLosses]:
    optimizer = optimizer or torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    history = []
    for step, (x, y) in enumerate(data):
        losses = sae.loss(x, y, Clock(step, 1000, len(x)))
        optimizer.zero_grad()
        losses.total.backward()
        sae.track(sae.observe(losses))
        sae.before_step()
        optimizer.step()
        sae.after_step()
        history.append(losses)
    return history


def one_thread() -> Iterator[None]:
    """On tensors this small a second thread only waits, for milliseconds a product when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
