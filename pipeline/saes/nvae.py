"""NVAE: a hierarchy of Gaussian codes (Vahdat & Kautz 2020, arXiv 2007.03898), of rows where theirs is of images.

Groups z_1, z_2, ... of codes are decoded from the top down through a state h: the prior of a group is a function of h,
which is made of the groups before it, and the posterior says where it differs from that prior,

    p(z_g | z_<g) = N(m, s^2),     q(z_g | z_<g, x) = N(m + dm, (s ds)^2),
    KL_g = 1/2 sum (dm^2 / s^2 + ds^2 - log ds^2 - 1).

Cells are residual, with a normalisation, swish and a squeeze-excitation gate. While beta warms up, groups are weighed
by what they say, as a running mean has it, so that none is switched off before it has learned to speak. `spectral`
penalises the largest singular value of every matrix of the cells, found by a step of the power method after each of
training's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from . import placement
from .base import register
from .config import FINISHED, Clock
from .latents import Latents
from .losses import Losses, Observed, PlainLosses
from .scaled import linear
from .vae import GaussianConfig, Gaussians, standard_kl
from .variational import LOGVAR, Posterior

MEMORY = 0.02
"""Weight of the newest batch in what a group is known to say."""

SQUEEZED = 4
"""How many times narrower the middle of a gate is than the state."""


class NVAEConfig(GaussianConfig):
    """Groups of Gaussian codes, and the cells between them."""

    arch: Literal["nvae"] = Field("nvae", description="architecture")
    units: int = Field(8, ge=1, description=GaussianConfig.model_fields["units"].description)
    groups: int = Field(3, ge=2, le=64, description="groups of codes, each with a prior that those before it make")
    hidden: int = Field(128, ge=4, description="width of the state between groups, and of the cells")
    spectral: float = Field(0.0, ge=0, description="weight of the largest singular values of the cells' matrices")

    @property
    def latents(self) -> int:
        return self.groups * self.units


@dataclass(frozen=True, eq=False)
class HierarchyLosses(PlainLosses):
    """Beside the loss, the mean KL of each group [groups]."""

    of_groups: Tensor


class Cell(nn.Module):
    """h + gate * W_2 swish(W_1 swish(norm(h))), its gate in (0, 1) from a narrow layer on what it weighs."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = (linear(width, width, generator) for _ in range(2))
        self.squeeze = linear(width, max(1, width // SQUEEZED), generator)
        self.excite = linear(max(1, width // SQUEEZED), width, generator)

    def forward(self, h: Tensor) -> Tensor:
        inner = self.second(F.silu(self.first(F.silu(self.norm(h)))))
        return h + inner * self.excite(F.relu(self.squeeze(inner))).sigmoid()


class Pass(NamedTuple):
    """The groups of some rows, all [B, groups * units]: codes that were decoded, means in their priors' units, KLs."""

    z: Tensor
    means: Tensor
    kls: Tensor
    y_hat: Tensor


@final
@register
class NVAE(Gaussians):
    """A hierarchy of Gaussian codes, each group's prior made from the groups before it, posteriors relative to it.

    L = -log p(y | z) + beta sum_g KL_g, the mean over rows. Training decodes draws, everything after it the means.
    """

    config_type = NVAEConfig
    config: NVAEConfig
    spoken: Tensor

    def __init__(self, config: NVAEConfig, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__(config, d_in, d_out, seed)
        random, width, units = torch.Generator().manual_seed(seed), config.hidden, config.units
        self.stem = linear(d_in, width, random)
        self.start = nn.Parameter(0.1 * torch.randn(width, generator=random))
        each = range(config.groups)
        self.upwards = nn.ModuleList(Cell(width, random) for _ in each)
        self.downwards = nn.ModuleList(Cell(width, random) for _ in each)
        self.priors = nn.ModuleList(linear(width, 2 * units, random, gain=0.1) for _ in each[1:])
        self.posteriors = nn.ModuleList(linear(2 * width, 2 * units, random, gain=0.5) for _ in each)
        self.takes = nn.ModuleList(linear(units, width, random) for _ in each)
        self.head = linear(width, self.d_out, random)
        self.head.register_parameter("bias", None)  # which is b_dec
        self._register_sigma()
        self.register_buffer("spoken", torch.ones(config.groups))
        if config.spectral:
            for name, matrix in self._matrices().items():
                self.register_buffer(f"singular_{name}", F.normalize(torch.randn(len(matrix), generator=random), dim=0))

    @property
    def width(self) -> int:
        return self.config.latents

    def encode(self, x: Tensor) -> Latents:
        """The means of all groups, those further down given the means further up."""
        return Latents.of_dense(self._pass(self._scaled(x), None).z)

    def unit_means(self, x: Tensor) -> Tensor:
        return self._pass(self._scaled(x), None).means

    def decode(self, codes: Latents) -> Tensor:
        h = self._top(codes.batch)
        for group, z in enumerate(codes.dense().split(self.config.units, dim=1)):
            h = self._down(group, h, z)
        return self._out(h) / self.target_scale

    def kls(self, x: Tensor) -> Tensor:
        """[B, groups * units]: the KL of each code from its prior given the means further up, in nats."""
        return self._pass(self._scaled(x), None).kls

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        y = self._target(x, target)
        noise = None if clock.finished else self.noise(len(x), self.width, clock, self.b_dec)
        found = self._pass(self._scaled(x), noise)
        of_groups = found.kls.view(len(x), self.config.groups, -1).sum(2).mean(0)
        weights = self._balance(clock)
        terms = self.likelihood(found.y_hat, y) | {"kl": self.beta(clock) * (weights * of_groups).sum()}
        if self.config.spectral:
            terms["spectral"] = self.config.spectral * self._largest().sum()
        return HierarchyLosses(terms, clock, found.y_hat / self.target_scale, of_groups.detach())

    @torch.no_grad()
    def observe(self, losses: Losses) -> Observed:
        """What each group said."""
        assert isinstance(losses, HierarchyLosses), "those of `loss`"
        return super().observe(losses)._replace(numbers=losses.of_groups)

    @torch.no_grad()
    def track(self, *parts: Observed) -> None:
        rows = placement.numbers([part.rows for part in parts], self.spoken)
        said = torch.stack([part.numbers for part in parts])
        self.spoken.lerp_((rows @ said) / rows.sum(), MEMORY)

    @torch.no_grad()
    def after_step(self) -> None:
        """A step of the power method for each matrix whose largest singular value is penalised."""
        for name, matrix in self._matrices().items() if self.config.spectral else ():
            left = getattr(self, f"singular_{name}")
            left.copy_(F.normalize(matrix @ F.normalize(matrix.T @ left, dim=0), dim=0))

    def _matrices(self) -> dict[str, Tensor]:
        """The matrices of the cells, by a name without dots."""
        of_cells = ((name, one) for name, one in self.named_parameters() if one.dim() == 2 and "wards" in name)
        return {name.replace(".", "_"): one for name, one in of_cells}

    def _largest(self) -> Tensor:
        """The largest singular value of each of them, as far as it is known."""
        found = []
        for name, matrix in self._matrices().items():
            left = getattr(self, f"singular_{name}")
            right = F.normalize(matrix.detach().T @ left, dim=0)
            found.append(left @ matrix @ right)
        return torch.stack(found)

    def _balance(self, clock: Clock) -> Tensor:
        """Weights of the groups' KLs, 1 on average: while beta warms up by what each says, then equal."""
        weights = self.spoken / self.spoken.mean().clamp_min(1e-6)
        done = 1.0 if not self.config.beta else self.beta(clock) / self.config.beta
        return torch.ones_like(weights) if done >= 1 else weights

    def _pass(self, x: Tensor, noise: Tensor | None) -> Pass:
        """All groups for rows x [B, d_in] in the scale of training; without noise [B, groups * units] their means."""
        seen = [self.upwards[0](self.stem(x))]
        for cell in self.upwards[1:]:
            seen.append(cell(seen[-1]))
        h, codes, means, kls = self._top(len(x)), [], [], []
        for group in range(self.config.groups):
            mean, logvar = self._prior(group, h)
            both = torch.cat([h, seen[-1 - group]], dim=1)
            shift, change = self.posteriors[group](both).float().chunk(2, dim=1)
            relative = Posterior(shift, change.clamp(*LOGVAR))
            z = mean + (0.5 * logvar).exp() * relative.mean
            if noise is not None:
                part = noise[:, group * self.config.units : (group + 1) * self.config.units]
                z = z + (0.5 * logvar).exp() * relative.variance.sqrt() * part
            codes.append(z)
            means.append(relative.mean)
            kls.append(standard_kl(relative))
            h = self._down(group, h, z)
        return Pass(torch.cat(codes, dim=1), torch.cat(means, dim=1), torch.cat(kls, dim=1), self._out(h))

    def _top(self, rows: int) -> Tensor:
        return self.start.expand(rows, -1)

    def _prior(self, group: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance [B, units] of a group given the state; the first is N(0, 1)."""
        if group == 0:
            zeros = h.new_zeros(len(h), self.config.units)
            return zeros, zeros
        mean, logvar = self.priors[group - 1](F.silu(h)).float().chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def _down(self, group: int, h: Tensor, z: Tensor) -> Tensor:
        return self.downwards[group](h + self.takes[group](z))

    def _out(self, h: Tensor) -> Tensor:
        return self.head(h) + self.b_dec
