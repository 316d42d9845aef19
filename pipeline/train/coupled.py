"""Dictionaries that take their steps together: as a rule one by itself, several where they pull at each other."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.cache.errors import DamagedStore, SaeError
from sae.cache.loader.loader import Batch
from sae.cache.runs import CHECKPOINT
from sae.pipeline.parallel.ranks import Ranks
from sae.pipeline.saes import SAE, Clock, Losses, SparseLosses
from sae.pipeline.train.alignment import Alignment
from sae.pipeline.train.gradients import take_gradients
from sae.pipeline.train.trainer import Trainer, products


@dataclass
class CoupledTrainers:
    """Members at one and the same step, and what pulls them together."""

    members: list[Trainer]
    alignment: Alignment | None

    @property
    def done(self) -> int:
        """Steps that were taken."""
        return self.members[0].done

    def step(self, batch: Batch, clock: Clock, ranks: Ranks) -> list[dict[str, float] | None]:
        """One optimiser step of each on a batch (this rank's share of it); metrics where they are shown."""
        with products(self.members[0].config, batch.x.device):  # those of all, but for their seeds
            return self._step(batch, clock, ranks)

    def _step(self, batch: Batch, clock: Clock, ranks: Ranks) -> list[dict[str, float] | None]:
        begun = time.perf_counter()
        parts: list[list[Losses]] = [[] for _ in self.members]
        apart: list[Tensor] = []

        def total(part: Batch, at: Clock) -> Tensor:
            each = [member.losses(part, at) for member in self.members]
            found = torch.stack([one.total for one in each]).sum() if len(each) > 1 else each[0].total
            for kept, one in zip(parts, each, strict=True):
                kept.append(one)
            if self.alignment is None:
                return found
            sparse = [one for one in each if isinstance(one, SparseLosses)]
            if not apart:
                self.alignment.search(sparse, clock.step)
                self.alignment.share(ranks)
            apart.append(self.alignment.term(sparse))
            return found + self.alignment.weighted(apart[-1], sparse, clock.step)

        saes, cut = [member.sae for member in self.members], self.members[0].config.accumulate
        take_gradients(saes, total, batch, cut, clock, ranks)
        logged = [
            member.update(batch, losses, clock, ranks) for member, losses in zip(self.members, parts, strict=True)
        ]
        if self.alignment is not None:
            self._add_agreement(logged, apart, clock, ranks)
        spent = (time.perf_counter() - begun) / len(self.members)
        for member in self.members:
            member.spend(spent)
        return logged

    def _add_agreement(
        self, logged: Sequence[dict[str, float] | None], apart: Sequence[Tensor], clock: Clock, ranks: Ranks
    ) -> None:
        """Beside each member's metrics: the term, its weight, and how much the member agrees with the others."""
        assert self.alignment is not None
        if logged[0] is None:  # their settings are the same, so all are logged at once
            return
        term = ranks.sum(torch.stack([one.detach() for one in apart]).mean()) / ranks.world
        shared = {"alignment": term.item(), "alignment_weight": self.alignment.weight_at(clock.step)}
        for metrics, agreement in zip(logged, self.alignment.agreement(), strict=True):
            assert metrics is not None
            metrics |= {**shared, "agreement": agreement}

    def save(self, loader: dict[str, int], ranks: Ranks) -> None:
        """Write all checkpoints. Whenever a kill comes they are of one step: none is published before all are written.

        Raises Diverged for weights that are no numbers.
        """
        for i, member in enumerate(self.members):
            shared = self.alignment.state() if self.alignment is not None and i == 0 else {}
            member.save(loader, shared, ranks)
        if ranks.rank == 0:
            for member in self.members:
                member.run.publish_checkpoint()
            for member in self.members:
                member.say_checkpoint()

    def restore(self, ranks: Ranks) -> dict[str, int] | None:
        """Take up the checkpoints: the loader's state. None where there are none yet."""
        if ranks.rank == 0:
            self._publish_rest()
        ranks.barrier()
        states = [member.restore(ranks) for member in self.members]
        if len({member.done for member in self.members}) > 1:
            raise DamagedStore(
                f"{self.members[0].run.path}: not at the step of the dictionaries it is trained with; their "
                "checkpoints belong together: remove the folders of all of them and train again"
            )
        if states[0] is None:
            return None
        tensors, loader = states[0]
        if self.alignment is not None:
            try:
                self.alignment.restore(tensors)
            except ValueError as error:
                raise DamagedStore(f"{self.members[0].run.path / CHECKPOINT}: {error}") from error
        return loader

    def _publish_rest(self) -> None:
        """Publish the other checkpoints of a step, where a kill came when some were published."""
        runs = [member.run for member in self.members]
        steps = [run.checkpoint_step() for run in runs]
        latest = max(steps)
        for run, step in zip(runs, steps, strict=True):
            if step < latest and run.checkpoint_step(staged=True) == latest:
                run.publish_checkpoint()


def grouped(members: Sequence[Trainer]) -> list[CoupledTrainers]:
    """Members by themselves, but for those whose settings pull them together.

    Raises SaeError where some of the dictionaries that belong together are missing.
    """
    groups: list[CoupledTrainers] = []
    together: dict[str, list[Trainer]] = {}
    for member in members:
        if member.config.align is None:
            groups.append(CoupledTrainers([member], None))
        else:
            alike = member.config.model_dump_json(exclude={"seed"})
            together.setdefault(alike, []).append(member)
    for group in together.values():
        align, seeds = group[0].config.align, [member.config.seed for member in group]
        assert align is not None
        if sorted(seeds) != sorted(align.seeds):
            raise SaeError(
                f"{group[0].run.path}: is trained together with seeds {', '.join(map(str, align.seeds))}; "
                "repeat the command that began them, with `seeds`"
            )
        groups.append(
            CoupledTrainers(group, Alignment(align, [member.sae for member in group if isinstance(member.sae, SAE)]))
        )
    return groups
