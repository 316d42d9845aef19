"""What damaged stores are made of, found again: tokens from their text, activations from their tokens and their model,
synthetic rows from their recipe.

The recipe says what things are; where they are is said by the store's hints, by the recipe itself where a name is
enough (gpt2, fineweb, tiny), or by the caller. What is found has to be what the recipe says, or nothing is repaired.
`cache.upkeep.repair` does the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from sae.cache import catalogue
from sae.cache.activations import ActivationStore, WindowBuffer
from sae.cache.disk.durable import expect_no_link
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import DamagedStore, NotFound, SaeError
from sae.cache.store.codecs import Columns
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import Manifest, Window, place_after
from sae.cache.store.store import Store
from sae.cache.tokens import VOCABULARY, TokenStore, vocabulary_bytes
from sae.cache.upkeep.damage import DamagedStoreView, Finding
from sae.cache.upkeep.repair import Made, Maker, Repaired, repair
from sae.pipeline.evaluate.stage import boot
from sae.pipeline.harvest.stage import HarvestConfig
from sae.pipeline.harvest.synthesize import window_arrays
from sae.pipeline.harvest.synthetic import ground_truth
from sae.pipeline.harvest.windows import Passes, Task
from sae.pipeline.language_model import LanguageModel, Point, hints
from sae.pipeline.language_model.token_mask import Place as RowPlace
from sae.pipeline.language_model.token_mask import RowsOf, rule_of
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.tokenize.encoding import Encoder
from sae.pipeline.tokenize.packing import Place as TextPlace
from sae.pipeline.tokenize.sources import text_source
from sae.pipeline.tokenize.stage import Contexts, TokenizeConfig, token_recipe
from sae.pipeline.tokenizers.former import identity, judge
from sae.pipeline.tokenizers.tokenizer import tokenizer


@dataclass(frozen=True)
class Origins:
    """Where what stores were made of is now. None: where their makers found it."""

    root: Path
    model: str | None = None
    source: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    offline: bool = False
    _models: dict[str, LanguageModel] = field(default_factory=dict)

    def model_of(self, store: ActivationStore) -> LanguageModel:
        """The language model of a store, booted once for all stores of one model."""
        name = canonical(store.recipe["model"])
        if name not in self._models:
            self._models[name] = boot(store, self.model, self.device, self.offline)
        return self._models[name]


def repair_all(
    found: Sequence[DamagedStoreView], findings: Sequence[Finding], origins: Origins, progress: Progress
) -> tuple[list[Repaired], list[SaeError]]:
    """Repair the stores that have damage, one after the other: what was done, and what could not be."""
    done: list[Repaired] = []
    problems: list[SaeError] = []
    for one in found:
        damaged = [finding.name for finding in findings if finding.store is one.store]
        if not damaged and not one.lines:
            continue
        try:
            if one.link is not None:
                expect_no_link(one.link)
            done.append(repair(one.store.path, damaged, lambda store: maker(store, origins, progress)))
        except SaeError as error:
            problems.append(error)
    return done, problems


def maker(store: Store, origins: Origins, progress: Progress) -> Maker:
    """What makes the windows of a store again."""
    if isinstance(store, TokenStore):
        return TokenMaker(store, origins, progress)
    assert isinstance(store, ActivationStore), store.kind
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
        self.model = origins.model_of(store)

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
        start = (
            RowPlace(**place_after(windows[index - 1], RowPlace._fields, self.store.path)) if index else RowPlace(0, 0)
        )
        if not lost:
            end = RowPlace(**place_after(window, RowPlace._fields, self.store.path))
            return Task(index, window.stop - window.start, start, end, (self.point,))
        counted = self.rows.count(before.windows, self.rows.tokens.n_contexts)
        ends = [*counted.starts[index + 1 :], RowPlace(self.rows.tokens.n_contexts, 0)]
        rows = min(window.stop, counted.rows) - window.start
        if rows <= 0:
            raise SaeError(
                f"{self.store.path}: window {index} was made from tokens that {self.rows.tokens.key} does not have; "
                "run `sae tokenize` for more tokens, then repeat"
            )
        return Task(index, rows, start, ends[0], (self.point,))

    def _place(self, after: Window) -> RowPlace:
        return RowPlace(**place_after(after, RowPlace._fields, self.store.path))

    def _contexts(self, window: Window) -> int:
        """Contexts in a forward pass when a window was made (where its line is lost: when one near it was)."""
        near = sorted(self.store.manifest.windows, key=lambda other: abs(other.index - window.index))
        made = [one.notes["made"] for one in near if isinstance(one.notes.get("made"), dict)]
        known = [contexts for one in made if type(contexts := one.get("contexts")) is int and contexts > 0]
        usual = int(HarvestConfig.model_fields["batch_tokens"].default) // self.rows.tokens.context_length
        return known[0] if known else max(1, usual)


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


class TokenMaker:
    """Contexts of a store from its text and its tokenizer."""

    def __init__(self, store: TokenStore, origins: Origins, progress: Progress) -> None:
        recipe = store.recipe
        self.store, self.origins, self.progress = store, origins, progress
        self.spec = hints.tokenizer_of(store, origins.tokenizer)
        self.tok = tokenizer(self.spec, offline=origins.offline)
        if judge(self.tok, recipe["tokenizer"]) != "same":
            self._expect("--tokenizer", self.spec, "tokenizer", identity(self.tok))

    def window(self, before: Store, window: Window, *, lost: bool) -> Made:
        recipe = self.store.recipe
        spec = hints.source_of(self.store, self.origins.source)
        config = self._config(spec)
        source = text_source(spec, offline=self.origins.offline, column=config.column)
        self._expect("--source", spec, "source", source.recipe())
        described = token_recipe(config, source, self.tok, recipe["split"])
        if canonical({**described, "tokenizer": recipe["tokenizer"]}) != canonical(recipe):
            raise DamagedStore(f"{self.store.path / RECIPE}: is no recipe of text; remove the store and make it again")
        self.progress.note(f"{self.store.key}: tokenizing window {window.index} again")
        windows = before.manifest.windows
        start = TextPlace(None, 0, 0, 0, 0)
        place = (
            TextPlace(**place_after(windows[window.index - 1], TextPlace._fields, self.store.path))
            if window.index
            else start
        )
        encoder = Encoder(self.spec, self.tok, offline=self.origins.offline)
        made = Contexts(config, recipe["split"], source, self.tok, encoder, place).take(window.stop - window.start)
        if made is None:
            raise SaeError(
                f"--source {spec}: ends before window {window.index} of {self.store.key}; give the whole text"
            )
        return Made(made[0], {"next": made[1]._asdict()})

    def _config(self, spec: str) -> TokenizeConfig:
        """The settings that the recipe says."""
        recipe = self.store.recipe
        try:
            return TokenizeConfig(
                source=spec, column=recipe["source"].get("column", "text"), tokenizer=self.spec,
                context=recipe["context_length"], validation=recipe["validation"], packing=recipe["packing"],
                begin=recipe.get("begin", "document"), separator=recipe.get("separator"),
                min_tokens=recipe.get("min_tokens", 0), seed=recipe["shuffle"]["seed"],
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:  # pydantic's is a ValueError
            raise DamagedStore(f"{self.store.path / RECIPE}: is no recipe of text; remove the store") from error

    def file(self, name: str) -> bytes:
        assert name == VOCABULARY
        return vocabulary_bytes(self.tok.vocabulary())

    def _expect(self, option: str, spec: str, part: str, found: Recipe) -> None:
        """Raise SaeError unless a part of the recipe is what was found under a name."""
        wanted = self.store.recipe[part]
        if canonical(found) != canonical(wanted):
            differs = ", ".join(sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)))
            raise SaeError(
                f"{option} {spec}: is not what {self.store.key} was made from ({differs} differ), so nothing was "
                f"repaired; give that with {option}, or remove the store (`sae cache rm`) and make it again"
            )
