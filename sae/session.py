"""`Session`: the stages for a program or a notebook. It carries what they share; settings are keyword arguments.

Everything is kept in the cache and the runs' folder, as the command line keeps it: what is there already is not made
again, and what was interrupted continues. Results are plain dicts and lists of dicts. What makes stores and runs is in
`making`; here is what is asked of runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

from sae import given
from sae.cache import catalogue
from sae.cache.arguments import checked, fits
from sae.cache.errors import SaeError
from sae.cache.runs import Run
from sae.configs.layers import leaves
from sae.dictionaries import Device, Named, runs_folder
from sae.making import Making
from sae.pipeline.analyses.analysis import AnalyzeConfig
from sae.pipeline.analyses.stage import analyze as analyze_run
from sae.pipeline.evaluate.dictionary import evaluate_dictionary
from sae.pipeline.evaluate.judging import EvalConfig
from sae.pipeline.evaluate.stage import evaluate_all, expect_evaluated
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.stage import explain as explain_run
from sae.pipeline.explain.stage import summary
from sae.pipeline.interpret.features import FeaturesConfig
from sae.pipeline.interpret.stage import statistics_of
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.matching.config import MatchConfig
from sae.pipeline.matching.stage import match as match_runs
from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.probing.stage import probe as probe_runs
from sae.pipeline.report import compare as comparison
from sae.pipeline.report.stage import report as write_report
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.steering.config import SteerConfig
from sae.pipeline.steering.opened import Opened, opened
from sae.pipeline.steering.stage import steer as steer_latent
from sae.pipeline.steering.texts import fired_on
from sae.pipeline.steering.topics import ablate_topic
from sae.pipeline.studies.lab import Lab
from sae.pipeline.studies.study import Setup, Study
from sae.pipeline.studies.tables import Result
from sae.pipeline.train.config import TrainConfig
from sae.tables import Figures, Table


class Session(Making):
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
