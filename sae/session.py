"""`Session`: the stages for a program or a notebook. It carries what they share; settings are keyword arguments.

Everything is kept in the cache and the runs' folder, as the command line keeps it: what is there already is not made
again, and what was interrupted continues. Results are plain dicts and lists of dicts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from sae import configs
from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.paths import parse_path
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import CONFIG, Run
from sae.cache.store.store import Store
from sae.cache.tokens import TokenStore
from sae.configs.layers import leaves
from sae.dictionaries import Named, load, runs_folder
from sae.pipeline import formats
from sae.pipeline.analyses.analysis import AnalyzeConfig
from sae.pipeline.analyses.stage import analyze as analyze_run
from sae.pipeline.decompose import folder as decomposed
from sae.pipeline.decompose import opening
from sae.pipeline.decompose.config import KINDS, LiveConfig, LocalConfig, ToyConfig
from sae.pipeline.decompose.losses import Decomposition
from sae.pipeline.decompose.stage import decompose
from sae.pipeline.evaluate.judging import EvalConfig, judge
from sae.pipeline.evaluate.stage import evaluate_all, expect_evaluated
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.stage import explain as explain_run
from sae.pipeline.explain.stage import summary
from sae.pipeline.formats.trained import load_latents
from sae.pipeline.harvest.sources import SOURCES, RowSource, settings_of_sources
from sae.pipeline.harvest.sources.language_model import HarvestConfig, LanguageModelSource
from sae.pipeline.harvest.sources.memory import MemoryConfig, MemorySource
from sae.pipeline.harvest.sources.table import TableConfig, TableSource
from sae.pipeline.harvest.stage import harvest as harvest_rows
from sae.pipeline.harvest.tables.spool import spooled
from sae.pipeline.interpret.features import FeaturesConfig
from sae.pipeline.interpret.stage import statistics_of
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.loggers.base import expect
from sae.pipeline.matching.config import MatchConfig
from sae.pipeline.matching.stage import match as match_runs
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.probing.labelled import Labelled, TextSet, in_memory, sets_of
from sae.pipeline.probing.stage import probe as probe_runs
from sae.pipeline.report import compare as comparison
from sae.pipeline.report.stage import report as write_report
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.origins import Origins
from sae.pipeline.runtime.progress import Progress, Silent
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
from sae.pipeline.worlds.making import making_of
from sae.tables import Figures, Table

Kind = TypeVar("Kind", bound=BaseModel)


class TrainedRun(Run):
    """A run folder, with the dictionary that it trained."""

    def load(self, *, device: str = "cpu") -> Dictionary:
        """The dictionary, ready to encode. Raises NotFound where training has not finished."""
        return load(self, device=device)

    def history(self) -> Table:
        """A row a logged step."""
        return Table(self.metrics())

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.path)!r})"


class DecomposedRun(Run):
    """The run folder of a decomposition of weights."""

    def load(self) -> Decomposition:
        """The components, by the names of their matrices (`parts`). Raises NotFound where training has not finished."""
        return decomposed.load(self)

    def figures(self) -> Figures:
        """What `sae decompose` shows."""
        return Figures(decomposed.figures(self) or {})

    def history(self) -> Table:
        """A row a logged step."""
        return Table(self.metrics())


class Session(Workplace):
    """A workplace for a program or a notebook: the stages are its methods.

    cache: folder or URL of the cache; default SAE_CACHE, else the platform's. runs: folder of the runs; default
    SAE_RUNS, else `runs` here. device: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one. offline: never
    touch the network. progress: whether to say on stderr how far things are (plain lines where there is no terminal),
    or whatever is to be told instead.
    """

    def __init__(
        self, cache: Named | None = None, runs: Named | None = None, *, device: str = "auto", offline: bool = False,
        progress: bool | Progress = True,
    ) -> None:  # fmt: skip
        import platformdirs

        given = cache if cache is not None else os.environ.get("SAE_CACHE") or platformdirs.user_cache_dir("sae")
        folders = {"cache": parse_path(os.path.expanduser(os.fspath(given))), "runs": runs_folder(runs)}
        for name, folder in folders.items():
            if folder.exists() and not folder.is_dir():
                raise SaeError(f"{name} = {folder}: is a file, not a folder; name another")
        devices.resolve_device(device)  # said at once where there is none
        told = _progress(progress) if isinstance(progress, bool) else progress
        super().__init__(**folders, progress=told, device=device, offline=offline)

    def __repr__(self) -> str:
        return f"Session(cache={str(self.cache)!r}, runs={str(self.runs)!r}, device={self.device!r})"

    # Stores

    def tokenize(self, *, preset: str | None = None, workers: int = 1, **settings: Any) -> TokenStore:
        """Text to tokens, as `sae tokenize`: the store of the training documents; the validation store lies beside it.

        `settings` are those of the section `tokenize` (`source`, `tokenizer`, `context`, `tokens`, ...).
        """
        config = _settings("tokenize", TokenizeConfig, preset, settings)
        found = tokenize_text(config, self.cache, self.progress, workers=workers, offline=self.offline).stores["train"]
        catalogue.remember(self.cache, TokenStore.kind, [found.key])
        return found

    def harvest(
        self, tokens_from: TokenStore | str | None = None, *, model: LanguageModel | str | None = None,
        preset: str | None = None, workers: int = 1, **settings: Any,
    ) -> dict[str, Dataset]:  # fmt: skip
        """Rows into the cache, as `sae harvest`: a dataset for each stream, which for a model are its `layer.site`.

        tokens_from: a token store or its name; default: the last one made. model: its name, or the model itself.
        `settings` are those of the section `harvest` (`layer`, `site`, `codec`, `tokens`, ...); with another `source`
        than a language model (`synthetic`, `table`, ...), those of that source.
        """
        booted = model if isinstance(model, LanguageModel) else None
        if model is not None:
            settings["model"] = model.name if isinstance(model, LanguageModel) else model
        settings |= {name: [settings[name]] for name in ("layer", "site") if isinstance(settings.get(name), int | str)}
        config = configs.resolve("harvest", settings_of_sources(), preset=preset, given=settings)
        source: RowSource
        if isinstance(config, HarvestConfig):
            if not isinstance(tokens_from, TokenStore):
                tokens_from = catalogue.find(self.cache, TokenStore, tokens_from)
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
        if isinstance(rows, Dataset):
            if target is not None:
                raise SaeError("target: a dataset has its targets already; give the store of the inputs")
            return rows if first is None else rows.first(first)
        if rows is None or _names_stores(rows):
            if not (target is None or _names_stores(target)):
                raise SaeError("target: is in memory, and the rows are of a store; give both in one of these ways")
            x = self._stores(rows, "rows")
            return Dataset.of(x, () if target is None else self._stores(target, "target"), rows=first)
        if target is not None and _names_stores(target):
            raise SaeError("target: is a store, and the rows are in memory; give both in one of these ways")
        if isinstance(rows, Iterator):
            if target is not None:
                raise SaeError("target: rows of an iterator have none; write both as stores, or give both in memory")
            with spooled(rows, name) as path:
                given = {"table": str(path), "validation": validation, "codec": "float32"}
                table = configs.resolve("harvest", TableConfig, given=given)
                of_table = TableSource.of_settings(table, Origins(self.cache), Silent())
                return Dataset.of(harvest_rows(of_table, self.cache, Silent()).stores["train"][0], rows=first)
        source = MemorySource(MemoryConfig(validation=validation), rows, target, called=name)
        stores = harvest_rows(source, self.cache, Silent()).stores["train"]
        return Dataset.of(stores[0], tuple(stores[1:]))

    # Runs

    @overload
    def train(
        self, dictionary: TrainableConfig | None, rows: Any = None, /, *, name: str | None = None, **more: Any
    ) -> TrainedRun: ...
    @overload
    def train(self, dictionary: Sequence[TrainableConfig], rows: Any = None, /, **more: Any) -> list[TrainedRun]: ...

    def train(
        self, dictionary: TrainableConfig | Sequence[TrainableConfig] | None, rows: Any = None, /, *,
        name: str | None = None, preset: str | None = None, log: Sequence[str] = (), **settings: Any,
    ) -> TrainedRun | list[TrainedRun]:  # fmt: skip
        """Train a dictionary, as `sae train`; several on the same batches, in one pass over the rows.

        dictionary: its settings, as `sae.TopK(k=32, d_sae=8192)` (None: the preset's). rows: whatever `dataset` takes;
        inputs and targets in memory as a pair (x, y). `settings` are those of the section `train` (`lr`, `batch`,
        `steps`, `rows`, ...). The run folder is named by all of these unless `name` says otherwise; a run that is there
        is continued where it was, and a finished one is given back as it is. log: `wandb`, `tensorboard`, beside the
        run's metrics.jsonl.
        """
        x, y = rows if isinstance(rows, tuple) else (rows, None)
        dataset = self.dataset(x, y)
        loggers = expect([log] if isinstance(log, str) else log)
        several = isinstance(dictionary, Sequence)
        chosen: Sequence[TrainableConfig | None] = dictionary if isinstance(dictionary, Sequence) else [dictionary]
        for one in chosen:
            if not isinstance(one, TrainableConfig | None):
                raise SaeError(f"dictionary: {one!r} are not settings of one; give them as sae.TopK(k=32, d_sae=8192)")
        if not chosen:
            raise SaeError("dictionary: an empty list; give settings of at least one, as [sae.TopK(k=32)]")
        every = [
            _settings("train", TrainConfig, preset, settings | ({} if one is None else {"sae": one.model_dump()}))
            for one in chosen
        ]
        if name is None:
            found = open_all(every, dataset, self.runs)
        elif several:
            raise SaeError(f"name = {name!r}: several dictionaries have names of their own; leave it out")
        else:
            _expect_folder_name(name)
            there = (self.runs / name / CONFIG).exists()
            found = [open_run(every[0], dataset, self.runs, name, resume=there)]
        sweep(found, dataset, self.progress, device=self.device, loggers=loggers)
        runs = [TrainedRun(run.path) for run in found]
        return runs if several else runs[0]

    def run(self, name: Named | None = None) -> TrainedRun:
        """A run by its name or folder; without a name, the newest finished one."""
        return TrainedRun(catalogue.find_run(self.runs, None if name is None else os.fspath(name)).path)

    def load(self, run: Named | Run | None = None) -> Dictionary:
        """The dictionary of a run, as `sae.load`; without a name, of the newest finished one."""
        return load(run if isinstance(run, Run) else self.run(run), device=self.device)

    def adopt(self, source: Named, name: str, rows: Any = None, target: Any = None) -> TrainedRun:
        """A run, called `name`, of another tool's dictionary, as `sae import`: a folder, a file, or one on the hub
        (owner/name/folder@revision).

        `rows` and `target` are keys of the stores it is judged on, where those are not the ones of its hook points.
        """
        _expect_folder_name(name)
        run = adopt(
            os.fspath(source), name, self.cache, self.runs, self.progress, activations=rows, target=target,
            offline=self.offline,
        )  # fmt: skip
        return TrainedRun(run.path)

    def push(self, what: Run | Named | Store, repository: str, *, private: bool = False) -> str:
        """Put a run (or its name) or a store into a repository of the hub, as `sae push`; the address it lies at."""
        share = {"private": private, "offline": self.offline}
        if isinstance(what, Store):
            return push_store(what, repository, self.progress, **share).page
        run = what if isinstance(what, Run) else catalogue.find_run(self.runs, os.fspath(what))
        return push_run(run, repository, self.progress, **share).page

    def pull(self, repository: str, what: str | None = None, *, name: str | None = None) -> Path:
        """Fetch a run or a store that was pushed, as `sae pull`; its folder."""
        return pull(repository, what, self.cache, self.runs, self.progress, name=name, offline=self.offline).path

    def export(self, run: Run | Named, folder: Named, format: str = "saelens") -> Path:
        """Write the dictionary of a run into a new folder as another tool opens it, as `sae export`; where it is."""
        dictionary = load_latents(run if isinstance(run, Run) else self.run(run))
        formats.write(dictionary.cpu(), dictionary.metadata, os.fspath(folder), format)
        return Path(folder)

    @overload
    def evaluate(
        self, what: Dictionary | Run | Named | None = None, rows: Any = None, /, *,
        model: LanguageModel | str | None = None, cross_entropy: bool = True, **settings: Any,
    ) -> Figures: ...  # fmt: skip
    @overload
    def evaluate(
        self, what: list[Run | Named], /, *, model: LanguageModel | str | None = None, cross_entropy: bool = True,
        **settings: Any,
    ) -> list[Figures]: ...  # fmt: skip

    def evaluate(
        self, what: Dictionary | Run | Named | list[Run | Named] | None = None, rows: Any = None, /, *,
        model: LanguageModel | str | None = None, cross_entropy: bool = True, **settings: Any,
    ) -> Figures | list[Figures]:  # fmt: skip
        """Judge a dictionary: figures by name, None where one is not defined; everything else under `details`.

        A run is judged on held-out rows, and in its language model where it has one (unless `cross_entropy` is False),
        and the figures are kept with it, as `sae eval` does. Several runs, in a list, share the passes over rows and of
        the model; where some cannot be judged, the others are, and the SaeError names those. A dictionary of any
        origin is judged on the rows given (whatever `dataset` takes). `settings` are those of the section `eval`
        (`rows`, `tokens`, ...).
        """
        config = _settings("eval", EvalConfig, None, settings)
        if not isinstance(what, Dictionary):
            names = what if isinstance(what, list) else [what]
            runs = [one if isinstance(one, Run) else self.run(one) for one in names]
            booted = model if isinstance(model, LanguageModel) else None
            found = evaluate_all(
                config, runs, self.cache, self.progress, model=None if booted is model else str(model),
                device=self.device, offline=self.offline, language_model=booted, cross_entropy=cross_entropy,
            )  # fmt: skip
            expect_evaluated(found)
            figures = [Figures(one.evaluation.as_json()) for one in found if one.evaluation is not None]
            return figures if isinstance(what, list) else figures[0]
        if model is not None:
            raise SaeError("model: a run is judged in its language model; to splice any dictionary into one, attach it")
        x, y = rows if isinstance(rows, tuple) else (rows, None)
        dataset = self.dataset(x, y, validation=0.0)
        if (dataset.d_in, dataset.d_out) != (what.d_in, what.d_out):
            raise SaeError(
                f"{dataset.key}: has rows of {dataset.d_in} values and targets of {dataset.d_out}; the dictionary "
                f"reads {what.d_in} and writes {what.d_out}"
            )
        dataset = dataset.kept_up_to(dataset.limits_by("auto"))  # it is judged without massive rows, too
        here = what.W_dec.device
        config = config.model_copy(update={"dead_rows": 0})
        making = making_of((dataset.targets or dataset.inputs)[0])
        subject = Subject(what.to(devices.resolve_device(self.device)), dataset.truth)
        judged = judge(subject, dataset, dataset, config, self.progress, making=making)
        what.to(here)
        return Figures(judged.as_json())

    def compare(self, runs: Sequence[Run | Named] | None = None) -> Table:
        """Runs side by side, a row each, as `sae compare`: the settings they differ in and their figures."""
        if runs is None:
            chosen = [run for run in catalogue.readable_runs(self.runs, decompositions=True)[0] if run.finished]
        else:
            chosen = [
                run if isinstance(run, Run) else catalogue.find_run(self.runs, os.fspath(run), decompositions=True)
                for run in runs
            ]
        return Table(comparison.compare(chosen))

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
        base = _settings("train", TrainConfig, preset, settings)
        lab = Lab(self, EvalConfig(), cross_entropy)
        return study.run(Setup(base, self.dataset(rows), lab, seeds))

    def analyze(
        self, run: Run | Named | None = None, *names: str, model: str | None = None, **settings: Any
    ) -> dict[str, dict[str, Any]]:
        """Look at a run's dictionary from the sides that are named (`sae list`: analyses), or all, as `sae analyze`.

        For each its figures, everything else under `details`, and the paths of its `json` and `plot`. `settings` are
        those of the section `analyze` (`rows`, `top`, ...); `model` says where the language model is for `attribution`,
        if not where the harvest found it.
        """
        config = _settings("analyze", AnalyzeConfig, None, settings)
        run = run if isinstance(run, Run) else self.run(run)
        found = analyze_run(
            run, self.cache, self.progress, names, config=config, device=self.device, model=model, offline=self.offline
        )
        files = {name: {"json": str(one.json), "plot": str(one.plot)} for name, one in found.items()}
        return {name: {**one.finding.as_json(), **files[name]} for name, one in found.items()}

    def probe(
        self, runs: Sequence[Run | Named] | Run | Named | None = None, data: Any = None, *,
        sae_probes: Named | None = None, sets: Sequence[str] | None = None, model: str | None = None,
        tokenizer: str | None = None, **settings: Any,
    ) -> Result:  # fmt: skip
        """How well a few latents of runs tell labels of texts, as `sae probe`.

        data: a file of labelled texts, several, or {name: (texts, labels)}. sae_probes: the wheel or a folder of that
        package's sets, `sets` which of them. `settings` are those of the section `probe` (`ks`, `pool`, ...). The
        result has `table` and `runs`, lists of dicts, and `write(folder)`.
        """
        config = _settings("probe", ProbeConfig, None, settings)
        each = runs if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
        files: Sequence[Any] = () if data is None or isinstance(data, Mapping) else data
        files = [files] if isinstance(files, str | os.PathLike) else files
        texts: list[TextSet | Labelled] = [
            in_memory(name, *pair) for name, pair in (data.items() if isinstance(data, Mapping) else ())
        ]
        texts += sets_of(
            [Path(one).expanduser() for one in files], None if sae_probes is None else Path(sae_probes).expanduser(),
            sets, (config.text_column, config.label_column),
        )  # fmt: skip
        if not texts:
            raise SaeError("data: no labelled texts; give a file, {name: (texts, labels)}, or `sae_probes`")
        return probe_runs(
            config, [one if isinstance(one, Run) else self.run(one) for one in each], texts, self, model=model,
            tokenizer=tokenizer, leave_out_numbers=sae_probes is not None and sets is None,
        )  # fmt: skip

    def explain(
        self, run: Run | Named | None = None, *, estimate_only: bool = False, **settings: Any
    ) -> dict[str, Any]:  # fmt: skip
        """Say in words what a run's latents fire on, and judge the words, as `sae explain`; kept in the run folder.

        `features`: for each latent its `explanation`, `score`, `control` and more; `summary`; `made`: how. `settings`
        are those of the section `explain` (`latents`, `backend`, `model`, `scoring`, ...). estimate_only: the cost is
        told to the session's progress, and nothing is asked.
        """
        config = _settings("explain", ExplainConfig, None, settings)
        run = run if isinstance(run, Run) else self.run(run)
        found = explain_run(run, self, config, estimate_only=estimate_only)
        if found is None:
            return {"features": []}
        return {**found.model_dump(mode="json"), "summary": summary(found)}

    def match(self, runs: Sequence[Run | Named], **settings: Any) -> Result:
        """How alike the dictionaries of runs are, each with each, as `sae match`.

        `settings` are those of the section `match` (`correlate`, `living`, `rows`, ...). The result has `table`, a dict
        a pair, and under `extra` the means `mmcs` and `hungarian`, the `matrix`, which latents all have found
        (`stability`) and, of two runs, the `pairs`; `write(folder)` keeps it.
        """
        config = _settings("match", MatchConfig, None, settings)
        each = [runs] if isinstance(runs, Run | str | os.PathLike) else runs
        return match_runs(config, [one if isinstance(one, Run) else self.run(one) for one in each], self)

    def decompose(
        self, rows: Any = None, target: Any = None, /, *, kind: str = "local",
        tokens_from: TokenStore | str | None = None, model: LanguageModel | str | None = None, name: str | None = None,
        preset: str | None = None, **settings: Any,
    ) -> DecomposedRun:  # fmt: skip
        """Weight matrices to components, as `sae decompose`. A run that is there is continued, or given back.

        kind: `local`, the matrices of the MLP that read `rows` and gave `target` (whatever `dataset` takes); `live`,
        those of `model` that `matrices` names, on `tokens_from` (default: the token store made last); `toy`. `settings`
        are those of the section `decompose` (`matrices`, `components`, `importance`, `steps`, ...).
        """
        booted = model if isinstance(model, LanguageModel) else None
        given = settings | {"kind": kind}
        if kind == "live" and model is not None:
            given["model"] = model.name if isinstance(model, LanguageModel) else model
        config = configs.resolve("decompose", KINDS, preset=preset, given=given)
        if isinstance(config, LocalConfig):
            opened = opening.local(config, self.dataset(rows, target), self, model)
        elif isinstance(config, LiveConfig):
            tokens = tokens_from
            if not isinstance(tokens, TokenStore):
                tokens = catalogue.find(self.cache, TokenStore, tokens)
            opened = opening.live(config, tokens, self, booted)
        else:
            assert isinstance(config, ToyConfig)
            opened = opening.toy(config, self)
        if name is not None:
            _expect_folder_name(name)
        name = name or decomposed.run_name(opened.config, opened.about)
        there = (self.runs / name / CONFIG).exists()
        run = decomposed.open_run(opened.config, opened.about, self.runs, name, resume=there)
        decompose(run, opened.config, opened.opener, self.progress)
        return DecomposedRun(run.path)

    def latents_of(
        self, run: Run | Named | None, text: str, *, top: int = 5, model: LanguageModel | str | None = None
    ) -> Table:
        """A row a token of a text, as `sae show --text`: the latents that fire on it, the `top` strongest first."""
        return Table(fired_on(self._opened(run, model), text, top))

    def steer(
        self, run: Run | Named | None, feature: int, prompt: str, strength: float | Sequence[float] | None = None, *,
        target: str | None = None, model: LanguageModel | str | None = None, **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What a run's language model makes of a prompt, as it is (`baseline`) and with a latent changed (`steered`).

        As `sae steer`: `kl` between their next tokens, and the same of every strength under `doses`. target: a token
        whose log-probability is watched. `settings` are those of the section `steer` (`mode`, `unit`, `positions`,
        `length`, `temperature`, ...).
        """
        config = _settings("steer", SteerConfig, None, settings)
        strengths = () if strength is None else (strength,) if isinstance(strength, int | float) else strength
        place = self._opened(run, model)
        return steer_latent(place, feature, prompt, strengths, self.progress, config=config, target=target).as_json()

    def ablate_topic(
        self, run: Run | Named | None, topic: Named, general: Named, *, model: LanguageModel | str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Zero the latents that tell a topic best: what that adds to the cross-entropy of its text, and of other.

        topic, general: files of plain text. `settings` as for `steer` (`top`, `contexts`, ...).
        """
        config = _settings("steer", SteerConfig, None, settings)
        return ablate_topic(self._opened(run, model), Path(topic), Path(general), self.progress, config=config)

    def _opened(self, run: Run | Named | None, model: LanguageModel | str | None) -> Opened:
        """A run in its language model."""
        booted = model if isinstance(model, LanguageModel) else None
        return opened(
            run if isinstance(run, Run) else self.run(run), self.cache, self.progress,
            model=None if model is booted else str(model), device=self.device, offline=self.offline,
            language_model=booted,
        )  # fmt: skip

    def report(self, run: Run | Named | Sequence[Run | Named] | None = None, **settings: Any) -> Path:
        """Write the page of a run or of several, as `sae report`; where it is.

        `settings` are those of the section `report`.
        """
        config = _settings("report", FeaturesConfig, None, settings)
        named = run if isinstance(run, Sequence) and not isinstance(run, str) else [run]
        runs = [one if isinstance(one, Run) else self.run(one) for one in named]
        return write_report(runs, self.cache, self.progress, config=config, device=self.device)

    def statistics(self, run: Run | Named | None = None, **settings: Any) -> Statistics:
        """What is known of a run's latents: what its folder holds, else gathered now, as for `sae report`.

        `settings` are those of the section `report`; without any, whatever was gathered before will do.
        """
        config = _settings("report", FeaturesConfig, None, settings) if settings else None
        run = run if isinstance(run, Run) else self.run(run)
        return statistics_of(run, self.cache, self.progress, config=config, device=self.device)

    def _stores(self, said: Any, what: str) -> tuple[ActivationStore, ...]:
        """The stores of one side, which a list names where there are several."""
        each = said if isinstance(said, list) else [said]
        return tuple(
            one if isinstance(one, ActivationStore) else catalogue.find(self.cache, ActivationStore, one, what)
            for one in each
        )


def tokenize(**settings: Any) -> TokenStore:
    """`Session.tokenize` in the usual places."""
    return Session().tokenize(**settings)


def harvest(tokens_from: TokenStore | str | None = None, **settings: Any) -> dict[str, Dataset]:
    """`Session.harvest` in the usual places."""
    return Session().harvest(tokens_from, **settings)


@overload
def train(dictionary: TrainableConfig | None, rows: Any = None, /, **settings: Any) -> TrainedRun: ...
@overload
def train(dictionary: Sequence[TrainableConfig], rows: Any = None, /, **settings: Any) -> list[TrainedRun]: ...


def train(
    dictionary: TrainableConfig | Sequence[TrainableConfig] | None, rows: Any = None, /, **settings: Any
) -> TrainedRun | list[TrainedRun]:
    """`Session.train` in the usual places."""
    return Session().train(dictionary, rows, **settings)


@overload
def evaluate(what: Dictionary | Run | Named | None = None, rows: Any = None, /, **settings: Any) -> Figures: ...
@overload
def evaluate(what: list[Run | Named], /, **settings: Any) -> list[Figures]: ...


def evaluate(what: Any = None, rows: Any = None, /, **settings: Any) -> Figures | list[Figures]:
    """`Session.evaluate` in the usual places."""
    return Session().evaluate(what, rows, **settings)


def _expect_folder_name(name: str) -> None:
    if name == ".." or Path(name).name != name:
        raise SaeError(f"name = {name!r}: is not the name of a folder; where the folder goes is said by `runs`")


def _names_stores(said: Any) -> bool:
    """Return True for a store or its name, and for a list of such."""
    each = said if isinstance(said, list) and said else [said]
    return all(isinstance(one, ActivationStore | str) for one in each)


def _settings(section: str, kind: type[Kind], preset: str | None, settings: dict[str, Any]) -> Kind:
    """The settings of a stage. Raises SaeError naming the setting, its value and what to try."""
    return configs.resolve(section, kind, preset=preset, given=settings)


def _progress(wanted: bool) -> Progress:
    if not wanted:
        return Silent()
    from sae.pipeline.commands.bars import Bars

    return Bars()
