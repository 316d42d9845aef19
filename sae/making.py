"""What a session makes: stores from text and rows, runs from stores; and where these come from and go to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from sae import configs, given
from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.arguments import checked, fits
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG, Run
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore
from sae.dictionaries import Named, load
from sae.pipeline import formats
from sae.pipeline.decompose import folder as decomposed
from sae.pipeline.decompose import opening
from sae.pipeline.decompose.config import KINDS, LiveConfig, LocalConfig, ToyConfig
from sae.pipeline.decompose.stage import decompose
from sae.pipeline.formats.trained import load_latents
from sae.pipeline.harvest.sources import SOURCES, RowSource, settings_of_sources
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest as harvest_rows
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.loggers.base import expect
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.saes import TrainableConfig
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.sharing.pull import pull
from sae.pipeline.sharing.push import push_run, push_store
from sae.pipeline.tokenize.stage import TokenizeConfig
from sae.pipeline.tokenize.stage import tokenize as tokenize_text
from sae.pipeline.train.config import TrainConfig
from sae.pipeline.train.imported import adopt
from sae.pipeline.train.stage import open_run
from sae.pipeline.train.sweep import open_all, sweep
from sae.rows import dataset_of
from sae.runs import DecomposedRun, TrainedRun


class Making(Workplace):
    """The half of a session that fills the cache and the folder of runs."""

    # Stores

    @checked
    def tokenize(self, *, preset: str | None = None, workers: int = 1, **settings: Any) -> TokenStore:
        """Text to tokens, as `sae tokenize`: the store of the training documents; the validation store lies beside it.

        `settings` are those of the section `tokenize` (`source`, `tokenizer`, `context`, `tokens`, ...).
        """
        given.expect_workers(workers)
        config = given.settings("tokenize", TokenizeConfig, preset, settings)
        found = tokenize_text(config, self.cache, self.progress, workers=workers, offline=self.offline).stores["train"]
        catalogue.remember(self.cache, TokenStore.kind, [found.key])
        return found

    @checked
    def harvest(
        self, tokens_from: TokenStore | Named | None = None, *, model: LanguageModel | Named | None = None,
        preset: str | None = None, workers: int = 1, **settings: Any,
    ) -> dict[str, Dataset]:  # fmt: skip
        """Rows into the cache, as `sae harvest`: a dataset for each stream, which for a model are its `layer.site`.

        tokens_from: a token store or its name; default: the last one made. model: its name, or the model itself.
        `settings` are those of the section `harvest` (`layer`, `site`, `codec`, `tokens`, ...); with another `source`
        than a language model (`synthetic`, `table`, ...), those of that source.
        """
        given.expect_workers(workers)
        named, booted = given.model_of(model)
        if model is not None:
            settings["model"] = named if booted is None else booted.name
        settings |= {name: [settings[name]] for name in ("layer", "site") if fits(settings.get(name), int | str)}
        config = configs.resolve("harvest", settings_of_sources(), preset=preset, given=settings)
        source: RowSource
        if isinstance(config, HarvestConfig):
            if not isinstance(tokens_from, TokenStore):
                tokens_from = catalogue.find(self.cache, TokenStore, given.text_of(tokens_from))
            held_out = catalogue.sibling_of(self.cache, tokens_from, "validation")
            stores = [tokens_from, *([held_out] if held_out is not None and held_out.n_contexts else [])]
            source = LanguageModelSource.over(
                config, stores, self.progress, model=booted, device=self.device, offline=self.offline
            )
        elif tokens_from is not None:
            raise SaeError(f"tokens_from: the rows of {config.source} come from no tokens; leave it out")
        else:
            origins = Origins(self.cache, device=self.device, offline=self.offline)
            source = SOURCES[config.source].of_settings(config, origins, self.progress)
        found = harvest_rows(source, self.cache, self.progress, workers=workers).stores["train"]
        catalogue.remember(self.cache, ActivationStore.kind, [store.key for store in found][: source.remembered])
        return {stream.name: Dataset.of(store) for stream, store in zip(source.streams, found, strict=True)}

    @checked
    def dataset(
        self, rows: Any = None, target: Any = None, *, first: int | None = None, name: str = "rows",
        validation: float = 0.05,
    ) -> Dataset:  # fmt: skip
        """Rows to train and evaluate on, with targets [n, d_out] for a transcoder.

        Either a store of the cache, by its key or the beginning of it (default: what the last harvest made), or a list
        of stores whose rows lie side by side, and the `first` so many of the rows; or rows in memory [n, d], of which a
        share `validation` is held out. Those are written into the cache under `name`, so that training on them again
        takes up what is there. An iterator of parts [n_i, d] is read once, never held in memory, and becomes the store
        that a file of its rows would.
        """
        return dataset_of(self, rows, target, first=first, name=name, validation=validation)

    # Runs

    @overload
    def train(
        self, dictionary: TrainableConfig | None, rows: Any = None, /, *, name: str | None = None, **more: Any
    ) -> TrainedRun: ...
    @overload
    def train(self, dictionary: Sequence[TrainableConfig], rows: Any = None, /, **more: Any) -> list[TrainedRun]: ...

    @checked
    def train(
        self, dictionary: Any, rows: Any = None, /, *, name: str | None = None, preset: str | None = None,
        log: Sequence[str] | str = (), **settings: Any,
    ) -> TrainedRun | list[TrainedRun]:  # fmt: skip
        """Train a dictionary, as `sae train`; several on the same batches, in one pass over the rows.

        dictionary: its settings, as `sae.TopK(k=32, d_sae=8192)` (None: the preset's). rows: whatever `dataset` takes;
        inputs and targets in memory as a pair (x, y). `settings` are those of the section `train` (`lr`, `batch`,
        `steps`, `rows`, ...). The run folder is named by all of these unless `name` says otherwise; a run that is there
        is continued where it was, and a finished one is given back as it is. log: `wandb`, `tensorboard`, beside the
        run's metrics.jsonl.
        """
        loggers = expect([log] if isinstance(log, str) else log)
        several = isinstance(dictionary, Sequence)
        chosen: Sequence[TrainableConfig | None] = dictionary if isinstance(dictionary, Sequence) else [dictionary]
        for one in chosen:
            if not isinstance(one, TrainableConfig | None):
                raise SaeError(f"dictionary: {one!r} are not settings of one; give them as sae.TopK(k=32, d_sae=8192)")
        if not chosen:
            raise SaeError("dictionary: an empty list; give settings of at least one, as [sae.TopK(k=32)]")
        every = [
            given.settings("train", TrainConfig, preset, settings | ({} if one is None else {"sae": one.model_dump()}))
            for one in chosen
        ]
        dataset = self.dataset(*given.pair_of(rows))
        if name is None:
            found = open_all(every, dataset, self.runs)
        elif several:
            raise SaeError(f"name = {name!r}: several dictionaries have names of their own; leave it out")
        else:
            given.expect_folder_name(name)
            there = (self.runs / name / CONFIG).exists()
            found = [open_run(every[0], dataset, self.runs, name, resume=there)]
        sweep(found, dataset, self.progress, device=self.device, loggers=loggers)
        runs = [TrainedRun(run.path) for run in found]
        return runs if several else runs[0]

    @checked
    def decompose(
        self, rows: Any = None, target: Any = None, /, *, kind: str = "local",
        tokens_from: TokenStore | Named | None = None, model: LanguageModel | Named | None = None,
        name: str | None = None, preset: str | None = None, **settings: Any,
    ) -> DecomposedRun:  # fmt: skip
        """Weight matrices to components, as `sae decompose`. A run that is there is continued, or given back.

        kind: `local`, the matrices of the MLP that read `rows` and gave `target` (whatever `dataset` takes); `live`,
        those of `model` that `matrices` names, on `tokens_from` (default: the token store made last); `toy`. `settings`
        are those of the section `decompose` (`matrices`, `components`, `importance`, `steps`, ...).
        """
        named, booted = given.model_of(model)
        said = settings | {"kind": kind}
        if kind == "live" and model is not None:
            said["model"] = named if booted is None else booted.name
        config = configs.resolve("decompose", KINDS, preset=preset, given=said)
        if isinstance(config, LocalConfig):
            opened = opening.local(config, self.dataset(rows, target), self, booted or named)
        elif isinstance(config, LiveConfig):
            tokens = tokens_from
            if not isinstance(tokens, TokenStore):
                tokens = catalogue.find(self.cache, TokenStore, given.text_of(tokens))
            opened = opening.live(config, tokens, self, booted)
        else:
            assert isinstance(config, ToyConfig)
            opened = opening.toy(config, self)
        if name is not None:
            given.expect_folder_name(name)
        name = name or decomposed.run_name(opened.config, opened.about)
        there = (self.runs / name / CONFIG).exists()
        run = decomposed.open_run(opened.config, opened.about, self.runs, name, resume=there)
        decompose(run, opened.config, opened.opener, self.progress)
        return DecomposedRun(run.path)

    @checked
    def run(self, name: Run | Named | None = None) -> TrainedRun:
        """A run by its name or folder; without a name, the newest finished one."""
        return TrainedRun(given.run_of(self.runs, name).path)

    @checked
    def load(self, run: Named | Run | None = None) -> Dictionary:
        """The dictionary of a run, as `sae.load`; without a name, of the newest finished one."""
        return load(given.run_of(self.runs, run), device=self.device)

    @checked
    def adopt(self, source: Named, name: str, rows: Any = None, target: Any = None) -> TrainedRun:
        """A run, called `name`, of another tool's dictionary, as `sae import`: a folder, a file, or one on the hub
        (owner/name/folder@revision).

        `rows` and `target` are keys of the stores it is judged on, where those are not the ones of its hook points.
        """
        given.expect_folder_name(name)
        run = adopt(
            os.fspath(source), name, self.cache, self.runs, self.progress, activations=rows, target=target,
            offline=self.offline,
        )  # fmt: skip
        return TrainedRun(run.path)

    @checked
    def push(self, what: Run | Named | Store, repository: str, *, private: bool = False) -> str:
        """Put a run (or its name) or a store into a repository of the hub, as `sae push`; the address it lies at."""
        share = {"private": private, "offline": self.offline}
        if isinstance(what, Store):
            return push_store(what, repository, self.progress, **share).page
        return push_run(given.run_of(self.runs, what), repository, self.progress, **share).page

    @checked
    def pull(self, repository: str, what: str | None = None, *, name: str | None = None) -> Path:
        """Fetch a run or a store that was pushed, as `sae pull`; its folder."""
        return pull(repository, what, self.cache, self.runs, self.progress, name=name, offline=self.offline).path

    @checked
    def export(self, run: Run | Named, folder: Named, format: str = "saelens") -> Path:
        """Write the dictionary of a run into a new folder as another tool opens it, as `sae export`; where it is."""
        dictionary = load_latents(given.run_of(self.runs, run))
        formats.write(dictionary.cpu(), dictionary.metadata, os.fspath(folder), format)
        return Path(folder)
