"""A dataset is read by training and evaluation: aligned inputs and targets of one split.

An autoencoder's dataset has inputs alone: they are what is reconstructed, too. A transcoder's has targets as well, as
what a layer makes of the inputs. Row i of every store came from one and the same token (or sample of a source). Where a
side has several stores, as for a crosscoder, their rows lie side by side in the order in which the stores are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self, Unpack

import numpy as np
import torch
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.arguments import checked
from sae.cache.disk.identity import Recipe
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.loader import Batch, Batches, Settings, common_rows, expect_aligned, side_by_side
from sae.cache.massive import OutlierRule, limit_of
from sae.cache.outliers import Limits, within
from sae.cache.provenance import Provenance, provenance

Stores = tuple[ActivationStore, ...]
LEAST = {
    "batch": 1, "seed": 0, "epochs": 1, "open_chunks": 1, "threads": 1, "world": 1, "rank": 0, "first": 0, "count": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """The first `n_rows` rows of aligned stores. Made by `of`.

    inputs: where x comes from. targets: where y comes from, none where x is y. limits: the largest norm a row may have
    in each of the stores, inputs first, None where all rows are kept. What reads "kept" rows leaves out the others.
    """

    inputs: Stores
    targets: Stores
    n_rows: int
    limits: Limits | None = None

    @classmethod
    def of(
        cls, inputs: ActivationStore | Stores, targets: ActivationStore | Stores = (), *, rows: int | None = None
    ) -> Self:
        """The dataset of one store or several a side, and of their first `rows` rows; None: of all that are there.

        Raises SaeError where rows do not align (other tokens, another rule which of them become rows, other numbers),
        and where a side names a store twice.
        """
        x, y = (side if isinstance(side, tuple) else (side,) for side in (inputs, targets))
        for side in (x, y):
            keys = [store.key for store in side]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise SaeError(f"{twice[0]}: is named twice among {', '.join(keys)}; name each store once")
        stores = [*x, *y]
        expect_aligned(stores, rows)
        shortest, longest = (pick(stores, key=lambda store: store.n_rows) for pick in (min, max))
        if rows is None and shortest.n_rows < longest.n_rows:
            raise SaeError(
                f"{shortest.key}: has {shortest.n_rows:,} rows, {longest.key} has {longest.n_rows:,}; harvest more of "
                f"it, or read the first {common_rows(stores):,} alone (train.store_rows)"
            )
        if rows is not None and not 0 < rows <= shortest.n_rows:
            raise SaeError(f"{shortest.key}: {rows:,} rows asked for, {shortest.n_rows:,} are there; harvest more")
        return cls(x, y, shortest.n_rows if rows is None else rows)

    # What it is

    @property
    def stores(self) -> Stores:
        return self.inputs + self.targets

    @property
    def written(self) -> Stores:
        """The stores of what is reconstructed."""
        return self.targets or self.inputs

    @property
    def widths_in(self) -> tuple[int, ...]:
        """The widths of the inputs, which lie side by side in a row."""
        return tuple(store.d for store in self.inputs)

    @property
    def widths_out(self) -> tuple[int, ...]:
        """The widths of the stores whose rows are reconstructed."""
        return tuple(store.d for store in self.written)

    @property
    def d_in(self) -> int:
        """Width of an input row."""
        return sum(self.widths_in)

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return sum(self.widths_out)

    @property
    def key(self) -> str:
        """The keys of its stores, for people."""
        inputs, targets = (" + ".join(store.key for store in side) for side in (self.inputs, self.targets))
        return f"{inputs} -> {targets}" if targets else inputs

    @property
    def recipes(self) -> tuple[list[Recipe], list[Recipe]]:
        """The recipes of the inputs and of the targets."""
        return [store.recipe for store in self.inputs], [store.recipe for store in self.targets]

    @property
    def split(self) -> str:
        return self.inputs[0].split

    @property
    def provenance(self) -> Provenance:
        """The origin of the inputs."""
        return provenance(self.inputs[0].recipe)

    @property
    def target_provenance(self) -> Provenance:
        """The origin of what is reconstructed: the inputs' where there are no targets."""
        return provenance(self.written[0].recipe)

    @cached_property
    def truth(self) -> Tensor | None:
        """The features that what is reconstructed was made of, float32 [G, d_out]; None where they are not known."""
        return self.written[0].truth if len(self.written) == 1 else None

    @checked
    def first(self, rows: int) -> Self:
        """Its first rows alone. Raises SaeError where there are not so many."""
        return replace(type(self).of(self.inputs, self.targets, rows=rows), limits=self.limits)

    def kept_up_to(self, limits: Limits | None) -> Self:
        """The same with other limits."""
        assert limits is None or len(limits) == len(self.stores)
        return replace(self, limits=limits)

    def limits_by(self, rule: OutlierRule) -> Limits | None:
        """Limits that a rule sets to its rows, None where it sets none. Raises SaeError where it cannot be applied."""
        limits = tuple(limit_of(store, rule, self.n_rows) for store in self.stores)
        return None if limits == (None,) * len(limits) else limits

    def held_out(self, root: Path | None = None) -> Self:
        """The same of the documents kept for judging, in a cache (by default that of its stores).

        Raises NotFound where they are not there.
        """
        root = self.inputs[0].path.parent.parent if root is None else root
        found = [catalogue.sibling_of(root, store, "validation") for store in self.stores]
        there = tuple(store for store in found if store is not None and store.n_rows)
        if len(there) < len(found):
            share = "take a share of the rows for validation, and harvest again"
            remedies = {
                "language_model": "tokenize with a validation share, then harvest again",
                "synthetic": "repeat `synthesize()`",
            }
            remedy = remedies.get(self.provenance.kind, share)
            lacking = next(mine for mine, its in zip(self.stores, found, strict=True) if its not in there)
            raise NotFound(f"{lacking.key}: no held-out rows beside it; {remedy}")
        inputs = len(self.inputs)
        return replace(type(self).of(there[:inputs], there[inputs:]), limits=self.limits)

    # Rows

    @checked
    def batches(self, batch: int = 4096, *, positions: bool = False, **settings: Unpack[Settings]) -> Batches:
        """Shuffled batches of the kept rows; the loader says what else it can be told.

        Raises SaeError for a number below the least that has a meaning, and for a device that is none.
        """
        expect_least({"batch": batch, **settings})
        if (rank := settings.get("rank", 0)) >= (world := settings.get("world", 1)):
            raise SaeError(f"rank = {rank}: is none of the {world} from 0 on; give less, or a larger world")
        try:
            torch.device(settings.get("device", "cpu"))
        except RuntimeError:
            raise SaeError(f"device = {settings['device']}: is none; try cpu or cuda:1") from None
        settings.setdefault("rows", self.n_rows)
        settings.setdefault("largest", self.limits)
        return Batches(self.inputs, self.targets, batch, positions=positions, **settings)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows [start, stop) in stored order, those to be left out as well."""
        x = self.read(start, stop)
        return Batch(x, side_by_side([store.rows(start, stop) for store in self.targets]) if self.targets else x)

    def read(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, d_in]: the inputs of rows [start, stop) in stored order."""
        return side_by_side([store.rows(start, stop) for store in self.inputs])

    def kept(self, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start]: which rows are kept; None where all of them are."""
        if self.limits is None:
            return None
        return within(self.stores, self.limits, start, stop)

    @checked
    def sample(self, count: int, *, first: int = 0, batch: int | None = None) -> Batch:
        """The next `count` kept rows from row `first` on; fewer where there are not so many.

        Raises SaeError for a number below the least that has a meaning.
        """
        expect_least({"count": count, "first": first, "batch": batch})
        parts = [*self.following(first, count, batch or count)]
        if not parts:
            return self.rows(0, 0)
        x = torch.cat([part.x for part in parts])
        return Batch(x, torch.cat([part.y for part in parts]) if self.targets else x)

    def following(self, first: int, count: int, batch: int) -> Iterator[Batch]:
        """The next `count` kept rows from row `first` on and around the end, in stored order, none twice.

        Fewer where fewer are kept. No batch is empty, and none has more than `batch` rows.
        """
        for low, high in ((first, self.n_rows), (0, first)):
            for start in range(low, high, batch):
                # without limits the number of rows that are still wanted is the number to read
                wanted = min(batch, high - start, count if self.limits is None else batch)
                found = self._chosen(start, start + wanted, most=count)
                count -= len(found.x)
                if len(found.x):
                    yield found
                if not count:
                    return

    def in_order(self, rows: int) -> Iterator[Batch]:
        """The kept ones of the first rows in stored order, a chunk at a time."""
        for start in range(0, rows, self._step):
            if len((found := self._chosen(start, min(start + self._step, rows))).x):
                yield found

    def left_out(self, rows: int, batch: int) -> Iterator[Batch]:
        """Those of the first rows that are not kept, with their positions, in batches of up to `batch` rows."""
        for start in range(0, 0 if self.limits is None else rows, self._step):
            stop = min(start + self._step, rows)
            far = self._chosen(start, stop, kept=False)
            if len(far.x):
                mask = self.kept(start, stop)
                positions = torch.from_numpy(self.inputs[0].positions(start, stop)[np.flatnonzero(~mask)])  # type: ignore[operator]
                yield from map(Batch, far.x.split(batch), far.y.split(batch), positions.split(batch))

    def expect_kept(self, count: int, argument: str) -> None:
        """Raise SaeError, naming the argument that asked for `count` rows, where fewer are kept."""
        kept = 0
        for start in range(0, self.n_rows, self._step):
            stop = min(start + self._step, self.n_rows)
            kept += stop - start if (mask := self.kept(start, stop)) is None else int(mask.sum())
            if kept >= count:
                return
        raise SaeError(
            f"{argument} = {count}: train.outliers leaves {kept:,} of the {self.n_rows:,} rows of {self.key}; "
            "lower it, allow larger norms, or harvest more"
        )

    @property
    def _step(self) -> int:
        """Rows to read at a time: those of the smallest chunk."""
        return min(store.chunk_rows for store in self.stores)

    def _chosen(self, start: int, stop: int, *, most: int | None = None, kept: bool = True) -> Batch:
        """Of rows [start, stop) those that are kept (or not), up to so many."""
        mask = self.kept(start, stop)
        if mask is None:
            return self.rows(start, stop if most is None else min(stop, start + most))
        chosen = torch.from_numpy(np.flatnonzero(mask == kept)[:most])
        rows = self.rows(start, stop) if len(chosen) else self.rows(start, start)
        x = rows.x[chosen]
        return Batch(x, rows.y[chosen] if self.targets else x)


def expect_least(said: Mapping[str, object]) -> None:
    """Raise SaeError for a number, by its name, below the least that has a meaning."""
    for name, number in said.items():
        if name in LEAST and number is not None and number < LEAST[name]:  # type: ignore[operator]
            raise SaeError(f"{name} = {number}: is too small; give {LEAST[name]} or more")
