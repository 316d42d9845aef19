"""A lab trains the dictionaries that a study asks for, and collects the figures of the finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sae.cache import catalogue
from sae.cache.disk.identity import canonical
from sae.cache.errors import NotFound
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.stage import EvalConfig, evaluate, missing
from sae.pipeline.formats import trained
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.hints import boot
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime.progress import said_if_slow
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.studies import results
from sae.pipeline.train.stage import TrainConfig, run_name
from sae.pipeline.train.sweep import open_all, sweep


@dataclass(frozen=True)
class Trial:
    """One dictionary of a study: its labels, columns of the table; its training; its rows."""

    labels: dict[str, Any]
    config: TrainConfig
    dataset: Dataset

    def seeded(self, count: int) -> "list[Trial]":
        """Repeat this trial with `count` seeds, its own first."""
        seeds = range(self.config.seed, self.config.seed + count)
        return [Trial(self.labels, self.config.model_copy(update={"seed": seed}), self.dataset) for seed in seeds]


@dataclass
class Lab:
    """A place to train in, and the settings by which finished runs are evaluated.

    cross_entropy: whether runs are spliced into the language model, which is booted once, when first needed. Runs on
    rows of no language model are judged by the features they were made of, where those are known.
    """

    place: Workplace
    eval_config: EvalConfig = field(default_factory=EvalConfig)
    cross_entropy: bool = True
    _models: dict[str, LanguageModel] = field(default_factory=dict)

    def train(self, trials: Sequence[Trial]) -> list[Run]:
        """Return the finished run of every trial, training what is missing. Trials of the same settings share a run.

        Raises SaeError, before anything is trained, where a store lacks what its runs will be judged on.
        """
        for dataset in {trial.dataset.key: trial.dataset for trial in trials}.values():
            self._expect_judgeable(dataset)
        runs: dict[str, Run] = {}
        for key in dict.fromkeys(trial.dataset.key for trial in trials):
            together = [trial for trial in trials if trial.dataset.key == key]
            dataset = together[0].dataset
            configs = {run_name(trial.config, dataset): trial.config for trial in together}
            opened = open_all(list(configs.values()), dataset, self.place.runs)
            sweep(opened, dataset, self.place.progress, device=self.place.device)
            runs |= dict(zip(configs, opened, strict=True))
        return [runs[run_name(trial.config, trial.dataset)] for trial in trials]

    def rows(self, trials: Sequence[Trial]) -> list[Row]:
        """Train and judge the trials, and return a row for each: its run, labels, seed and every figure there is."""
        found = []
        for trial, run in zip(trials, self.train(trials), strict=True):
            of_text = trial.dataset.provenance.text is not None
            judged = self._judge(run, trial.dataset, self.cross_entropy or not of_text)
            found.append({"run": run.name, **trial.labels, "seed": trial.config.seed, **judged})
        return found

    def _judge(self, run: Run, dataset: Dataset, whole: bool) -> results.Figures:
        """Return every figure of a finished run, computing what is missing."""
        place, dataset = self.place, dataset.kept_up_to(trained.limits(run, dataset))
        held_out = dataset.held_out(place.cache)
        if whole and (eval_config := missing(run, self.eval_config, dataset, held_out, place.cache)) is not None:
            evaluate(
                eval_config, run, place.cache, place.progress, activations=str(dataset.inputs[0].path),
                device=place.device, language_model=None if dataset.provenance.text is None else self.model(dataset),
            )  # fmt: skip
        found = results.of_run(run, dataset, held_out, self.eval_config, place.progress, place.device)
        return {**found, **(results.judged(run) if whole else dict.fromkeys(results.of_more()))}

    def model(self, dataset: Dataset) -> LanguageModel:
        """Return the language model that a dataset comes from, booted once."""
        store = (dataset.targets or dataset.inputs)[0]
        name = canonical(store.recipe["model"])
        if name not in self._models:
            with said_if_slow(self.place.progress, f"loading {name}"):
                self._models[name] = boot(store, None, self.place.device, self.place.offline)
        return self._models[name]

    def _expect_judgeable(self, dataset: Dataset) -> None:
        root = self.place.cache
        try:
            text = dataset.held_out(root).provenance.text
        except NotFound as error:
            raise NotFound(
                f"{dataset.key}: no held-out rows beside it to judge on; make them, as `evaluate()` asks for too"
            ) from error
        if text is not None and self.cross_entropy and catalogue.of_recipe(root, TokenStore, text.recipe) is None:
            raise NotFound(
                f"{dataset.key}: its validation tokens are not in {root}; leave out cross-entropy with "
                "`cross_entropy = False`, or run `tokenize()` again"
            )
