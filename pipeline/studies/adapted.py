"""The model of a store with an adapter merged into it, and its rows over the same tokens."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import digest
from sae.cache.disk.processes import temporary
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.tokens import TokenStore
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest
from sae.pipeline.language_model import LanguageModel, adapters, hints
from sae.pipeline.language_model.files import RANDOM, find_model, read_json
from sae.pipeline.language_model.loading import load
from sae.pipeline.language_model.token_mask import rule_of
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.studies.lab import Lab

FOLDER, MADE = "adapted", "adapted.json"


class Adapter(NamedTuple):
    """An adapter in a folder, or one to train on a token store; `Finetune` says what its settings mean."""

    folder: str | None
    corpus: str | None
    steps: int
    lr: float
    rank: int
    alpha: int
    contexts: int


def adapted_model(adapter: Adapter, store: ActivationStore, lab: Lab) -> tuple[Path, list[float]]:
    """The folder of the model with the adapter merged in, and the losses of the adapter's training; made once."""
    place = lab.place
    if "tokens" not in store.recipe:
        raise SaeError(f"activations = {store.key}: come from no language model; name a store that `harvest()` made")
    if store.recipe["model"]["dtype"] != "float32":
        raise SaeError(f"activations = {store.key}: of a model in {store.recipe['model']['dtype']}; harvest in float32")
    name = hints.model_of(store, None, place.offline)
    if name.startswith(RANDOM):
        raise SaeError(f"{name}: an untrained model is in no folder that an adapter could be merged into")
    recipe: dict[str, Any] = {"base": store.recipe["model"]}
    tokens: TokenStore | None = None
    if adapter.folder is not None:
        source = Path(adapter.folder).expanduser()
        adapters.expect_adapter(source)
        parts = [source / adapters.CONFIG, source / adapters.WEIGHTS]
        recipe["adapter"] = [_sha256(path) for path in parts]
    else:
        tokens = _tokens(adapter, store, place.cache)
        recipe |= {"tokens": tokens.recipe, **adapter._asdict()}
    folder = place.runs / FOLDER / digest(recipe)
    if (folder / MADE).is_file():
        made = read_json(folder / MADE, folder.name)
        return folder, made.get("losses", [])
    files = find_model(name, revision=store.recipe["model"]["revision"], offline=place.offline)
    device = devices.resolve_device(place.device)
    with said_if_slow(place.progress, f"loading {files.name}"):
        model = load(files, torch.float32).model.to(device)
    losses: list[float] = []
    if tokens is None:
        model = adapters.merged_with(model, source)
    else:
        place.progress.start("adapter", adapter.steps, "steps")
        try:
            model, losses = adapters.trained_on(
                model, _batches(tokens, adapter.contexts, device, place.progress), steps=adapter.steps,
                lr=adapter.lr, rank=adapter.rank, alpha=adapter.alpha, seed=0,
            )  # fmt: skip
        finally:
            place.progress.finish()
    partial = folder.with_name(temporary(folder.name))
    adapters.save(model.cpu(), partial, {"made": recipe, "losses": losses})
    if folder.exists():
        shutil.rmtree(folder)  # of a process that was killed
    partial.rename(folder)
    return folder, losses


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tokens(adapter: Adapter, store: ActivationStore, root: Path) -> TokenStore:
    """The tokens to train the adapter on."""
    if adapter.corpus is None:
        return _tokens_of(store, root)
    found = catalogue.find(root, TokenStore, adapter.corpus, "corpus")
    if found.recipe["tokenizer"] != store.recipe["tokens"]["tokenizer"]:
        raise SaeError(f"corpus = {found.key}: tokens of another tokenizer than the model's; tokenize it with that one")
    return found


def _tokens_of(store: ActivationStore, root: Path) -> TokenStore:
    """The tokens that a store was harvested from. Raises NotFound where they are gone."""
    found = catalogue.of_recipe(root, TokenStore, store.recipe["tokens"])
    if found is None:
        raise NotFound(f"{store.key}: its tokens are not in {root}; run `tokenize()` again")
    return found


def _batches(tokens: TokenStore, count: int, device: torch.device, progress: Progress) -> Iterator[Tensor]:
    """Contexts [B, T] in a seeded order, again and again; those that padding fills are left out."""
    whole = np.flatnonzero(tokens.lengths(0, tokens.n_contexts) == tokens.context_length)
    if not len(whole):
        raise SaeError(f"corpus = {tokens.key}: no context is full; tokenize more text")
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(whole)
        for at in range(0, len(order), count):
            rows = [tokens.contexts(int(i), int(i) + 1)[0] for i in order[at : at + count]]
            yield torch.from_numpy(np.stack(rows)).to(device)
            progress.advance(1)


def harvested(store: ActivationStore, model: LanguageModel, folder: Path, lab: Lab) -> Dataset:
    """The rows of the adapted model, over the tokens of a store and of the held-out store beside it."""
    place = lab.place
    held_out = catalogue.sibling_of(place.cache, store, "validation")
    if held_out is None:
        raise NotFound(f"{store.key}: no held-out rows beside it to judge on; harvest it with a validation share")
    stores = [_tokens_of(one, place.cache) for one in (store, held_out)]
    config = HarvestConfig(
        model=str(folder), layer=(int(store.recipe["layer"]),), site=(str(store.recipe["site"]),),
        codec=str(store.recipe["codec"]["name"]), rows=rule_of(store), validation_tokens="all", tokenizer="unchecked",
    )  # fmt: skip
    source = LanguageModelSource.over(config, stores, place.progress, model=model, device=place.device, offline=True)
    found = harvest(source, place.cache, place.progress).stores["train"]
    return Dataset.of(found[0])
