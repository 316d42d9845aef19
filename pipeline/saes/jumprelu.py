"""JumpReLU: a learned threshold per latent, trained through straight-through gradients (Rajamanoharan et al. 2024,
arXiv 2407.14435; the tanh penalty and the pre-activation loss from Anthropic, January 2025 update)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import auxk, placement
from .auxk import AuxKConfig
from .base import register
from .config import Clock, Config
from .contract import ParameterGroup
from .dictionary import Weights
from .encoder import Preactivations
from .inference import ThresholdRule
from .latents import Latents
from .losses import LossInputs, spread
from .steering import CoefficientConfig, Steered, SteeredConfig
from .uncounted import Asked, Uncounted

REACH = 4.0
"""How many times as far as a usual pre-activation thresholds are able to move in a training, on their way and back."""

USUAL_L0: float = CoefficientConfig.model_fields["target_l0"].default
"""What L0 is taken to be where none is aimed at."""


class JumpReLUSettings(AuxKConfig, SteeredConfig):
    """Settings of thresholds, beside those of AuxK.

    The defaults are for input_scale: rms, where pre-activations are alike at all widths.
    """

    encoder_scale: float = Field(0.3, gt=0, description=Config.model_fields["encoder_scale"].description)
    penalty: Literal["l0", "tanh", "l0_target"] = Field(
        "l0",
        description="what is penalised: active latents (l0), tanh(tanh_scale f times the norm of its decoder row) of "
        "each latent f (tanh), or the square of L0 / target_l0 - 1, as a share of the variance and by a coefficient "
        "that is not steered (l0_target)",
    )
    tanh_scale: float = Field(4.0, gt=0, description="the constant in the tanh penalty")
    pre_act_coefficient: float = Field(
        0.01,
        ge=0,
        description="weight of a term that pulls dead latents' pre-activations up to their thresholds; 0: off",
    )
    theta_init: float = Field(0.5, gt=0, description="where the thresholds start; about 0.001 for input_scale: unit")
    bandwidth: float = Field(
        0.05,
        gt=0,
        description="width of the kernel through which thresholds get their gradient; about 0.001 for input_scale: "
        "unit",
    )

    threshold_rate: float | None = Field(
        None,
        gt=0,
        description="learning rate of the thresholds, as a multiple of the encoder's; unset: 1, or as many times as "
        "let them come to where pre-activations are within the training (input_scale: none: 1)",
    )
    straight_through: Literal["threshold", "both"] = Field(
        "threshold",
        description="what the kernel's gradient goes to: the threshold alone, or the pre-activation as well, the other "
        "way (both)",
    )

    @property
    def steered(self) -> bool:
        return super().steered and self.penalty != "l0_target"

    @model_validator(mode="after")
    def _l0_has_a_target(self) -> Self:
        if self.penalty == "l0_target" and self.target_l0 is None:
            raise ValueError("penalty: l0_target needs target_l0, the active latents a row to aim at")
        return self

    @model_validator(mode="after")
    def _thresholds_are_reached(self) -> Self:
        if "theta_init" not in self.idle and self.input_scale == "unit" and self.theta_init >= self.encoder_scale:
            raise ValueError(
                f"theta_init: {self.theta_init} is out of reach under input_scale: unit, where pre-activations start "
                f"below encoder_scale: {self.encoder_scale}; take 0.001 for theta_init and for bandwidth, or rms"
            )
        return self


class JumpReLUConfig(JumpReLUSettings):
    """JumpReLU."""

    half_products = True
    arch: Literal["jumprelu"] = Field("jumprelu", description="architecture")


@final
@register
class JumpReLU(Steered):
    """A learned threshold per latent, with a penalty on how many latents are active.

    f = p where p > theta, else 0; theta >= 0. Its gradients pass through a rectangle kernel K of width eps around it:
    df/dtheta = -(theta / eps) K((p - theta) / eps), dH(p - theta)/dtheta = -(1 / eps) K((p - theta) / eps), and, where
    that is asked for, the same with the other sign for p.
    """

    config_type = JumpReLUConfig
    config: JumpReLUConfig
    latent_units = ("b_enc", "threshold")
    prompt, gain, descent = 3.0, 30.0, 0.0  # thresholds answer slowly
    threshold: Tensor

    def _build(self, generator: torch.Generator) -> None:
        super()._build(generator)
        # theta itself, not its logarithm: Adam's steps are of one size, and from 0.001 a logarithm takes thousands
        self.threshold = nn.Parameter(torch.full((self.d_sae,), self.config.theta_init))

    @property
    def rule(self) -> ThresholdRule:
        return ThresholdRule(self.threshold)

    def _activate(self, pre: Preactivations, clock: Clock) -> Latents:
        # with entries a little below their thresholds: the kernel reaches there
        chosen = pre.above_threshold(self.threshold.detach() - self.config.bandwidth / 2)
        values, _ = self._jump(chosen.values, chosen.per_entry(self.threshold))
        return replace(chosen, values=values, preactivations=chosen.values)

    def _asked(self, pre: Preactivations, weights: Weights, clock: Clock) -> Asked:
        config, norms = self.config, torch.linalg.vector_norm(weights.W_dec, dim=1)
        found = Asked("tanh", weights=config.tanh_scale * norms) if config.penalty == "tanh" else Asked("steps")
        return found._replace(
            theta=self.threshold,
            width=config.bandwidth,
            to_p=config.straight_through == "both",
            pulls=norms * self.dead(clock) if config.pre_act_coefficient > 0 and not self.none_dead(clock) else None,
        )

    def _terms(self, batch: LossInputs) -> dict[str, Tensor]:
        config, norms = self.config, torch.linalg.vector_norm(batch.W_dec, dim=1)
        weight, active = self.weight(batch.clock), batch.latents
        if config.penalty == "tanh":
            scale = config.tanh_scale * norms
            terms = {"tanh": weight * _tanh_per_row(active, scale).mean()}
        else:
            terms = {config.penalty: weight * self._l0(batch)}
        if config.pre_act_coefficient > 0:
            terms["pre_act"] = config.pre_act_coefficient * self._below(batch, norms).mean()
        return terms | auxk.term(self, batch)

    def _below(self, batch: LossInputs, norms: Tensor) -> Tensor:
        """[B]: how far dead latents are below their thresholds, each times the norm of its decoder row, [m]."""
        dead = self.dead(batch.clock)
        if isinstance(batch.latents, Uncounted):  # relu(theta - p) = theta - p + relu(p - theta), and few exceed it
            pulled = batch.latents.found.pulled
            if pulled is None:
                return norms.new_zeros(1)
            return pulled + (norms * dead * (self.threshold - batch.pre.means())).sum()
        if placement.runs_ahead(dead):
            p = batch.latents.preactivations
            assert p is not None and batch.latents.entries is None, "as `above_threshold` says"
            return (self.threshold - p).relu() @ (norms * dead)
        who = dead.nonzero().view(-1)
        return ((self.threshold[who] - batch.pre.columns(who)).relu() * norms[who]).sum(1)

    def _jump(self, p: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        return jump(p, theta, self.config.bandwidth, to_p=self.config.straight_through == "both")

    def _l0(self, batch: LossInputs) -> Tensor:
        active = batch.latents
        l0 = (active.sums if isinstance(active, Uncounted) else self._steps(active).sum_per_row()).mean()
        if self.config.penalty == "l0" or self.config.target_l0 is None:
            return l0
        return (l0 / self.config.target_l0 - 1).square() * self.reduced(spread(batch.y), batch.y)

    def _steps(self, active: Latents) -> Latents:
        """1 for each latent that is active, with the gradient of the step."""
        assert active.preactivations is not None
        p = active.preactivations if self.config.straight_through == "both" else active.preactivations.detach()
        _, steps = self._jump(p, active.per_entry(self.threshold))
        return active.map(lambda _: steps)

    def parameter_groups(self) -> list[ParameterGroup]:
        encoder, *rest = super().parameter_groups()
        *others, threshold = encoder.parameters  # the last that was made
        assert threshold is self.threshold
        return [ParameterGroup(others), self._learned_at([threshold]), *rest]

    def _learned_at(self, thresholds: list[nn.Parameter]) -> ParameterGroup:
        """How thresholds learn: a step moves a pre-activation by a rate's worth of every column, and them by one.

        A row's norm shared out among the latents that are to be active is what a pre-activation comes to be about.
        """
        config = self.config
        if config.threshold_rate is not None:
            return ParameterGroup(thresholds, times=config.threshold_rate, kept="not negative")
        norm = {"rms": self.d_in**0.5, "per_token": self.d_in**0.5, "unit": 1.0, "none": 0.0}[config.input_scale]
        reach = REACH * norm / (config.target_l0 or USUAL_L0) ** 0.5
        return ParameterGroup(thresholds, kept="not negative", reach=reach, stride=config.bandwidth / 2)

    def latent_parameters(self) -> dict[str, nn.Parameter]:
        return super().latent_parameters() | self._learned("threshold")

    def _reset(self, which: Tensor) -> None:
        super()._reset(which)
        self.threshold[which] = self.config.theta_init


def _tanh_per_row(active: Latents, scale: Tensor) -> Tensor:
    """[B]: the sum of tanh(scale f) over each row's latents."""
    if isinstance(active, Uncounted):  # whose sums were asked for with this scale
        return active.sums
    of_each = active.per_entry(scale)
    return active.map(lambda f: (of_each * f).tanh()).sum_per_row()


def jump(p: Tensor, theta: Tensor, bandwidth: float, *, to_p: bool = False) -> tuple[Tensor, Tensor]:
    """(p H(p - theta), H(p - theta)) elementwise, with the straight-through gradients; theta broadcasts to p.

    to_p: p, too, receives what the kernel gives theta, with the other sign.
    """
    return _Jump.apply(p, theta.expand_as(p), bandwidth, to_p)


class _Jump(torch.autograd.Function):
    """The jump and its step, of p and theta of one shape."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, bandwidth: float, to_p: bool) -> tuple[Tensor, Tensor]:
        active = p > theta
        ctx.save_for_backward(p, theta, active)
        ctx.bandwidth, ctx.to_p = bandwidth, to_p
        ctx.set_materialize_grads(False)
        return p * active, active.to(p.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor | None, grad_step: Tensor | None) -> tuple[Tensor | None, ...]:
        p, theta, active = ctx.saved_tensors
        kernel = ((p - theta).abs() < ctx.bandwidth / 2) / -ctx.bandwidth
        grad_theta = torch.zeros_like(p)
        if grad_f is not None:
            grad_theta += grad_f * theta
        if grad_step is not None:
            grad_theta += grad_step
        grad_theta *= kernel
        grad_p = None if grad_f is None else grad_f * active
        if ctx.to_p:
            grad_p = -grad_theta if grad_p is None else grad_p - grad_theta
        return grad_p, grad_theta, None, None
