"""A dictionary's predictions in a language model, in the place of the activations that they are of.

Of one store: as the model goes, what it reads decides what is written. Of several stores a prediction may take
activations that the model computes later, so all are read in a pass of the model as it is, and the predictions put at
all points at once, and at each alone. What goes layer by layer (a cross-layer transcoder) is spliced as it comes: each
layer reads what the model makes of the predictions that earlier ones put; at each point alone that is the same thing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.device import landing
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.window_buffer import norms_of
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.language_model.interventions import Change, Intervention, predicting
from sae.pipeline.metrics.downstream import AT, MEAN, SAE, ZERO
from sae.pipeline.saes.contract import LayerByLayer

Rows = Callable[[Tensor], Tensor]
"""Rows [n, d_in] -> rows [n, d_out]."""


class Spliced(NamedTuple):
    """Interventions by name, and what says, after their passes, which positions they replaced: bool [B, T]."""

    interventions: Mapping[str, Intervention]
    replaced: Callable[[], Tensor]

    def of(self, name: str) -> dict[str, str]:
        """The interventions that one of several predictors is judged by: its own, called "sae", and the baselines."""
        own = {SAE + other[len(name) :]: other for other in self.interventions if other.split(AT)[0] == name}
        return {**own, ZERO: ZERO, MEAN: MEAN}


def spliced(
    saes: Mapping[str, Rows], model: LanguageModel, ids: Tensor, mask: Tensor, dataset: Dataset, mean: Tensor
) -> Spliced:
    """What replaces activations of tokens [B, T], where the mask [B, T] is True: predictions by name, zeros and
    a mean [d_out]. Positions with rows above the dataset's limits keep their own. Ids and mask are on the CPU, so that
    a model's device need not be asked how many rows there are.

    Of several stores also by each prediction at each point alone ("sae at 3.mlp_out").
    """
    if len(dataset.inputs) > 1 or len(dataset.targets) > 1:
        several = _Several.of(model, ids, mask, dataset)
        return Spliced(several.interventions(saes, mean), lambda: several.at.replaced)
    rows = _Replaced(_Positions.of(mask, model.device), dataset)
    by: dict[str, Rows] = {
        **saes,
        ZERO: lambda x: x.new_zeros(len(x), len(mean)),
        MEAN: lambda x: mean.to(x.dtype).expand(len(x), -1),
    }
    reads, writes = point_of(dataset.inputs[0]), point_of(dataset.written[0])
    return Spliced(
        {name: predicting(rows.by(new), reads, writes) for name, new in by.items()}, lambda: rows.at.replaced
    )


def point_of(store: ActivationStore) -> Point:
    """The point of a language model that a store is of."""
    origin = provenance(store.recipe)
    assert isinstance(origin, LanguageModelRows), "only such rows come with tokens"
    return Point(origin.layer, origin.site)


@dataclass
class _Positions:
    """Positions of a batch of contexts, on the model's device: mask bool [B, T], where int64 [n] among all B * T, and
    which of them keep their own activations after all, far bool [n].
    """

    mask: Tensor
    where: Tensor
    far: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, device: torch.device) -> "_Positions":
        where = mask.flatten().nonzero().view(-1)
        return cls(landing.moved(mask, device), landing.moved(where, device))

    def rows(self, values: Tensor) -> Tensor:
        """float32 [n, width]: those of values [B, T, width] that are at the positions."""
        return values.flatten(0, 1).index_select(0, self.where).float()

    def keep_above(self, values: Tensor, most: float) -> None:
        """Have positions keep their own where the norms of values [B, T, width] are larger."""
        far = ~(norms_of(self.rows(values)) <= most)
        self.far = far if self.far is None else self.far | far

    def put(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values [B, T, width] with rows [n, width] at the positions."""
        flat, rows = values.flatten(0, 1), rows.to(values.dtype)
        if self.far is not None:
            rows = torch.where(self.far[:, None], flat.index_select(0, self.where), rows)
        return flat.index_copy(0, self.where, rows).view_as(values)

    @property
    def replaced(self) -> Tensor:
        """bool [B, T]: the positions that do not keep their own."""
        if self.far is None:
            return self.mask
        return self.mask.flatten().index_copy(0, self.where, ~self.far).view_as(self.mask)


@dataclass
class _Replaced:
    """The positions of a batch of contexts that are replaced.

    Norms are seen when the first replacement is asked for; each of them is given the same activations.
    """

    at: _Positions
    dataset: Dataset
    seen: bool = False

    def by(self, new: Rows) -> Callable[[Tensor, Tensor], Tensor]:
        """Replace activations [B, T, d_out] at these positions by a function of those read there, row by row."""

        def replace(written: Tensor, read: Tensor) -> Tensor:
            each = (read, written) if self.dataset.targets else (read,)
            for values, most in zip(each, self.dataset.limits or (), strict=False):
                if most is not None and not self.seen:
                    self.at.keep_above(values, most)
            self.seen = True
            return self.at.put(written, new(self.at.rows(read)))

        return replace


@dataclass
class _Several:
    """The same of several stores: the points that are read and written, and the rows read at the positions."""

    at: _Positions
    reads: list[Point]
    writes: list[Point]
    widths: list[int]
    x: Tensor

    @classmethod
    def of(cls, model: LanguageModel, ids: Tensor, mask: Tensor, dataset: Dataset) -> "_Several":
        reads, writes = ([point_of(store) for store in side] for side in (dataset.inputs, dataset.written))
        limits = dict(zip(dataset.stores, dataset.limits or (), strict=False))
        limited = {point_of(store): most for store, most in limits.items() if most is not None}
        found = model.activations(ids, [*dict.fromkeys([*reads, *limited])])
        at = _Positions.of(mask, model.device)
        for point, most in limited.items():
            at.keep_above(found[point], most)
        x = torch.cat([at.rows(found[point]) for point in reads], dim=1)
        return cls(at, reads, writes, [*dataset.widths_out], x)

    def interventions(self, saes: Mapping[str, Rows], mean: Tensor) -> dict[str, Intervention]:
        """What is done at which points, by name."""
        each = mean.expand(len(self.x), -1)
        found = {ZERO: self._at_once(torch.zeros_like(each)), MEAN: self._at_once(each)}
        for name, sae in saes.items():
            y_hat = sae(self.x)
            found[name] = self._as_they_come(sae) if isinstance(sae, LayerByLayer) else self._at_once(y_hat)
            alone = zip(self.writes, y_hat.split(self.widths, dim=1), strict=True)
            found |= {f"{name}{AT}{point}": {point: self._putting(rows)} for point, rows in alone}
        return found

    def _at_once(self, rows: Tensor) -> Intervention:
        parts = rows.split(self.widths, dim=1)
        return {point: self._putting(part) for point, part in zip(self.writes, parts, strict=True)}

    def _putting(self, rows: Tensor) -> Change:
        return lambda value: self.at.put(value, rows)

    def _as_they_come(self, sae: LayerByLayer) -> Intervention:
        """Each layer reads in the pass itself; what it adds is there when its point, or a later one, is written."""
        y_hat, seen = sae.constant(len(self.x)), [False] * len(self.reads)
        columns = [sum(self.widths[:layer]) for layer in range(len(self.widths))]

        def look(layer: int, value: Tensor) -> None:
            place, part = sae.written_by(layer, self.at.rows(value))
            y_hat[:, place:] += part
            seen[layer] = True

        def write(layer: int, value: Tensor) -> Tensor:
            if not all(seen[: layer + 1]):
                late = self.reads[seen.index(False)]
                raise SaeError(f"{late} is computed after {self.writes[layer]}, so it cannot decide what goes there")
            return self.at.put(value, y_hat[:, columns[layer] : columns[layer] + self.widths[layer]])

        def change(point: Point) -> Change:
            def both(value: Tensor) -> Tensor:
                if point in self.writes:
                    value = write(self.writes.index(point), value)
                if point in self.reads:
                    look(self.reads.index(point), value)
                return value

            return both

        return {point: change(point) for point in dict.fromkeys([*self.reads, *self.writes])}
