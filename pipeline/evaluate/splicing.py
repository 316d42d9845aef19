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
    a mean [d_out]. Positions with rows above the dataset's limits keep their own.

    Of several stores also by each prediction at each point alone ("sae at 3.mlp_out").
    """
    if len(dataset.inputs) > 1 or len(dataset.targets) > 1:
        several = _Several.of(model, ids, mask, dataset)
        return Spliced(several.interventions(saes, mean), lambda: several.mask)
    rows = _Replaced(mask, dataset)
    by: dict[str, Rows] = {
        **saes,
        ZERO: lambda x: x.new_zeros(len(x), len(mean)),
        MEAN: lambda x: mean.to(x.dtype).expand(len(x), -1),
    }
    reads, writes = point_of(dataset.inputs[0]), point_of(dataset.written[0])
    return Spliced({name: predicting(rows.by(new), reads, writes) for name, new in by.items()}, lambda: rows.mask)


def point_of(store: ActivationStore) -> Point:
    """The point of a language model that a store is of."""
    origin = provenance(store.recipe)
    assert isinstance(origin, LanguageModelRows), "only such rows come with tokens"
    return Point(origin.layer, origin.site)


@dataclass
class _Replaced:
    """The positions of a batch of contexts that are replaced: mask bool [B, T], without those above the limits.

    Norms are seen when the first replacement is asked for; each of them is given the same activations.
    """

    mask: Tensor
    dataset: Dataset

    def by(self, new: Rows) -> Callable[[Tensor, Tensor], Tensor]:
        """Replace activations [B, T, d_out] at these positions by a function of those read there, row by row."""

        def replace(written: Tensor, read: Tensor) -> Tensor:
            each = (read, written) if self.dataset.targets else (read,)
            for values, most in zip(each, self.dataset.limits or (), strict=False):
                if most is not None:
                    self.mask = self.mask & (norms_of(values) <= most)
            return _put(written, self.mask, new(read[self.mask].float()))

        return replace


@dataclass
class _Several:
    """The same of several stores: the points that are read and written, and the rows read where the mask is True."""

    mask: Tensor
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
        for point, most in limited.items():
            mask = mask & (norms_of(found[point]) <= most)
        x = torch.cat([found[point][mask].float() for point in reads], dim=1)
        return cls(mask, reads, writes, [*dataset.widths_out], x)

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
        return lambda value: _put(value, self.mask, rows)

    def _as_they_come(self, sae: LayerByLayer) -> Intervention:
        """Each layer reads in the pass itself; what it adds is there when its point, or a later one, is written."""
        y_hat, seen = sae.constant(len(self.x)), [False] * len(self.reads)
        columns = [sum(self.widths[:layer]) for layer in range(len(self.widths))]

        def look(layer: int, value: Tensor) -> None:
            place, part = sae.written_by(layer, value[self.mask].float())
            y_hat[:, place:] += part
            seen[layer] = True

        def write(layer: int, value: Tensor) -> Tensor:
            if not all(seen[: layer + 1]):
                late = self.reads[seen.index(False)]
                raise SaeError(f"{late} is computed after {self.writes[layer]}, so it cannot decide what goes there")
            return _put(value, self.mask, y_hat[:, columns[layer] : columns[layer] + self.widths[layer]])

        def change(point: Point) -> Change:
            def both(value: Tensor) -> Tensor:
                if point in self.writes:
                    value = write(self.writes.index(point), value)
                if point in self.reads:
                    look(self.reads.index(point), value)
                return value

            return both

        return {point: change(point) for point in dict.fromkeys([*self.reads, *self.writes])}


def _put(values: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """Values [B, T, width] with rows [n, width] where the mask [B, T] is True."""
    out = values.clone()
    out[mask] = rows.to(values.dtype)
    return out
