"""Alignment regularization: dictionaries that differ in their seed alone, trained together and pulled towards another.

To the sum of their losses comes weight * w(t) * A, where A is the mean over pairs of 1 - S(i, j) and S says how alike
two of them are: by decoder rows (`dec`), by latents' activations over a batch (`hid`), or by reconstructions (`x_hat`).
For the first two every vector is matched with its most similar one of the other (`max`, both ways) or one to one
(`hungarian`); the matching is a constant, the gradient flows through the cosines of the matched vectors. w(t) rises
from 0 to 1 as half a cosine. (Mutual feature regularization: Marks et al. 2024, arXiv 2411.01220.)

What it may do is make dictionaries agree on something untrue, so their agreement is logged beside FVU and, where the
true features are known, their recovery.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.configs.base import Settings
from sae.pipeline.metrics.similarity import best, hungarian, mutual
from sae.pipeline.parallel.ranks import Ranks
from sae.pipeline.saes import SAE, SparseLosses
from sae.pipeline.saes.config import IN_STEPS
from sae.pipeline.saes.losses import spread

By = Literal["dec", "hid", "x_hat"]
Matching = tuple[Tensor, Tensor]  # int64 [n] each: row of one, row of the other


class AlignConfig(Settings):
    """Settings by which dictionaries trained together are pulled towards each other."""

    by: By = Field(
        "dec",
        description="what pulls the dictionaries of several seeds towards each other: decoder rows (dec), activations "
        "over a batch (hid) or reconstructions (x_hat)",
    )
    matching: Literal["max", "hungarian"] = Field(
        "max", description="each vector with its most similar of the other, both ways (max), or one to one (hungarian)"
    )
    weight: float = Field(
        0.1,
        ge=0,
        description="weight of the mean of 1 - similarity over pairs, as a share of the variance that a dictionary is "
        "to explain; 0: only measure",
    )
    warmup: Annotated[int, IN_STEPS] = Field(
        100, ge=0, description="steps over which the weight rises from 0, as half a cosine"
    )
    every: int = Field(10, ge=1, description="steps between two searches for matching vectors")
    seeds: tuple[int, ...] = Field(
        (), description="of the dictionaries pulled together; filled in from those that are trained with `seeds`"
    )


class Alignment:
    """The term that pulls dictionaries together, and the matchings it holds between two searches."""

    def __init__(self, config: AlignConfig, saes: Sequence[SAE]) -> None:
        self.config, self.saes = config, tuple(saes)
        self.matchings: dict[tuple[int, int], list[Matching]] = {}

    def search(self, losses: Sequence[SparseLosses], step: int) -> None:
        """Look for matching vectors, where this step is due, given the losses of each dictionary on one batch."""
        if self.config.by != "x_hat" and (step % self.config.every == 0 or not self.matchings):
            vectors = self._vectors(losses)
            self.matchings = {(i, j): self._match(vectors[i], vectors[j]) for i, j in self._pairs}

    def term(self, losses: Sequence[SparseLosses]) -> Tensor:
        """A, a scalar without its weight, for the losses of each dictionary on one (part of a) batch."""
        if self.config.by == "x_hat":
            alike = [
                cosine_similarity(losses[i].reconstruction, losses[j].reconstruction).mean() for i, j in self._pairs
            ]
        else:
            vectors = self._vectors(losses)
            alike = [self._similarity(vectors[i], vectors[j], self.matchings[i, j]) for i, j in self._pairs]
        return 1 - torch.stack(alike).mean()

    def weighted(self, term: Tensor, losses: Sequence[SparseLosses], step: int) -> Tensor:
        """What is added to the dictionaries' losses for their term: a share of the variance, in their reduction."""
        y = losses[0].y
        return self.weight_at(step) * self.saes[0].reduced(spread(y), y) * term

    def weight_at(self, step: int) -> float:
        """The weight of `term` at a step, as a share of the variance."""
        rising = 1.0 if step >= self.config.warmup else (1 - math.cos(math.pi * step / self.config.warmup)) / 2
        return self.config.weight * rising

    def _vectors(self, losses: Sequence[SparseLosses]) -> list[Tensor]:
        """Return each dictionary's vectors to match: rows [d_sae, d_out] of its decoder, or its latents [d_sae, B]."""
        if self.config.by == "dec":
            return [sae.W_dec for sae in self.saes]
        return [one.latents.dense().T for one in losses]

    def share(self, ranks: Ranks) -> None:
        """The matchings of rank 0 on every rank, whose own batches might tell others."""
        if ranks.world > 1:
            for found in self.matchings.values():
                found[:] = [
                    tuple(ranks.sum(one if ranks.rank == 0 else torch.zeros_like(one)) for one in pair)  # type: ignore[misc]
                    for pair in found
                ]

    def agreement(self) -> list[float]:
        """Return how far each agrees with the others by its decoder rows, whatever the term is computed from."""
        return mutual([sae.W_dec for sae in self.saes])

    def state(self) -> dict[str, Tensor]:
        """The matchings, for a checkpoint."""
        return {
            f"alignment.{i}.{j}.{n}": torch.stack(pair)
            for (i, j), found in self.matchings.items()
            for n, pair in enumerate(found)
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave. Raises ValueError for what it never gives."""
        self.matchings = {}
        device = self.saes[0].W_dec.device
        for name in sorted(name for name in state if name.startswith("alignment.")):
            _, i, j, _ = name.split(".")
            whole = state[name].dtype == torch.int64 and state[name].dim() == 2
            if (int(i), int(j)) not in self._pairs or not whole or len(state[name]) != 2:
                raise ValueError(f"{name} is not a matching")
            if not ((state[name] >= 0) & (state[name] < self.saes[0].d_sae)).all():
                raise ValueError(f"{name} matches latents that are not there")
            first, second = state[name].to(device)
            self.matchings.setdefault((int(i), int(j)), []).append((first, second))

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(combinations(range(len(self.saes)), 2))

    def _match(self, a: Tensor, b: Tensor) -> list[Matching]:
        """Match rows of a [n, d] and b [m, d] that belong together: one matching, or one for each way."""
        if self.config.matching == "hungarian":
            return [hungarian(a, b)]
        return [
            (torch.arange(len(a), device=a.device), best(a, b)),
            (best(b, a), torch.arange(len(b), device=b.device)),
        ]

    def _similarity(self, a: Tensor, b: Tensor, matchings: Sequence[Matching]) -> Tensor:
        """Mean cosine of matched rows; latents that did not fire (rows of zeros) and their partners are left out."""
        found = []
        for first, second in matchings:
            if self.config.by == "hid":
                both = a.detach().any(1)[first] & b.detach().any(1)[second]
                first, second = first[both], second[both]
            found.append(cosine_similarity(a[first], b[second]).mean() if len(first) else (a.sum() + b.sum()) * 0)
        return torch.stack(found).mean()
