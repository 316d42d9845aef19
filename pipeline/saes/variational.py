"""The part that variational SAEs share: a latent is a Gaussian given its row, and has a prior.

For a row x the latents z are independent Gaussians with means mu = g((x - b_dec) W_enc + b_enc), g being ReLU or
nothing, and variances sigma^2 that are learned, log sigma^2 = (x - b_dec) W_logvar + b_logvar, or one fixed number, or
none, and then z is mu. Training decodes z = mu + sigma eps, a draw; everything after it decodes mu. The loss is

    squared error + kl_coefficient * mean over rows of KL(q(z | x) || p(z)),     the KL in nats, summed over latents.

With H(q) = 1/2 sum_i (1 + log sigma_i^2), the KL is C - H where C(mu, sigma^2) = -E_q log p(z), both less m/2 log 2 pi;
so a prior is its C alone, and C(z, 0) is -log p(z). Where there is no variance the term is C(mu, 0): the KL but for H,
which is then no number. The prior's unit is a latent's in the space that training takes place in (`input_scale`), and
kl_coefficient a weight beside the squared error as it is reduced, like that of an L1 penalty.

A KL is no sparsity penalty: of a ReLU's mean and no variance it is 1/2 sum mu^2, which shrinks latents and turns none
off. So two heads may be put on top: `k` keeps the largest means of a row, and a latent left out is at 0 with no noise,
its q being N(0, 1) whatever the row, which costs a constant; `coefficient` (or `target_l0`) adds an L1 penalty on the
means.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from . import initial, linears
from .config import Clock, Steps, ramp
from .dictionary import Weights
from .encoder import Preactivations
from .fixed_k import FixedKConfig
from .inference import ReLURule, Rule, TopKRule
from .latents import Latents
from .losses import LossInputs
from .penalties import PenaltyConfig, l1
from .steering import Steered, SteeredConfig

LOGVAR = (-16.0, 6.0)
"""Bounds of log sigma^2: where an outlying row takes it, its exponential would be no number any more."""

START = 5.0  # coefficient that a steered one starts from


class VariationalConfig(PenaltyConfig):
    """Settings of posteriors, of the KL's weight and of sparse heads."""

    mean: Literal["relu", "identity"] = Field(
        "relu", description="means of latents: ReLU of the pre-activations, or these as they are, of either sign"
    )
    variance: Literal["learned", "fixed", "none"] = Field(
        "learned", description="variances of latents: a function of the row, one number, or none: latents are means"
    )
    sigma: float = Field(
        0.1, gt=0, description="standard deviation of latents about their means, where it is learned at the start"
    )
    kl_coefficient: float = Field(3e-4, ge=0, description="weight of the KL from the prior, in nats a row")
    kl_warmup: Steps = Field(
        0.1,
        ge=0,
        description="steps over which kl_coefficient rises from 0; below 1, a share of the training",
    )
    k: int | None = Field(None, ge=1, description=FixedKConfig.model_fields["k"].description)
    coefficient: float = Field(0.0, ge=0, description=SteeredConfig.model_fields["coefficient"].description)
    target_l0: float | None = Field(None, gt=0, description=SteeredConfig.model_fields["target_l0"].description)

    @model_validator(mode="before")
    @classmethod
    def _a_target_alone_has_a_start(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("target_l0") is not None and "coefficient" not in given:
            return given | {"coefficient": START}
        return given

    def unfinished(self, steps: int) -> list[str]:
        return [name for name in super().unfinished(steps) if name != "kl_warmup" or self.kl_coefficient]

    def expect_length(self, steps: int) -> None:
        super().expect_length(steps)
        if self.steered and self.mean == "identity":
            raise ValueError(
                f"target_l0: {self.target_l0:g} of latents that are never 0, as mean: identity leaves them; take relu, "
                "or say k"
            )

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k: {self.k} latents per input, but d_sae: {self.d_sae} in all; lower k or raise d_sae")
        return self


class Posterior(NamedTuple):
    """q(z | x) of B rows: mean [B, m], and log sigma^2 [B, m]; None where there is no variance."""

    mean: Tensor
    logvar: Tensor | None

    @property
    def entropy(self) -> Tensor:
        """H of each row [B], less m/2 log 2 pi; 0 where there is no variance."""
        return self.mean.new_zeros(len(self.mean)) if self.logvar is None else 0.5 * (1 + self.logvar).sum(1)

    @property
    def variance(self) -> Tensor:
        """[B, m]."""
        return torch.zeros_like(self.mean) if self.logvar is None else self.logvar.exp()


@dataclass(frozen=True, eq=False)
class Drawn(Latents):
    """Latents in training: their values are means, which count as active or not; z [B, m] is what was drawn."""

    posterior: Posterior | None = None
    z: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LinearRule(Rule):
    """f = p."""

    name = "linear"

    def __call__(self, pre: Preactivations) -> Latents:
        return Latents.of_dense(pre.dense())


@dataclass(frozen=True, eq=False)
class SignedTopKRule(Rule):
    """f = p where |p| is among the k largest of its row."""

    name = "signed_topk"
    k: int

    def __call__(self, pre: Preactivations) -> Latents:
        p = pre.dense()
        which = p.detach().abs().topk(self.k, dim=1, sorted=False).indices
        return Latents.of_rows(p.gather(1, which), which, pre.d_sae)


class Variational(Steered):
    """A dictionary whose latents are Gaussians in training; an architecture gives the prior."""

    config: VariationalConfig
    prompt, gain, descent = 3.0, 30.0, 0.0  # gentler was not measured here

    @abstractmethod
    def marginals(self, mean: Tensor, variance: Tensor) -> Tensor:
        """C of each latent by itself [B, m], from its mean and variance: of the prior's marginals."""

    def cross_entropy(self, mean: Tensor, variance: Tensor) -> Tensor:
        """C of each row [B], or a bound from above; that of (z, 0) is exactly -log p(z), less m/2 log 2 pi."""
        return self.marginals(mean, variance).sum(1)

    def prior_covariance(self, count: int) -> Tensor:
        """The covariance of the first latents under the prior, float64 [count, count], on the CPU."""
        return torch.eye(count, dtype=torch.float64)

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        if self.config.variance == "learned":
            self.W_logvar = nn.Parameter(initial.rows("april", self.d_sae, self.d_in, generator))
            self.b_logvar = nn.Parameter(torch.full((self.d_sae,), self._logvar))

    @property
    def _logvar(self) -> float:
        return 2 * math.log(self.config.sigma)

    @property
    def rule(self) -> Rule:
        k = self.config.k
        if self.config.mean == "relu":
            return ReLURule() if k is None else TopKRule(k)
        return LinearRule() if k is None else SignedTopKRule(k)

    def kl(self, posterior: Posterior) -> Tensor:
        """KL(q || p) of each row [B] in nats, or its bound; without variance C(mu, 0)."""
        with torch.autocast(posterior.mean.device.type, enabled=False):
            return self.cross_entropy(posterior.mean, posterior.variance) - posterior.entropy

    def sampled_kl(self, posterior: Posterior, noise: Tensor) -> Tensor:
        """An unbiased estimate of the KL of each row [B], from draws: noise [S, B, m] is standard normal."""
        sigma = posterior.variance.sqrt()
        said = [self.cross_entropy(z, torch.zeros_like(z)) for z in posterior.mean + sigma * noise]
        # log q of a draw, and not -H of all: the estimate is exact where p is q
        densities = -0.5 * (noise.square() + (0.0 if posterior.logvar is None else posterior.logvar)).sum(2)
        return (torch.stack(said) + (0.0 if posterior.logvar is None else densities)).mean(0)

    @torch.no_grad()
    def posterior_of(self, x: Tensor) -> Posterior:
        """q(z | x) of rows x [B, d_in] in the data's units; mean and variance are in those of training."""
        scaled, _ = self._scaled(x.to(self.W_dec.dtype))
        pre = self._preactivations(scaled, self.weights())
        return self._posterior(pre, self.rule(pre))

    def _posterior(self, pre: Preactivations, chosen: Latents) -> Posterior:
        mean = chosen.dense()
        match self.config.variance:
            case "none":
                return Posterior(mean, None)
            case "fixed":
                logvar = torch.full_like(mean, self._logvar)
            case "learned":
                logvar = linears.centred_linear(pre.x, pre.centre, self.W_logvar, self.b_logvar).clamp(*LOGVAR)
        # a latent that the head left out says nothing of the row: its variance is a prior's, 1
        return Posterior(mean, logvar if self.config.k is None else logvar * (mean != 0))

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        chosen = self.rule(pre)
        if clock.finished or self.config.variance == "none":
            return chosen
        posterior = self._posterior(pre, chosen)
        assert posterior.logvar is not None
        spread = (0.5 * posterior.logvar).exp() * self.noise(len(posterior.mean), self.d_sae, clock, posterior.mean)
        z = posterior.mean + (spread if self.config.k is None else spread * (posterior.mean != 0))
        return Drawn(**{one.name: getattr(chosen, one.name) for one in fields(chosen)}, posterior=posterior, z=z)

    def _reconstruct(self, active: Latents, weights: Weights) -> Tensor:
        if isinstance(active, Drawn) and active.z is not None:
            return active.z @ weights.W_dec + self._past_latents(active)
        return super()._reconstruct(active, weights)

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        drawn = batch.latents.posterior if isinstance(batch.latents, Drawn) else None
        posterior = self._posterior(batch.pre, batch.latents) if drawn is None else drawn
        weight = self.config.kl_coefficient * ramp(self.config.kl_warmup, batch.clock)
        terms = {"kl": weight * self.kl(posterior).mean()}
        if self.config.coefficient > 0:
            sizes = batch.latents.map(Tensor.abs)
            terms["l1"] = self.weight(batch.clock) * l1(self.config.penalty, sizes, batch, batch.W_dec)
        return terms

    def latent_parameters(self) -> dict[str, nn.Parameter]:
        learned = ("W_logvar", "b_logvar") if self.config.variance == "learned" else ()
        return super().latent_parameters() | self._learned(*learned)

    def _reset(self, which: Tensor) -> None:
        super()._reset(which)
        if self.config.variance == "learned":
            self.W_logvar[which], self.b_logvar[which] = 0.0, self._logvar


def gaussian(mean: Tensor, variance: Tensor, at: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
    """C of N(mean, variance) and N(at, std^2) elementwise: 1/2 (log std^2 + (variance + (mean - at)^2) / std^2)."""
    std = std if isinstance(std, Tensor) else mean.new_full((), std)
    return std.log() + 0.5 * (variance + (mean - at).square()) / std.square()
