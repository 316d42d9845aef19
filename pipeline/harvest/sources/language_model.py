"""Activations of a language model over a token store: one forward pass, one stream for each (layer, site).

Which tokens become rows is decided by tokens and positions only (`TokenMask`), never by values, so rows of all sites of
a model align. A window's batches are cut from its own contexts, as even as they can be; the context that straddles two
windows is computed for both.
"""

import functools
import itertools
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.device.landing import moved
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.disk.locks import reading
from sae.cache.errors import NotFound, SaeError
from sae.cache.store.codecs import codec, codec_recipe
from sae.cache.store.manifest import Window, place_after
from sae.cache.tokens import TokenStore
from sae.configs.base import Amount, Distinct
from sae.pipeline.harvest.files import by_worker
from sae.pipeline.language_model import SITES, LanguageModel, Point, hints
from sae.pipeline.language_model.token_mask import TokenMask, TokenPosition, TokenRows, rule_of
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress, Silent, said_if_slow
from sae.pipeline.tokenizers.matching import matches

from .base import Rows, RowSource, SourceConfig, Stream, Supply, WindowTask, register

VOCABULARY_PADDING = 1024  # models round their embedding up; more than this is another vocabulary
ESTIMATE_TOKENS = 1024  # the pass that is timed for --dry-run


class HarvestConfig(SourceConfig):
    """Settings of a harvest: which activations to keep and how."""

    source: Literal["language_model"] = Field("language_model", description="where rows come from")
    model: str = Field(
        "gpt2",
        description="gpt2, any hub model transformer_lens boots, a local Hugging Face folder, or tiny (embedded)",
    )
    revision: str | None = Field(None, description="revision of a hub model")
    layer: Annotated[tuple[int, ...], Distinct] = Field(
        (6,), min_length=1, description="layers, from 0: one, or several as 4,6,8 or 0-3"
    )
    site: Annotated[tuple[str, ...], Distinct] = Field(
        ("mlp_out",),
        min_length=1,
        description="sites: one, or several as resid_post,mlp_out; `choices()` explains each",
    )
    tokens: Amount = Field("all", description="training tokens to run")
    validation_tokens: Amount = Field(65_536, description="validation tokens to run, or all")
    rows: TokenMask = TokenMask()
    batch_tokens: int = Field(4096, ge=1, description="tokens in one forward pass, at most")
    dtype: str = Field("float32", description="precision of the forward pass: float32 or bfloat16")
    tokenizer: Literal["checked", "unchecked"] = Field(
        "checked", description="checked: tokens of another tokenizer than the model's are refused; unchecked: taken"
    )

    @property
    def points(self) -> tuple[Point, ...]:
        """Every layer with every site."""
        return tuple(Point(layer, site) for layer in self.layer for site in self.site)


@register
class LanguageModelSource(RowSource):
    """Activations of a language model, by layer and site, over a token store."""

    name: ClassVar[str] = "language_model"
    settings: ClassVar[type[SourceConfig]] = HarvestConfig

    config: HarvestConfig

    def __init__(self, opener: "Opener", model: LanguageModel, stores: Sequence[TokenStore]) -> None:
        """The points of the opener's settings, over token stores of different splits."""
        self.opener, self.config, self.model = opener, opener.config, model
        self.tokens = {store.split: store for store in stores}
        self.rows = {split: TokenRows(tokens, self.config.rows) for split, tokens in self.tokens.items()}
        self.splits, self.points = tuple(self.tokens), self.config.points
        self.batch = max(1, self.config.batch_tokens // stores[0].context_length)  # contexts in a forward pass
        self._named = {f"{point.layer}.{point.site}": point for point in self.points}
        self.streams = tuple(Stream(name, model.width(point)) for name, point in self._named.items())

    @classmethod
    def of_settings(cls, config: HarvestConfig, origins: Origins, progress: Progress) -> "LanguageModelSource":
        """Over the tokens of both splits that `origins.tokens` names (by default: those made last)."""
        train = catalogue.find(origins.root, TokenStore, origins.tokens)
        validation = catalogue.sibling_of(origins.root, train, "validation")
        progress.note(f"tokens: {train.key}{catalogue.unfinished(train)}")
        stores = [train, *([validation] if validation is not None and validation.n_contexts else [])]
        return cls.over(config, stores, progress, device=origins.device, offline=origins.offline)

    @classmethod
    def over(
        cls, config: HarvestConfig, stores: Sequence[TokenStore], progress: Progress, *,
        model: LanguageModel | None = None, device: str = "auto", offline: bool = False,
    ) -> "LanguageModelSource":  # fmt: skip
        """Over some token stores of different splits; `model` is the one that `config` names, where it is booted."""
        codec(config.codec)  # and the sites: what is wrong without looking at the model is said before it is loaded
        if unknown := [site for site in config.site if site not in SITES]:
            raise SaeError(f"site = {unknown[0]}: the sites are {', '.join(SITES)}")
        if model is None:
            with said_if_slow(progress, f"loading {config.model}"):
                model = LanguageModel.boot(
                    config.model, device=device, dtype=config.dtype, revision=config.revision, offline=offline
                )
        for point in config.points:
            model.check(point)
        recipe = model.recipe()
        there = config.model_copy(update={"model": _found_at(config.model), "revision": recipe["revision"]})
        opener = Opener(there, tuple(store.path for store in stores), device, offline, canonical(recipe))
        return cls(opener, model, stores)

    @classmethod
    def of_store(cls, store: ActivationStore, origins: Origins) -> "LanguageModelSource":
        recipe = store.recipe
        tokens = catalogue.of_recipe(origins.root, TokenStore, recipe["tokens"])
        if tokens is None:
            raise NotFound(
                f"{store.path}: cannot be repaired, since the tokens it was made from are not in {origins.root}; "
                "tokenize the same text again (`tokenize()`), or remove the store (`remove()`)"
            )
        config = HarvestConfig(layer=(int(recipe["layer"]),), site=(str(recipe["site"]),), rows=rule_of(store))
        name = canonical(recipe["model"])
        if name not in origins.loaded:
            origins.loaded[name] = hints.boot(store, origins.model, origins.device, origins.offline)
        model: LanguageModel = origins.loaded[name]
        return cls.over(config, [tokens], Silent(), model=model)

    def slug(self, stream: Stream, split: str) -> str:
        return f"{self.model.slug}-{stream.name}-{self.tokens[split].slug}"

    def identity(self) -> Recipe:
        return {"model": self.model.recipe(), "rows": self.config.rows.recipe()}

    def recipe(self, stream: Stream, split: str) -> Recipe:
        """In the place of a source and a split: the tokens of that split, the model and which of its activations."""
        point, identity = self._named[stream.name], self.identity()
        return {
            "tokens": self.tokens[split].recipe,
            "model": identity["model"],
            "layer": point.layer,
            "site": point.site,
            "hook": self.model.hook(point),
            "d": stream.d,
            "rows": identity["rows"],
            "codec": codec_recipe(codec(self.config.codec)),
        }

    def supply(self, split: str, wanted: Amount | None = None) -> Supply:
        tokens = self.tokens[split]
        if wanted is None:
            wanted = self.config.tokens if split == "train" else self.config.validation_tokens
        first = tokens.n_contexts
        if wanted != "all":
            first = min(first, -(-wanted // tokens.context_length))
        counted = self.rows[split].count(ActivationStore.layout({}), first)
        if not counted.rows:
            raise SaeError(f"{tokens.key}: no token of it becomes a row; see `harvest.rows`")
        asked = counted.within if first < tokens.n_contexts else counted.rows
        ended = tokens.closed or self.config.rows.last_window == "short"
        return Supply(counted.rows, asked, counted.starts.__getitem__, ended, tokens.n_tokens)

    def window(self, task: WindowTask) -> Iterator[Rows]:
        rows, start, end = self.rows[task.split], TokenPosition(*task.start), TokenPosition(*task.end)
        first, last = start.context, end.context + (end.row > 0)
        parts = -(-(last - first) // self.batch)
        bounds = [first + (last - first) * i // parts for i in range(parts + 1)]
        left = task.rows
        for low, high in itertools.pairwise(bounds):
            tokens, mask = rows.batch(low, high)
            keep = np.flatnonzero(mask)[start.row if low == first else 0 :][:left]
            left -= len(keep)
            yield Rows(low * tokens.shape[1] + keep, functools.partial(self._values, tokens, keep))

    def _values(self, tokens: np.ndarray, keep: np.ndarray, names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
        """The rows `keep` of the n * T places of contexts [n, T], at some streams; each is freed before the next."""
        points = {self._named[name]: name for name in names}
        found = self.model.activations(torch.from_numpy(tokens), list(points))
        index = moved(torch.from_numpy(keep), self.model.device)
        for point, name in points.items():
            yield name, found.pop(point).flatten(0, 1).index_select(0, index)

    def notes(self, task: WindowTask) -> dict[str, Any]:
        """Return the start of the next window, and what byte identity is promised for: device kind, precision, batch
        shape.
        """
        made = {
            "device": self.model.device.type, "dtype": self.model.recipe()["dtype"], "contexts": self.batch,
        }  # fmt: skip
        return {"next": TokenPosition(*task.end)._asdict(), "made": made}

    def noted(self, line: Window | None, folder: Path) -> TokenPosition:
        return (
            TokenPosition(0, 0) if line is None else TokenPosition(**place_after(line, TokenPosition._fields, folder))
        )

    def as_made(self, windows: Sequence[Window], window: Window) -> "LanguageModelSource":
        """With as many contexts in a forward pass as then (where the window's line is lost: as near it)."""
        near = sorted(windows, key=lambda other: abs(other.index - window.index))
        made = [one.notes["made"] for one in near if isinstance(one.notes.get("made"), dict)]
        known = [contexts for one in made if type(contexts := one.get("contexts")) is int and contexts > 0]
        found = copy(self)
        found.batch = known[0] if known else self.batch
        return found

    def hints(self) -> dict[str, str]:
        return {"model": self.opener.config.model}

    @contextmanager
    def ready(self, split: str, progress: Progress) -> Iterator[None]:
        with reading(self.tokens[split].path):
            check_tokens(self.config, self.model, self.tokens[split], progress, offline=self.opener.offline)
            yield

    def elsewhere(self) -> "Opener":
        return self.opener

    def tokens_per_second(self, split: str) -> float:
        """Speed of the forward pass, from the second of two small batches."""
        store = self.tokens[split]
        contexts = max(1, min(self.batch, store.n_contexts, ESTIMATE_TOKENS // store.context_length))
        tokens = torch.from_numpy(store.contexts(0, contexts))
        self.model.activations(tokens, list(self.config.points))
        begun = time.perf_counter()
        for activations in self.model.activations(tokens, list(self.config.points)).values():
            activations.flatten()[0].item()  # waits for the device
        return tokens.numel() / (time.perf_counter() - begun)

    def remedy(self, split: str, supply: Supply, rows: int) -> str:
        if self.config.rows != TokenMask():  # which is what tokenize reckons with
            rows = -(-rows * supply.tokens // supply.rows)
        name = "tokens" if split == "train" else "tokenize.validation_tokens"
        return (
            f"`tokenize()` again with `{name} = {rows}` to fill it, or `harvest.rows.last_window = short` to keep "
            "them as they are"
        )


@dataclass(frozen=True)
class Opener:
    """Makes the source in a worker process: where the model is, and the canonical recipe that it must then have."""

    config: HarvestConfig
    tokens: tuple[Path, ...]
    device: str
    offline: bool
    identity: str

    def __call__(self) -> LanguageModelSource:
        stores = [TokenStore(path) for path in self.tokens]
        return LanguageModelSource.over(self.config, stores, Silent(), model=_model(self), device=self.device)


@functools.lru_cache(maxsize=1)
def _model(opener: Opener) -> LanguageModel:
    """The model, loaded once in a worker process."""
    config = opener.config
    with by_worker("load the model"):
        model = LanguageModel.boot(
            config.model, device=opener.device, dtype=config.dtype, revision=config.revision, offline=opener.offline
        )
    if canonical(model.recipe()) != opener.identity:
        raise SaeError(
            f"model = {config.model}: a worker on {socket.gethostname()} has other weights of that name; give all "
            "machines the same"
        )
    return model


def check_tokens(
    config: HarvestConfig, model: LanguageModel, tokens: TokenStore, progress: Progress, *, offline: bool = False
) -> None:
    """Raise SaeError unless the token store is one for the model: made with its tokenizer, as far as can be known."""
    if tokens.context_length > model.context_length:
        raise SaeError(
            f"context = {tokens.context_length}: {model.name} reads at most {model.context_length} tokens; "
            "tokenize again with a smaller `context`"
        )
    if config.tokenizer == "checked":
        if matches(tokens, config.model, revision=model.revision, offline=offline):
            return
        progress.note(f"{tokens.key}: nothing says what tokenizer {model.name} has, so only their sizes were compared")
    if not tokens.n_vocab <= model.n_vocab <= tokens.n_vocab + VOCABULARY_PADDING:
        raise SaeError(
            f"tokens_from = {tokens.key}: its tokenizer has {tokens.n_vocab:,} tokens, {model.name} {model.n_vocab:,}; "
            "tokenize with the model's own tokenizer (`tokenizer`)"
        )


def _found_at(model: str) -> str:
    """A model's name, or the absolute path where it is a folder: what `sae eval` boots later, from any folder."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model
