"""From what was asked for to what is decomposed: stores, models and toys, found and checked before training."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sae.cache import catalogue
from sae.cache.disk.parsing import as_written, inner, text, whole
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG, Run
from sae.cache.seen import Seen, SeenStore
from sae.cache.tokens import TokenStore
from sae.pipeline.decompose.config import DecomposeConfig, LiveConfig, LocalConfig, ToyConfig
from sae.pipeline.decompose.folder import About, settings_of
from sae.pipeline.decompose.stage import Opener
from sae.pipeline.decompose.subjects import LiveModel, LocalMLP, ToyModels, mlp_of, presence_of
from sae.pipeline.formats.trained import dataset_of
from sae.pipeline.harvest.sources.language_model import HarvestConfig, check_tokens
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.hints import boot
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.worlds.superposition import Toy, Training, trained

TOY_RATE = 5e-3  # learning rate of a toy's training, which falls to 0


class Opened(NamedTuple):
    """What is decomposed, before it is: its settings, what config.json says of it, and how the subject is made."""

    config: DecomposeConfig
    about: About
    opener: Opener


def local(config: LocalConfig, dataset: Dataset, place: Workplace, model: LanguageModel | str | None = None) -> Opened:
    """Matrices of the MLP that read a dataset's inputs and gave its targets. model: where it is now, or itself."""
    mlp_of(dataset)
    dataset.held_out(place.cache)  # judged on, and missed before hours of training
    if dataset.n_rows < config.batch:
        raise SaeError(f"batch = {config.batch}: {dataset.key} has {dataset.n_rows:,} rows; lower it, or harvest more")
    if not isinstance(model, LanguageModel):
        with said_if_slow(place.progress, "loading the language model"):
            model = boot(dataset.inputs[0], model, place.device, place.offline)
    seen = Seen(
        dataset.n_rows, *(tuple(SeenStore(s.key, s.recipe) for s in side) for side in (dataset.inputs, dataset.targets))
    )
    subject = LocalMLP(config, dataset, model)
    return Opened(config, seen.as_json(), lambda _: subject)


def live(
    config: LiveConfig, tokens: TokenStore, place: Workplace, model: LanguageModel | None = None,
    contexts: int | None = None,
) -> Opened:  # fmt: skip
    """Matrices of a language model on the first contexts of a token store, all where it is not said how many."""
    contexts = tokens.n_contexts if contexts is None else contexts
    held_out = catalogue.sibling_of(place.cache, tokens, "validation")
    if held_out is None or not held_out.n_contexts:
        raise NotFound(f"{tokens.key}: no validation tokens beside it to judge on; tokenize with a validation share")
    if not config.batch <= contexts <= tokens.n_contexts:
        raise SaeError(
            f"batch = {config.batch}: {tokens.key} has {tokens.n_contexts:,} contexts; lower it, or tokenize more"
        )
    if model is None:
        with said_if_slow(place.progress, f"loading {config.model}"):
            model = LanguageModel.boot(
                config.model, device=place.device, revision=config.revision, offline=place.offline
            )
    check_tokens(HarvestConfig(model=config.model), model, tokens, place.progress, offline=place.offline)
    folder = Path(config.model)
    config = config.model_copy(update={"model": str(folder.resolve())}) if folder.is_dir() else config
    subject = LiveModel.of(config, model, tokens, held_out, contexts)
    about = {"tokens": {"key": tokens.key, "recipe": tokens.recipe, "contexts": contexts}, "model": model.recipe()}
    return Opened(config, about, lambda _: subject)


def toy(config: ToyConfig, place: Workplace) -> Opened:
    """Toy models of superposition, which are trained when they are needed."""
    device = devices.resolve_device(place.device)

    def opened(kept: dict[str, torch.Tensor]) -> ToyModels:
        return ToyModels(config, Toy(**kept) if kept else _trained(config, place), device)

    return Opened(config, {}, opened)


def _trained(config: ToyConfig, place: Workplace) -> Toy:
    presence = presence_of(config)
    training = Training(
        torch.ones_like(presence.probability), config.hidden, config.toy_steps, lr=TOY_RATE, schedule="linear"
    )
    seeds = [f"toy {seed}" for seed in range(config.seed, config.seed + config.instances)]
    place.progress.start("toys", config.toy_steps, "steps")
    try:
        return trained(presence, training, seeds, place.progress.advance)
    finally:
        place.progress.finish()


def again(run: Run, place: Workplace, model: str | None = None) -> Opened:
    """What a run decomposes, from its settings and from the stores it names."""
    config = settings_of(run)
    if isinstance(config, ToyConfig):
        return toy(config, place)
    if isinstance(config, LocalConfig):
        dataset = dataset_of(run, place.cache)
        return local(config, dataset.first(run.seen.rows), place, model)
    assert isinstance(config, LiveConfig)
    with as_written(run.path / CONFIG):
        said = inner(run.config, "tokens")
        recipe, contexts, key = inner(said, "recipe"), whole(said, "contexts", 1), text(said, "key")
        TokenStore.expect(recipe)
    tokens = catalogue.of_recipe(place.cache, TokenStore, recipe)
    if tokens is None:
        raise NotFound(
            f"{key}: {run.name} was trained on it, but it is not in {place.cache}; tokenize the same text again"
        )
    if model is not None:
        config = config.model_copy(update={"model": model})
    opened = live(config, tokens, place, contexts=contexts)
    if opened.about["model"] != run.config.get("model"):
        raise SaeError(
            f"model = {config.model}: is not the model that {run.name} began with; give that one with `model`"
        )
    return opened._replace(config=settings_of(run))
