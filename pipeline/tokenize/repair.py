"""Contexts of a damaged token store, made again from its text and its tokenizer.

The recipe says what both are; where they are is said by the store's hints, by the recipe itself where a name is enough
(gpt2, fineweb, tiny), or by the caller. What is found has to be what the recipe says, or nothing is repaired.
"""

from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import DamagedStore, SaeError
from sae.cache.store.head import RECIPE
from sae.cache.store.manifest import Window, place_after
from sae.cache.store.store import Store
from sae.cache.tokens import VOCABULARY, TokenStore, vocabulary_bytes
from sae.cache.upkeep.repair import RebuiltWindow
from sae.pipeline.language_model import hints
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.tokenize.encoding import Encoder
from sae.pipeline.tokenize.packing import DocumentPosition
from sae.pipeline.tokenize.sources import text_source
from sae.pipeline.tokenize.stage import Contexts, TokenizeConfig, token_recipe
from sae.pipeline.tokenizers.former import identity, judge
from sae.pipeline.tokenizers.tokenizer import tokenizer


class TokenMaker:
    """Contexts of a store from its text and its tokenizer."""

    def __init__(self, store: TokenStore, origins: Origins, progress: Progress) -> None:
        recipe = store.recipe
        self.store, self.origins, self.progress = store, origins, progress
        self.spec = hints.tokenizer_of(store, origins.tokenizer)
        self.tok = tokenizer(self.spec, offline=origins.offline)
        if judge(self.tok, recipe["tokenizer"]) != "same":
            self._expect("tokenizer", self.spec, "tokenizer", identity(self.tok))

    def window(self, before: Store, window: Window, *, lost: bool) -> RebuiltWindow:
        recipe = self.store.recipe
        spec = hints.source_of(self.store, self.origins.source)
        config = self._config(spec)
        source = text_source(spec, offline=self.origins.offline, column=config.column)
        self._expect("source", spec, "source", source.recipe())
        described = token_recipe(config, source, self.tok, recipe["split"])
        if canonical({**described, "tokenizer": recipe["tokenizer"]}) != canonical(recipe):
            raise DamagedStore(f"{self.store.path / RECIPE}: is not a recipe of text; remove the store, make it again")
        self.progress.note(f"{self.store.key}: tokenizing window {window.index} again")
        windows = before.manifest.windows
        place = DocumentPosition(None, 0, 0, 0, 0)
        if window.index:
            place = DocumentPosition(
                **place_after(windows[window.index - 1], DocumentPosition._fields, self.store.path)
            )
        encoder = Encoder(self.spec, self.tok, offline=self.origins.offline)
        made = Contexts(config, recipe["split"], source, self.tok, encoder, place).take(window.stop - window.start)
        if made is None:
            raise SaeError(
                f"source = {spec}: ends before window {window.index} of {self.store.key}; give the whole text"
            )
        return RebuiltWindow(made[0], {"next": made[1]._asdict()})

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
            raise DamagedStore(f"{self.store.path / RECIPE}: is not a recipe of text; remove the store") from error

    def file(self, name: str) -> bytes:
        assert name == VOCABULARY
        return vocabulary_bytes(self.tok.vocabulary())

    def _expect(self, argument: str, spec: str, part: str, found: Recipe) -> None:
        """Raise SaeError unless a part of the recipe is what was found under a name."""
        wanted = self.store.recipe[part]
        if canonical(found) != canonical(wanted):
            differs = ", ".join(sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)))
            raise SaeError(
                f"{argument} = {spec}: is not what {self.store.key} was made from ({differs} differ), so nothing was "
                f"repaired; give that with `{argument}`, or remove the store (`remove()`) and make it again"
            )
