"""Rows of a damaged activation store, made again: from their tokens and their model, or from the recipe alone.

What is found has to be what the recipe says, or nothing is repaired. `cache.upkeep.repair` does the rest.
"""

from functools import partial

import numpy as np

from sae.cache import catalogue
from sae.cache.activations import ActivationStore, WindowBuffer
from sae.cache.disk.identity import canonical
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.store.codecs import Columns
from sae.cache.store.manifest import Manifest, Window, place_after
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore
from sae.cache.upkeep.repair import Made, Maker
from sae.pipeline.harvest.stage import HarvestConfig
from sae.pipeline.harvest.synthesize import window_arrays
from sae.pipeline.harvest.synthetic import ground_truth
from sae.pipeline.harvest.windows import Passes, Task
from sae.pipeline.language_model import LanguageModel, Point
from sae.pipeline.language_model.hints import boot
from sae.pipeline.language_model.token_mask import Place, RowsOf, rule_of
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress


def maker(store: ActivationStore, origins: Origins, progress: Progress) -> Maker:
    """What makes the windows of a store again."""
    if "tokens" not in store.recipe:
        return SyntheticMaker(store, progress)
    return ActivationMaker(store, origins, progress)


class ActivationMaker:
    """Rows of a store from its tokens and its model."""

    def __init__(self, store: ActivationStore, origins: Origins, progress: Progress) -> None:
        tokens = catalogue.of_recipe(origins.root, TokenStore, store.recipe["tokens"])
        if tokens is None:
            raise NotFound(
                f"{store.path}: cannot be repaired, since the tokens it was made from are not in {origins.root}; "
                "tokenize the same text again (`sae tokenize`), or remove the store (`sae cache rm`)"
            )
        self.store, self.progress = store, progress
        self.point = Point(int(store.recipe["layer"]), str(store.recipe["site"]))
        self.rows = RowsOf(tokens, rule_of(store))
        self.model = _model_of(store, origins)

    def window(self, before: Store, window: Window, *, lost: bool) -> Made:
        assert isinstance(before, ActivationStore)
        task = self._task(before, window, lost)
        passes = Passes(self.model, self.rows, self._contexts(window))
        kept = _columns(before)
        stores = {self.point: before if kept is not None else ActivationStore(before.path, Manifest())}
        self.progress.start(f"repair {self.store.key}", task.rows, "rows")
        try:
            arrays = passes.compute(task, stores, partial(self.progress.advance, window=task.window))[self.point]
        finally:
            self.progress.finish()
        return Made(_with_columns(arrays, kept, task.window), passes.notes(task))

    def file(self, name: str) -> bytes:
        raise AssertionError(f"activations have no {name}")

    def _task(self, before: ActivationStore, window: Window, lost: bool) -> Task:
        """Where a window starts and ends is in the lines around it; where its own is lost, the tokens are counted."""
        index, windows = window.index, before.manifest.windows
        start = Place(**place_after(windows[index - 1], Place._fields, self.store.path)) if index else Place(0, 0)
        if not lost:
            end = Place(**place_after(window, Place._fields, self.store.path))
            return Task(index, window.stop - window.start, start, end, (self.point,))
        counted = self.rows.count(before.windows, self.rows.tokens.n_contexts)
        ends = [*counted.starts[index + 1 :], Place(self.rows.tokens.n_contexts, 0)]
        rows = min(window.stop, counted.rows) - window.start
        if rows <= 0:
            raise SaeError(
                f"{self.store.path}: window {index} was made from tokens that {self.rows.tokens.key} does not have; "
                "run `sae tokenize` for more tokens, then repeat"
            )
        return Task(index, rows, start, ends[0], (self.point,))

    def _place(self, after: Window) -> Place:
        return Place(**place_after(after, Place._fields, self.store.path))

    def _contexts(self, window: Window) -> int:
        """Contexts in a forward pass when a window was made (where its line is lost: when one near it was)."""
        near = sorted(self.store.manifest.windows, key=lambda other: abs(other.index - window.index))
        made = [one.notes["made"] for one in near if isinstance(one.notes.get("made"), dict)]
        known = [contexts for one in made if type(contexts := one.get("contexts")) is int and contexts > 0]
        usual = int(HarvestConfig.model_fields["batch_tokens"].default) // self.rows.tokens.context_length
        return known[0] if known else max(1, usual)


def _model_of(store: ActivationStore, origins: Origins) -> LanguageModel:
    """The language model of a store, booted once for all stores of one model."""
    name = canonical(store.recipe["model"])
    if name not in origins.loaded:
        origins.loaded[name] = boot(store, origins.model, origins.device, origins.offline)
    model: LanguageModel = origins.loaded[name]
    return model


class SyntheticMaker:
    """Rows of a store from its recipe, which is all that they depend on."""

    def __init__(self, store: ActivationStore, progress: Progress) -> None:
        self.store, self.progress, self.truth = store, progress, ground_truth(store.recipe)

    def window(self, before: Store, window: Window, *, lost: bool) -> Made:
        assert isinstance(before, ActivationStore)
        kept, rows = _columns(before), window.stop - window.start  # a lost one is whole: the source has no end
        buffer = WindowBuffer(before, window.index, rows, kept)
        self.progress.start(f"repair {self.store.key}", rows, "rows")
        try:
            arrays = window_arrays(self.truth, self.store.split, window.start, buffer, self.progress.advance)
        finally:
            self.progress.finish()
        return Made(_with_columns(arrays, kept, window.index), {})

    def file(self, name: str) -> bytes:
        raise AssertionError(f"activations have no {name}")


def _with_columns(arrays: dict[str, np.ndarray], kept: Columns | None, window: int) -> dict[str, np.ndarray]:
    """The arrays of a window, the columns that the store has among them where they belong to it."""
    if kept is None or window:
        return arrays
    return arrays | {"col_mean": kept.mean.numpy(), "col_scale": kept.scale.numpy()}


def _columns(store: ActivationStore) -> Columns | None:
    """The columns a store was coded by, or None where they have to be made again."""
    try:
        return store.columns if store.n_rows else None
    except DamagedStore:
        return None
