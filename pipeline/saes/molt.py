"""MOLT: a sparse mixture of linear transforms, in the place of a layer (Anthropic, Circuits Updates, 2025).

A transform is a matrix of low rank and a gate that says for each row whether it acts, and how strongly. A transcoder's
latent writes one direction, so that its Jacobian at a row has a rank of L0 at most; few transforms may have much of it.

    phi_t = gate(e_t . x - b_t),     y_hat = sum_t phi_t U_t V_t x + b_dec,     U_t V_t of rank r_t

All the rows of V lie in one table, and those of U in another, in the order of their transforms: two products with the
gates between them are the mixture. ||U_t V_t||_F^2 is tr((U_t^T U_t) (V_t V_t^T)), from matrices [r_t, r_t], batched
for transforms of equal rank.

What a gate takes from its value its transform can give back, so every transform is kept at one norm, the root of d_out,
as a sparse dictionary's decoder rows are kept at 1. Left free, a penalty on phi_t ||U_t V_t||_F shrinks norms where it
should shut gates, or makes U_t V_t of large matrices that cancel, until all transforms, or all but one, are dead: the
collapse that this architecture is known for. Against the rest of it gates start open, the penalty's coefficient is
warmed up and steered, and transforms that never act go on learning from the residual.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from . import initial, placement, sparse
from .base import register
from .config import FINISHED, Clock, Config
from .contract import Coder
from .jumprelu import jump
from .losses import CodedLosses, Losses, Observed
from .steering import CoefficientConfig, Steering
from .widths import Width, widths

SPARSE_BELOW = 0.3
"""Share of the rows of V that act, up to which a CPU is quicker going transform by transform through those rows."""

TINY = 1e-12
"""The least square of a norm that is divided by."""


class MOLTConfig(CoefficientConfig):
    """Transforms, their gates, and a penalty on what acts."""

    arch: Literal["molt"] = Field("molt", description="architecture")
    ranks: tuple[float, ...] = Field(
        (1 / 3, 1 / 6, 1 / 12, 1 / 24, 1 / 48),
        description="ranks of transforms; below 1, shares of the inputs' width, as published",
    )
    counts: tuple[int, ...] = Field(
        (1, 2, 4, 8, 16), description="transforms of each of these ranks; published are multiples of 1,2,4,8,16"
    )
    gate: Literal["jumprelu", "relu"] = Field(
        "jumprelu", description="function of a gate: with a learned threshold, or none"
    )
    penalty: Literal["tanh", "l1"] = Field(
        "tanh",
        description="what is penalised of u, a gate times its transform's norm over the root of the outputs' width: "
        "tanh(tanh_scale u), or u itself (l1)",
    )
    tanh_scale: float = Field(4.0, gt=0, description="the constant in the tanh penalty")
    target_l0: float | None = Field(4.0, gt=0, description=CoefficientConfig.model_fields["target_l0"].description)
    gate_start: float = Field(
        1.0, description="gates' biases at the start, in deviations of what is added to them; above 0 most are open"
    )
    theta_init: float = Field(0.05, gt=0, description="where the thresholds of gates start")
    bandwidth: float = Field(0.05, gt=0, description="width of the kernel through which thresholds get their gradient")
    aux_coefficient: float = Field(
        1.0, ge=0, description="weight of a term in which transforms that never act explain the residual; 0: off"
    )
    dead_after: float = Field(0.05, gt=0, description=Config.model_fields["dead_after"].description)
    standardise: bool = Field(
        True, description="train on inputs less each column's mean and over its deviation; otherwise times one number"
    )

    @model_validator(mode="after")
    def _they_pair_up(self) -> Self:
        if len(self.ranks) != len(self.counts) or not self.ranks:
            raise ValueError(f"ranks: {len(self.ranks)} of them, but counts: {len(self.counts)}; give a count for each")
        if min(self.ranks) <= 0 or any(rank >= 1 and rank != int(rank) for rank in self.ranks) or min(self.counts) < 1:
            raise ValueError("ranks are whole, or shares below 1, and counts are 1 or more")
        if self.target_l0 is not None and self.target_l0 >= self.latents:
            raise ValueError(
                f"target_l0: {self.target_l0:g} of {self.latents} transforms leaves nothing to choose; lower it"
            )
        return self

    @property
    def latents(self) -> int:
        return sum(self.counts)

    @property
    def usual_rate(self) -> float:
        return 3e-3

    def groups(self, d_in: int) -> list[tuple[int, int]]:
        """(rank, transforms of it) for inputs of a width."""
        ranks = (max(1, round(rank * d_in)) if rank < 1 else int(rank) for rank in self.ranks)
        return list(zip(ranks, self.counts, strict=True))

    def numbers(self, d_in: int, d_out: int) -> int:
        """How many numbers the transforms have, their gates' directions included."""
        return sum(count * (rank * (d_in + d_out) + d_in) for rank, count in self.groups(d_in))

    def expect_widths(self, d_in: Width, d_out: Width | None) -> None:
        most = min(sum(widths(d_in)), sum(widths(d_out or d_in)))
        if (rank := max(rank for rank, _ in self.groups(sum(widths(d_in))))) > most:
            raise ValueError(f"ranks: {rank} is more than the {most} dimensions there are; lower it")


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of B rows [B, T], 0 where a part does not act, and the rows x [B, d_in] that they are of.

    near: bool [B, T], which gates have a gradient; None where nobody asks.
    """

    values: Tensor
    x: Tensor
    near: Tensor | None = None

    @property
    def batch(self) -> int:
        return len(self.values)

    def dense(self) -> Tensor:
        return self.values

    def edited(self, values: Tensor) -> Gates:
        """Other gates of the same rows."""
        return replace(self, values=values, near=None)

    def l0(self) -> Tensor:
        return (self.values != 0).sum(1)

    def fired(self) -> Tensor:
        return (self.values != 0).sum(0)


@final
@register
class MOLT(Steering, Coder):
    """A sparse mixture of linear transforms, which reads one site and writes another.

    The penalty is the coefficient times the mean over rows of sum_t P(phi_t ||U_t V_t||_F), P being u or tanh(c u).
    Gates that never open, or have shut, learn from what the others leave over: they explain it through softplus gates.
    """

    config_type = MOLTConfig
    config: MOLTConfig
    prompt, gain, descent = 3.0, 30.0, 0.0  # thresholds answer slowly
    centre: Tensor
    scale: Tensor
    target_scale: Tensor
    rows_since_fired: Tensor

    def __init__(self, config: MOLTConfig, d_in: int, d_out: int | None = None, *, seed: int = 0) -> None:
        super().__init__()
        config.expect_widths(d_in, d_out)
        self.config, self.seed = config, seed
        self.d_in, self.d_out, self.is_transcoder = d_in, d_in if d_out is None else d_out, d_out is not None
        self.groups = config.groups(d_in)
        of_each = torch.tensor([rank for rank, count in self.groups for _ in range(count)])
        self.ranks: Tensor
        self.register_buffer("ranks", of_each, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        size = self.width**-0.5  # with which all together are about as large as what they are to add up to
        self.gates = nn.Parameter(size * initial.rows("tied", self.width, d_in, generator))
        self.b_gate = nn.Parameter(torch.full((self.width,), size * config.gate_start))
        if config.gate == "jumprelu":
            self.threshold = nn.Parameter(torch.full((self.width,), config.theta_init))
        tables = [
            torch.cat([_xavier(rank, width, count, generator) for rank, count in self.groups])
            for width in (d_in, self.d_out)
        ]
        self.V, self.U = map(nn.Parameter, tables)
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("centre", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(d_in))
        self.register_buffer("target_scale", torch.ones(()))
        self.register_buffer("rows_since_fired", torch.zeros(self.width, dtype=torch.int64))
        self._register_steering()
        self._stretch()

    @property
    def width(self) -> int:
        return self.config.latents

    @torch.no_grad()
    def initialise(self, sample: Tensor, targets: Tensor | None = None) -> None:
        outputs = sample if targets is None else targets
        self.target_scale.copy_(initial.rms_scale(outputs))
        self.b_dec.copy_((outputs * self.target_scale).mean(0))
        if self.config.standardise:
            deviations = sample.double().std(0).float()
            # a column that does not vary, or hardly, says nothing, and is not to be made much of
            least = 1e-3 * deviations.max()
            initial.rms_scale(sample - sample.mean(0))  # ValueError where no column varies
            self.centre.copy_(sample.mean(0))
            self.scale.copy_(1 / torch.maximum(deviations, least))
        else:
            self.scale.fill_(initial.rms_scale(sample))

    def active_parameters(self, codes: Gates) -> Tensor:
        """[B]: those of the transforms that act, and of their gates."""
        each = self.ranks * (self.d_in + self.d_out) + self.d_in
        return (codes.values != 0).float() @ each.float()

    # The function

    def encode(self, x: Tensor) -> Gates:
        """The gates of rows x [B, d_in] in the data's units."""
        return self._gates(self._scaled(x))

    def decode(self, codes: Gates) -> Tensor:
        """y_hat [B, d_out] in the data's units, of gates of `encode`, or edited."""
        return (self._mixed(codes) + self.b_dec) / self.target_scale

    def _scaled(self, x: Tensor) -> Tensor:
        return (x.to(self.V.dtype) - self.centre) * self.scale

    def _gates(self, x: Tensor) -> Gates:
        p = F.linear(x, self.gates, self.b_gate).float()
        if self.config.gate == "relu":
            return Gates(p.relu(), x, p > 0)
        values, _ = jump(p, self.threshold, self.config.bandwidth)
        return Gates(values, x, p > self.threshold - self.config.bandwidth / 2)

    def _mixed(self, codes: Gates) -> Tensor:
        """[B, d_out]: what the transforms that act add up to."""
        if not placement.runs_ahead(codes.x):
            near = codes.values != 0 if codes.near is None else codes.near
            acting = near.float().mean(0) @ self.ranks.float() / len(self.V)
            if acting < SPARSE_BELOW:
                return self._one_by_one(codes, near)
        return (
            F.linear(codes.x, self.V) * codes.values.repeat_interleave(self.ranks, dim=1, output_size=len(self.V))
        ) @ self.U

    def _one_by_one(self, codes: Gates, near: Tensor) -> Tensor:
        y_hat = codes.x.new_zeros(len(codes.x), self.d_out)
        for t, (V, U) in enumerate(zip(self.V.split([*self.ranks]), self.U.split([*self.ranks]), strict=True)):
            rows = near[:, t].nonzero().view(-1)
            if len(rows):
                inner = F.linear(codes.x[rows], V) * codes.values[rows, t, None]
                y_hat = y_hat.index_add(0, rows, (inner @ U).to(y_hat.dtype))
        return y_hat

    def norms(self) -> Tensor:
        """[T]: ||U_t V_t||_F."""
        with torch.autocast(self.V.device.type, enabled=False):
            return torch.cat([
                ((U @ U.mT) * (V @ V.mT)).sum((1, 2)).clamp_min(TINY).sqrt() for V, U in self._by_rank(self.V, self.U)
            ])  # fmt: skip

    def _by_rank(self, V: Tensor, U: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views [n, r, d_in] and [n, r, d_out] of V and U^T, or the like, for the n transforms of each rank."""
        sizes = [rank * count for rank, count in self.groups]
        for (rank, count), one, other in zip(self.groups, V.split(sizes), U.split(sizes), strict=True):
            yield one.view(count, rank, -1), other.view(count, rank, -1)

    # Training

    def loss(self, x: Tensor, target: Tensor | None = None, clock: Clock = FINISHED) -> Losses:
        self.expect_rows(x)
        y = (x if target is None else target) * self.target_scale
        codes = self._gates(self._scaled(x))
        y_hat = self._mixed(codes) + self.b_dec
        acting = codes.values * (self.norms().detach() / self.d_out**0.5)
        penalised = (self.config.tanh_scale * acting).tanh() if self.config.penalty == "tanh" else acting
        terms = {
            "reconstruction": self.squared_error(y_hat, y),
            self.config.penalty: self.weight(clock) * penalised.sum(1).mean(),
        }
        if self.config.aux_coefficient > 0:
            terms["aux"] = self.config.aux_coefficient * self._explained_by_dead(codes.x, y, y_hat, clock)
        return CodedLosses(terms, clock, y_hat / self.target_scale, codes)

    def _explained_by_dead(self, x: Tensor, y: Tensor, y_hat: Tensor, clock: Clock) -> Tensor:
        """The squared error of dead transforms, with gates that are never shut, against the residual as it is."""
        dead, residual = self.dead(clock), (y - y_hat).detach()
        if placement.runs_ahead(x):
            gates = F.softplus(F.linear(x, self.gates, self.b_gate)) * dead
            e_hat = self._mixed(Gates(gates, x))
            return self.squared_error(e_hat, residual).masked_fill(~dead.any(), 0)
        if not bool(dead.any()):
            return y.new_zeros(())
        rows = dead.repeat_interleave(self.ranks)
        gates = F.softplus(F.linear(x, self.gates[dead], self.b_gate[dead]))
        inner = F.linear(x, self.V[rows]) * gates.repeat_interleave(self.ranks[dead], dim=1)
        return self.squared_error(inner @ self.U[rows], residual)

    @torch.no_grad()
    def before_step(self) -> None:
        """Drop the part of the gradients that would only change a transform's norm."""
        if self.V.grad is None or self.U.grad is None:  # no gate was open
            return
        tables, grads = self._by_rank(self.V, self.U), self._by_rank(self.V.grad, self.U.grad)
        for (V, U), (grad_V, grad_U) in zip(tables, grads, strict=True):
            of_V, of_U = (U @ U.mT) @ V, (V @ V.mT) @ U  # the gradient of half the norm's square
            square = (of_V.square().sum((1, 2)) + of_U.square().sum((1, 2))).clamp_min(TINY)
            along = ((grad_V * of_V).sum((1, 2)) + (grad_U * of_U).sum((1, 2))) / square
            grad_V.addcmul_(along.view(-1, 1, 1), of_V, value=-1)
            grad_U.addcmul_(along.view(-1, 1, 1), of_U, value=-1)

    @torch.no_grad()
    def after_step(self) -> None:
        self._stretch()
        if self.config.gate == "jumprelu":
            self.threshold.clamp_(min=0)

    @torch.no_grad()
    def observe(self, losses: Losses) -> Observed:
        assert isinstance(losses, CodedLosses), "those of `loss`"
        return Observed(losses.clock, losses.rows, losses.codes.fired(), losses.l0().float().mean().view(1))

    @torch.no_grad()
    def track(self, *parts: Observed) -> None:
        rows, fired = sum(part.rows for part in parts), torch.stack([part.fired for part in parts]).sum(0)
        self.rows_since_fired.add_(rows).masked_fill_(fired > 0, 0)
        self._steer(torch.stack([part.numbers for part in parts]).mean(), parts[0].clock)

    def dead(self, clock: Clock) -> Tensor:
        return self.rows_since_fired >= clock.rows(self.config.dead_after)

    def _per_transform(self, of_rows: Tensor) -> Tensor:
        """[T]: the sums over a transform's rows of something that each row of V and U has."""
        if placement.runs_ahead(of_rows):  # in an order that is always the same
            parts = of_rows.split([rank * count for rank, count in self.groups])
            sums = [one.view(-1, rank).sum(1) for (rank, _), one in zip(self.groups, parts, strict=True)]
            return torch.cat(sums)
        owners = torch.arange(self.width, device=of_rows.device).repeat_interleave(self.ranks)
        return of_rows.new_zeros(self.width).index_add_(0, owners, of_rows)

    @torch.no_grad()
    def _stretch(self) -> None:
        """Every transform to the norm that all have, half of it in U and half in V."""
        sides = [self._per_transform(sparse.row_dots(table, table)).sqrt() for table in (self.V, self.U)]
        by = (self.d_out**0.5 / self.norms()).sqrt()
        for table, own, other in zip((self.V, self.U), sides, sides[::-1], strict=True):
            each = (by * (other / own).sqrt()).repeat_interleave(self.ranks, output_size=len(table))
            table.mul_(each[:, None])


def _xavier(rank: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """[count * rank, width]: matrices [rank, width] with Xavier-uniform entries, one below the other."""
    return torch.cat([initial.rows("xavier", rank, width, generator) for _ in range(count)])
