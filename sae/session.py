"""`Session`: the stages for a program or a notebook. It carries what they share; settings are keyword arguments.

Everything is kept in the cache and the runs' folder, as the command line keeps it: what is there already is not made
again, and what was interrupted continues. Results are plain dicts and lists of dicts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

from sae import configs, given
from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.arguments import checked, fits
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG, Run
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore
from sae.configs.layers import leaves
from sae.dictionaries import Device, Named, load, runs_folder
from sae.pipeline import formats
from sae.pipeline.analyses.analysis import AnalyzeConfig
from sae.pipeline.analyses.stage import analyze as analyze_run
from sae.pipeline.decompose import folder as decomposed
from sae.pipeline.decompose import opening
from sae.pipeline.decompose.config import KINDS, LiveConfig, LocalConfig, ToyConfig
from sae.pipeline.decompose.stage import decompose
from sae.pipeline.evaluate.dictionary import evaluate_dictionary
from sae.pipeline.evaluate.judging import EvalConfig
from sae.pipeline.evaluate.stage import evaluate_all, expect_evaluated
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.stage import explain as explain_run
from sae.pipeline.explain.stage import summary
from sae.pipeline.formats.trained import load_latents
from sae.pipeline.harvest.sources import SOURCES, RowSource, settings_of_sources
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.stage import harvest as harvest_rows
from sae.pipeline.interpret.features import FeaturesConfig
from sae.pipeline.interpret.stage import statistics_of
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.loggers.base import expect
from sae.pipeline.matching.config import MatchConfig
from sae.pipeline.matching.stage import match as match_runs
from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.probing.stage import probe as probe_runs
from sae.pipeline.report import compare as comparison
from sae.pipeline.report.stage import report as write_report
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.saes import TrainableConfig
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.sharing.pull import pull
from sae.pipeline.sharing.push import push_run, push_store
from sae.pipeline.steering.config import SteerConfig
from sae.pipeline.steering.opened import Opened, opened
from sae.pipeline.steering.stage import steer as steer_latent
from sae.pipeline.steering.texts import fired_on
from sae.pipeline.steering.topics import ablate_topic
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.study import Setup, Study
from sae.pipeline.studies.tables import Result
from sae.pipeline.tokenize.stage import TokenizeConfig
from sae.pipeline.tokenize.stage import tokenize as tokenize_text
from sae.pipeline.train.config import TrainConfig
from sae.pipeline.train.imported import adopt
from sae.pipeline.train.stage import open_run
from sae.pipeline.train.sweep import open_all, sweep
from sae.rows import dataset_of
from sae.runs import DecomposedRun, TrainedRun
from sae.tables import Figures, Table


class Session(Workplace):
    """A workplace for a program or a notebook: the stages are its methods.

    cache: folder or URL of the cache; default SAE_CACHE, else the platform's. runs: folder of the runs; default
    SAE_RUNS, else `runs` here. device: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one. offline: never
    touch the network. progress: whether to say on stderr how far things are (plain lines where there is no terminal),
    or whatever is to be told instead.
    """

    @checked
    def __init__(
        self, cache: Named | None = None, runs: Named | None = None, *, device: Device = "auto", offline: bool = False,
        progress: bool | Progress = True,
    ) -> None:  # fmt: skip
        import platformdirs

        usual = os.environ.get("SAE_CACHE") or platformdirs.user_cache_dir("sae")
        folders = {
            "cache": given.place("cache", usual if cache is None else cache),
            "runs": given.place("runs", runs_folder(None) if runs is None else runs),
        }
        devices.resolve_device(device)  # said at once where there is none
        super().__init__(**folders, progress=given.told(progress), device=str(device), offline=offline)

    def __repr__(self) -> str:
        return f"Session(cache={str(self.cache)!r}, runs={str(self.runs)!r}, device={self.device!r})"

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

    @overload
    def evaluate(
        self, what: Dictionary | Run | Named | None = None, rows: Any = None, /, *,
        model: LanguageModel | Named | None = None, cross_entropy: bool = True, **settings: Any,
    ) -> Figures: ...  # fmt: skip
    @overload
    def evaluate(
        self, what: Sequence[Run | Named], /, *, model: LanguageModel | Named | None = None, cross_entropy: bool = True,
        **settings: Any,
    ) -> list[Figures]: ...  # fmt: skip

    @checked
    def evaluate(
        self, what: Dictionary | Run | Named | Sequence[Run | Named] | None = None, rows: Any = None, /, *,
        model: LanguageModel | Named | None = None, cross_entropy: bool = True, **settings: Any,
    ) -> Figures | list[Figures]:  # fmt: skip
        """Judge a dictionary: figures by name, None where one is not defined; everything else under `details`.

        A run is judged on held-out rows, and in its language model where it has one (unless `cross_entropy` is False),
        and the figures are kept with it, as `sae eval` does. Several runs, in a list, share the passes over rows and of
        the model; where some cannot be judged, the others are, and the SaeError names those. A dictionary of any
        origin is judged on the rows given (whatever `dataset` takes). `settings` are those of the section `eval`
        (`rows`, `tokens`, ...).
        """
        config = given.settings("eval", EvalConfig, None, settings)
        if isinstance(what, Dictionary):
            if model is not None:
                raise SaeError(
                    "model: a run is judged in its language model; to splice any dictionary into one, attach it"
                )
            x, y = given.pair_of(rows)
            dataset = self.dataset(x, y, validation=0.0)
            return Figures(evaluate_dictionary(what, dataset, config, self.progress, device=self.device).as_json())
        if rows is not None:
            raise SaeError(
                "rows: a run is judged on held-out rows of its own; give its dictionary, `run.load()`, for others"
            )
        named, booted = given.model_of(model)
        found = evaluate_all(
            config, given.runs_of(self.runs, what), self.cache, self.progress, model=named, device=self.device,
            offline=self.offline, language_model=booted, cross_entropy=cross_entropy,
        )  # fmt: skip
        expect_evaluated(found)
        figures = [Figures(one.evaluation.as_json()) for one in found if one.evaluation is not None]
        return figures[0] if what is None or isinstance(what, Run | str | os.PathLike) else figures

    @checked
    def compare(self, runs: Sequence[Run | Named] | Run | Named | None = None) -> Table:
        """Runs side by side, a row each, as `sae compare`: the settings they differ in and their figures."""
        if runs is None:
            chosen = [run for run in catalogue.readable_runs(self.runs, decompositions=True)[0] if run.finished]
        else:
            chosen = given.runs_of(self.runs, runs, decompositions=True)
        return Table(comparison.compare(chosen))

    @checked
    def study(
        self, study: Study, rows: Any = None, /, *, seeds: int | None = None, cross_entropy: bool = True,
        preset: str | None = None, **settings: Any,
    ) -> Result:  # fmt: skip
        """Carry out a study, as `sae study`: `Rates(ratios=(1, 4))` on whatever `dataset` takes.

        seeds: how many dictionaries of each kind; None: as many as is usual. cross_entropy: whether those of text are
        spliced into their language model. `settings` are those of the section `train`, for all of its dictionaries.
        The result has `table` and `runs`, lists of dicts, and `write(folder)`. Raises SaeError for a setting that the
        study itself decides.
        """
        for path, _ in leaves(settings):
            if study.sets(key := ".".join(path)):
                raise SaeError(f"train.{key}: the study {study.name} decides it itself; its own settings say how")
        base = given.settings("train", TrainConfig, preset, settings)
        lab = Lab(self, EvalConfig(), cross_entropy)
        return study.run(Setup(base, self.dataset(rows), lab, seeds))

    @checked
    def analyze(
        self, run: Run | Named | None = None, *names: str, model: Named | None = None, **settings: Any
    ) -> dict[str, dict[str, Any]]:
        """Look at a run's dictionary from the sides that are named (`sae list`: analyses), or all, as `sae analyze`.

        For each its figures, everything else under `details`, and the paths of its `json` and `plot`. `settings` are
        those of the section `analyze` (`rows`, `top`, ...); `model` says where the language model is for `attribution`,
        if not where the harvest found it.
        """
        config = given.settings("analyze", AnalyzeConfig, None, settings)
        run = given.run_of(self.runs, run)
        found = analyze_run(
            run, self.cache, self.progress, names, config=config, device=self.device, model=given.text_of(model),
            offline=self.offline,
        )  # fmt: skip
        files = {name: {"json": str(one.json), "plot": str(one.plot)} for name, one in found.items()}
        return {name: {**one.finding.as_json(), **files[name]} for name, one in found.items()}

    @checked
    def probe(
        self, runs: Sequence[Run | Named] | Run | Named | None = None, data: Any = None, *,
        sae_probes: Named | None = None, sets: Sequence[str] | None = None, model: Named | None = None,
        tokenizer: Named | None = None, **settings: Any,
    ) -> Result:  # fmt: skip
        """How well a few latents of runs tell labels of texts, as `sae probe`.

        data: a file of labelled texts, several, or {name: (texts, labels)}. sae_probes: the wheel or a folder of that
        package's sets, `sets` which of them. `settings` are those of the section `probe` (`ks`, `pool`, ...). The
        result has `table` and `runs`, lists of dicts, and `write(folder)`.
        """
        config = given.settings("probe", ProbeConfig, None, settings)
        texts = given.texts_of(data, sae_probes, sets, (config.text_column, config.label_column))
        return probe_runs(
            config, given.runs_of(self.runs, runs), texts, self, model=given.text_of(model),
            tokenizer=given.text_of(tokenizer), leave_out_numbers=sae_probes is not None and sets is None,
        )  # fmt: skip

    @checked
    def explain(
        self, run: Run | Named | None = None, *, estimate_only: bool = False, **settings: Any
    ) -> dict[str, Any]:  # fmt: skip
        """Say in words what a run's latents fire on, and judge the words, as `sae explain`; kept in the run folder.

        `features`: for each latent its `explanation`, `score`, `control` and more; `summary`; `made`: how. `settings`
        are those of the section `explain` (`latents`, `backend`, `model`, `scoring`, ...). estimate_only: the cost is
        told to the session's progress, and nothing is asked.
        """
        config = given.settings("explain", ExplainConfig, None, settings)
        run = given.run_of(self.runs, run)
        found = explain_run(run, self, config, estimate_only=estimate_only)
        if found is None:
            return {"features": []}
        return {**found.model_dump(mode="json"), "summary": summary(found)}

    @checked
    def match(self, runs: Sequence[Run | Named] | Run | Named, **settings: Any) -> Result:
        """How alike the dictionaries of runs are, each with each, as `sae match`.

        `settings` are those of the section `match` (`correlate`, `living`, `rows`, ...). The result has `table`, a dict
        a pair, and under `extra` the means `mmcs` and `hungarian`, the `matrix`, which latents all have found
        (`stability`) and, of two runs, the `pairs`; `write(folder)` keeps it.
        """
        config = given.settings("match", MatchConfig, None, settings)
        return match_runs(config, given.runs_of(self.runs, runs), self)

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
    def latents_of(
        self, run: Run | Named | None, text: str, *, top: int = 5, model: LanguageModel | Named | None = None
    ) -> Table:
        """A row a token of a text, as `sae show --text`: the latents that fire on it, the `top` strongest first."""
        return Table(fired_on(self._opened(run, model), text, top))

    @checked
    def steer(
        self, run: Run | Named | None, feature: int, prompt: str, strength: float | Sequence[float] | None = None, *,
        target: str | None = None, model: LanguageModel | Named | None = None, **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What a run's language model makes of a prompt, as it is (`baseline`) and with a latent changed (`steered`).

        As `sae steer`: `kl` between their next tokens, and the same of every strength under `doses`. target: a token
        whose log-probability is watched. `settings` are those of the section `steer` (`mode`, `unit`, `positions`,
        `length`, `temperature`, ...).
        """
        config = given.settings("steer", SteerConfig, None, settings)
        each = strength if strength is None or fits(strength, Sequence[float]) else (strength,)
        strengths = cast(Sequence[float], () if each is None else each)
        place = self._opened(run, model)
        found = steer_latent(place, int(feature), prompt, strengths, self.progress, config=config, target=target)
        return found.as_json()

    @checked
    def ablate_topic(
        self, run: Run | Named | None, topic: Named, general: Named, *, model: LanguageModel | Named | None = None,
        **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Zero the latents that tell a topic best: what that adds to the cross-entropy of its text, and of other.

        topic, general: files of plain text. `settings` as for `steer` (`top`, `contexts`, ...).
        """
        config = given.settings("steer", SteerConfig, None, settings)
        return ablate_topic(self._opened(run, model), Path(topic), Path(general), self.progress, config=config)

    def _opened(self, run: Run | Named | None, model: LanguageModel | Named | None) -> Opened:
        """A run in its language model."""
        named, booted = given.model_of(model)
        return opened(
            given.run_of(self.runs, run), self.cache, self.progress, model=named, device=self.device,
            offline=self.offline, language_model=booted,
        )  # fmt: skip

    @checked
    def report(self, run: Run | Named | Sequence[Run | Named] | None = None, **settings: Any) -> Path:
        """Write the page of a run or of several, as `sae report`; where it is.

        `settings` are those of the section `report`.
        """
        config = given.settings("report", FeaturesConfig, None, settings)
        return write_report(given.runs_of(self.runs, run), self.cache, self.progress, config=config, device=self.device)

    @checked
    def statistics(self, run: Run | Named | None = None, **settings: Any) -> Statistics:
        """What is known of a run's latents: what its folder holds, else gathered now, as for `sae report`.

        `settings` are those of the section `report`; without any, whatever was gathered before will do.
        """
        config = given.settings("report", FeaturesConfig, None, settings) if settings else None
        run = given.run_of(self.runs, run)
        return statistics_of(run, self.cache, self.progress, config=config, device=self.device)
