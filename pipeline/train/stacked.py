"""Dictionaries that take their steps as one on a device that is given work ahead of time (`pipeline.saes.stacks`).

Their forward and backward passes, and the counting of what fired, are one set of operations; each has an optimiser,
learning rates and clipping of its own, and its own revival, metrics and checkpoints. A dictionary may leave its stack
at any step, and go on by itself or in another one.
"""

import time
from collections.abc import Hashable, Sequence

from torch import Tensor

from sae.cache.loader.loader import Batch
from sae.pipeline.parallel.ranks import Ranks
from sae.pipeline.saes import SAE, Clock, SparseLosses, encoder, placement, stacks
from sae.pipeline.saes.fixed_k import ks_at
from sae.pipeline.train.coupled import CoupledTrainers
from sae.pipeline.train.gradients import loss_of, take_gradients
from sae.pipeline.train.trainer import Diverged, Trainer, products

Logged = list[dict[str, float] | None] | Diverged
"""Metrics of each member of a group where they are shown, or what the group ends with."""

Turn = tuple[list[CoupledTrainers], "CoupledTrainers | Stack"]
"""Groups, and what takes their steps: one by itself, or a stack of all of them."""


class Stack:
    """Members at one and the same step, of one shape and with the same settings of how products are taken."""

    def __init__(self, members: Sequence[Trainer]) -> None:
        self.members = [*members]
        self.saes = [member.sae for member in members if isinstance(member.sae, SAE)]
        self.sae, self._begun = stacks.stacked(self.saes), False

    def step(self, batch: Batch, clock: Clock, ranks: Ranks) -> list[Logged]:
        """One optimiser step of each on a batch (this rank's share of it)."""
        begun = time.perf_counter()
        with products(self.members[0].config, batch.x.device):
            found = self._step(batch, clock, ranks)
        for member in self.members:
            member.spend((time.perf_counter() - begun) / len(self.members))
        return found

    def _step(self, batch: Batch, clock: Clock, ranks: Ranks) -> list[Logged]:
        config, losses = self.members[0].config, list[SparseLosses]()
        if not self._begun:
            self.sae.look_ahead(clock._replace(step=clock.step - 1))
            self._begun = True

        def total(part: Batch, at: Clock) -> Tensor:
            found = loss_of(self.sae, config, part, at)
            assert isinstance(found, SparseLosses)
            losses.append(found)
            return found.total.sum()

        take_gradients([self.sae], total, batch, config.accumulate, clock, ranks)
        stacks.give_gradients(self.sae, self.saes)
        for member in self.members:
            member.learn(clock)
        self.sae.track(*ranks.all_gather([self.sae.observe(part) for part in losses]))
        shown = [member.conclude(clock, ranks) for member in self.members]
        if not any(shown):
            return [[None] for _ in self.members]
        if any(member.logs(clock.steps) for member in self.members):
            self.sae.look_ahead(clock)
        parts = zip(*(stacks.split(part, ks_at(self.sae, clock)) for part in losses), strict=True)
        return [
            self._logged(member, batch, each, clock, ranks) if its else [None]
            for member, each, its in zip(self.members, parts, shown, strict=True)
        ]

    def _logged(
        self, member: Trainer, batch: Batch, parts: Sequence[SparseLosses], clock: Clock, ranks: Ranks
    ) -> Logged:
        try:
            return [member.metrics(batch.y, parts, clock, ranks)]
        except Diverged as error:
            return error


def taken(turn: CoupledTrainers | Stack, batch: Batch, clock: Clock, ranks: Ranks) -> list[Logged]:
    """One step of a group or of a stack of groups: what is logged of each group."""
    if isinstance(turn, Stack):
        return turn.step(batch, clock, ranks)
    try:
        return [turn.step(batch, clock, ranks)]
    except Diverged as error:
        return [error]


def in_turns(groups: Sequence[CoupledTrainers], rows: int) -> list[Turn]:
    """Groups, and what takes their steps on batches of so many rows: those that can do it together, in stacks.

    A stack has as many as one scan of pre-activations holds.
    """
    alike: dict[Hashable, list[CoupledTrainers]] = {}
    for group in groups:
        alike.setdefault(_kind(group), []).append(group)
    turns: list[Turn] = []
    for found in alike.values():
        first = found[0].members[0]
        width = first.sae.d_sae if isinstance(first.sae, SAE) else 1
        most = max(1, encoder.KERNEL_BLOCK_ELEMENTS // (-(-rows // first.config.accumulate) * width))
        for i in range(0, len(found), most):
            some = found[i : i + most]
            turns.append((some, some[0] if len(some) == 1 else Stack([group.members[0] for group in some])))
    return turns


def _kind(group: CoupledTrainers) -> Hashable:
    """What is alike in groups that can be stacked; of another group, itself."""
    member, *others = group.members
    sae, config = member.sae, member.config
    if others or not isinstance(sae, SAE) or not placement.runs_ahead(sae.W_dec) or stacks.shape(sae) is None:
        return id(group)
    return stacks.shape(sae), config.precision, config.kernels, config.accumulate
