"""Toy models of superposition (Elhage et al. 2022): G sparse features that a linear map squeezes into d dimensions.

A sample x [G] becomes h = sum_j x_j w_j [d], and x' = ReLU(W h + b) is to give it back: w_j, a row of W [G, d], is what
feature j adds to a row. Several instances are trained at once, each on samples of its own seed, with probabilities of
its own; their losses are summed, so none knows of the others.

A feature is in a sample with its probability, and then its coefficient is uniform between 0 and 1. Who is there with
whom is said for pairs of features, the first ones in order, and by a Gaussian copula for the rest.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

Schedule = Literal["constant", "linear", "cosine"]
BLOCK = 1 << 20  # numbers drawn for the training at a time, about, for each instance
JUDGED = 1 << 16  # fresh samples that the loss and correlations are measured on


def pairs(count: int) -> tuple[tuple[int, int], ...]:
    """The members of so many pairs."""
    return tuple((2 * i, 2 * i + 1) for i in range(count))


@dataclass(frozen=True)
class Presence:
    """Which features are in a sample, and with which others.

    probability: float64 [I, G]. The first 2 `correlated` features are pairs (0, 1), (2, 3), ... of which one draw
    decides; the 2 `anticorrelated` after them are pairs of which never both are there. The presences of the others are
    those of normal variables with the correlation `correlation` of any two, above a threshold each.
    """

    probability: Tensor
    correlated: int = 0
    anticorrelated: int = 0
    correlation: float = 0.0

    @property
    def features(self) -> int:
        return self.probability.shape[1]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """All pairs, the correlated ones first."""
        return pairs(self.correlated + self.anticorrelated)

    @property
    def rest(self) -> slice:
        """The features of no pair."""
        return slice(2 * (self.correlated + self.anticorrelated), self.features)

    @property
    def needs_normal(self) -> bool:
        return self.correlation != 0 and self.features - self.rest.start > 1

    def of(self, instance: int) -> Self:
        """That of one instance alone."""
        return type(self)(
            self.probability[instance : instance + 1], self.correlated, self.anticorrelated, self.correlation
        )

    def there(self, chance: Tensor, normal: Tensor | None) -> Tensor:
        """bool [I, n, G] from `chance`, uniform between 0 and 1, and (where `needs_normal`) `normal`, standard normal.

        Both are independent numbers [I, n, G]. The first number of a pair decides of both members: of a correlated one
        each is there below its probability; of an anti-correlated one the second takes the stretch behind the first's.
        """
        p, chance = self.probability[:, None].to(chance.dtype), chance.clone()
        first, stop = 2 * self.correlated, self.rest.start
        chance[..., 1:first:2] = chance[..., 0:first:2]
        decides = chance[..., first:stop:2] - p[..., first:stop:2]
        chance[..., first + 1 : stop : 2] = torch.where(decides < 0, 1.0, decides)
        found = chance < p
        if normal is not None and self.needs_normal:
            found[..., self.rest] = self.copula(normal[..., self.rest]) > self._threshold
        return found

    def copula(self, normal: Tensor) -> Tensor:
        """Independent standard normal numbers [..., m] -> such of which any two have the correlation that is wanted.

        By the symmetric root of the matrix of correlations, s I + t 11^T.
        """
        m, rho = normal.shape[-1], self.correlation
        s = math.sqrt(1 - rho)
        t = (math.sqrt(max(0.0, 1 - rho + m * rho)) - s) / m
        return s * normal + t * normal.sum(-1, keepdim=True)

    @cached_property
    def _threshold(self) -> Tensor:
        """float64 [I, 1, m]: what a normal variable exceeds with the probability of each feature of no pair."""
        above = [[_quantile(1 - p) for p in row] for row in self.probability[:, self.rest].tolist()]
        return torch.tensor(above, dtype=torch.float64)[:, None]


class Toy(NamedTuple):
    """Trained instances: weight float32 [I, G, d], bias float32 [I, G]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x' [I, n, G] of samples x [I, n, G]."""
        return torch.relu(x @ self.weight @ self.weight.mT + self.bias[:, None])

    def digests(self) -> list[str]:
        """What names each instance."""
        return [
            hashlib.sha256(weight.numpy().tobytes() + bias.numpy().tobytes()).hexdigest()[:16]
            for weight, bias in zip(self.weight.contiguous(), self.bias.contiguous(), strict=True)
        ]

    def truth(self, instance: int) -> Tensor:
        """float32 [G, d]: directions of length 1; zeros for features that the instance has no room for.

        Those are shorter than a tenth of the longest: no row shows them, and no dictionary could find them.
        """
        weight = self.weight[instance]
        norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        return torch.where(norms > 0.1 * norms.max(), weight / norms, 0.0)


@dataclass(frozen=True)
class Training:
    """How a toy is trained. importance: float64 [I, G], the weight of each feature's squared error."""

    importance: Tensor
    hidden: int
    steps: int = 10_000
    batch: int = 1024
    lr: float = 1e-3
    schedule: Schedule = "constant"

    def rate(self, step: int) -> float:
        """The share of the learning rate at a step, from 0 on."""
        if self.schedule == "linear":
            return 1 - step / self.steps
        if self.schedule == "cosine":
            return math.cos(math.pi * step / (2 * (self.steps - 1))) if self.steps > 1 else 1.0
        return 1.0


def trained(presence: Presence, training: Training, seeds: list[str], advance: Callable[[int], None]) -> Toy:
    """The instances after training, one for each seed. `advance` is told of steps."""
    features, hidden = presence.features, training.hidden
    generators = [torch.Generator().manual_seed(_number(seed)) for seed in seeds]
    std = math.sqrt(2 / (features + hidden))
    start = [torch.randn(features, hidden, generator=generator) * std for generator in generators]
    toy = Toy(torch.stack(start).requires_grad_(), torch.zeros(len(seeds), features, requires_grad=True))
    optimizer = torch.optim.Adam([*toy], lr=training.lr)
    importance = training.importance.float()[:, None]
    at_once = max(1, BLOCK // (training.batch * features))
    for first in range(0, training.steps, at_once):
        count = min(at_once, training.steps - first)
        every = samples(presence, count * training.batch, generators).split(training.batch, dim=1)
        for step, x in enumerate(every, first):
            for group in optimizer.param_groups:
                group["lr"] = training.lr * training.rate(step)
            loss = (importance * (x - toy(x)).square()).mean((1, 2)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        advance(count)
    return Toy(*(values.detach() for values in toy))


@torch.no_grad()
def losses(toy: Toy, presence: Presence, importance: Tensor, seeds: list[str]) -> list[float]:
    """The loss of each instance on fresh samples: mean over samples and features of importance times squared error."""
    found = []
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(_number(f"{seed} judged"))
        x = samples(presence.of(i), JUDGED, [generator])
        wrong = x - Toy(toy.weight[i : i + 1], toy.bias[i : i + 1])(x)
        found.append((importance[i] * wrong.square()).mean().item())
    return found


def samples(presence: Presence, n: int, generators: list[torch.Generator]) -> Tensor:
    """float32 [I, n, G]: samples of every instance, of a generator each."""
    shape = (n, presence.features)
    chance, strength = (torch.stack([torch.rand(shape, generator=one) for one in generators]) for _ in range(2))
    normal = None
    if presence.needs_normal:
        normal = torch.stack([torch.randn(shape, generator=one) for one in generators])
    return torch.where(presence.there(chance, normal), strength, 0.0)


def achieved(presence: Presence, seed: str) -> dict[str, float]:
    """What correlation the features of no pair have, on fresh samples, as means over pairs of them (and instances).

    rank: Spearman's of the copula; presence: Pearson's of being there; value: Pearson's of the coefficients.
    """
    generator = torch.Generator().manual_seed(_number(f"{seed} correlation"))
    rest, shape = presence.rest, (JUDGED, presence.features)
    chance, normal, strength = (draw(shape, generator=generator) for draw in (torch.rand, torch.randn, torch.rand))
    ranks = presence.copula(normal[:, rest]).argsort(0).argsort(0)
    found: dict[str, list[float]] = {"rank": [_mean_correlation(ranks)], "presence": [], "value": []}
    for instance in range(len(presence.probability)):
        there = presence.of(instance).there(chance[None], normal[None])[0, :, rest]
        found["presence"].append(_mean_correlation(there))
        found["value"].append(_mean_correlation(torch.where(there, strength[:, rest], 0.0)))
    return {"target": presence.correlation, **{name: sum(each) / len(each) for name, each in found.items()}}


def _mean_correlation(columns: Tensor) -> float:
    """Mean of Pearson's r over all pairs of columns that vary; 0 where there is none."""
    columns = columns.double() - columns.double().mean(0)
    columns = columns[:, columns.any(0)]
    unit = columns / torch.linalg.vector_norm(columns, dim=0)
    m = unit.shape[1]
    return ((unit.sum(1).square().sum() - m) / (m * (m - 1))).item() if m > 1 else 0.0


def _quantile(share: float) -> float:
    """What a standard normal variable stays below with such a probability."""
    return NormalDist().inv_cdf(share) if 0 < share < 1 else math.copysign(math.inf, share - 0.5)


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
