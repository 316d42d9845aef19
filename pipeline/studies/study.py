"""What every study is made of: trials, the place they are carried out in, and the result they leave.

Repeating a study trains and judges only what is missing: a run folder is named by its settings, an interrupted run
continues at its checkpoint, and the figures of a finished one are kept beside it. All trials on one store that agree on
their batches train in one pass over it, and so must fit into memory together.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae.cache import catalogue
from sae.cache.disk.durable import make_folder, read, write_atomic
from sae.cache.disk.identity import canonical
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.stage import EvalConfig, evaluate, missing
from sae.pipeline.language_model import LanguageModel
from sae.pipeline.language_model.hints import boot
from sae.pipeline.report.compare import Row, as_csv, over_seeds
from sae.pipeline.runtime.progress import Progress, said_if_slow
from sae.pipeline.saes import ARCHITECTURES, Config, parse
from sae.pipeline.studies import results as figures
from sae.pipeline.train import trained
from sae.pipeline.train.stage import TrainConfig, run_name
from sae.pipeline.train.sweep import open_all, sweep

FILES = {"table": "table.csv", "results": "results.json", "plot": "plot.png"}


@dataclass(frozen=True)
class Trial:
    """One dictionary of a study: what it is called there, how it is trained, and on what."""

    labels: dict[str, Any]
    config: TrainConfig
    dataset: Dataset

    def seeded(self, count: int) -> "list[Trial]":
        """This trial with `count` seeds, its own first."""
        seeds = range(self.config.seed, self.config.seed + count)
        return [Trial(self.labels, self.config.model_copy(update={"seed": seed}), self.dataset) for seed in seeds]


@dataclass
class Lab:
    """Where studies are carried out: the cache, the runs' folder, how finished runs are judged.

    cross_entropy: whether runs are spliced into the language model, which is booted once, when first needed. Runs on
    rows of no language model are judged by the features they were made of, where those are known.
    """

    root: Path
    runs: Path
    progress: Progress
    judging: EvalConfig = field(default_factory=EvalConfig)
    cross_entropy: bool = True
    device: str = "auto"
    offline: bool = False
    _models: dict[str, LanguageModel] = field(default_factory=dict)

    def train(self, trials: Sequence[Trial]) -> list[Run]:
        """The finished run of every trial; only what is missing is trained. Trials of the same settings share a run.

        Raises SaeError, before anything is trained, where a store lacks what its runs will be judged on.
        """
        for dataset in {trial.dataset.key: trial.dataset for trial in trials}.values():
            self._expect_judgeable(dataset)
        runs: dict[str, Run] = {}
        for key in dict.fromkeys(trial.dataset.key for trial in trials):
            together = [trial for trial in trials if trial.dataset.key == key]
            dataset = together[0].dataset
            configs = {run_name(trial.config, dataset): trial.config for trial in together}
            opened = open_all(list(configs.values()), dataset, self.runs)
            sweep(opened, dataset, self.progress, device=self.device)
            runs |= dict(zip(configs, opened, strict=True))
        return [runs[run_name(trial.config, trial.dataset)] for trial in trials]

    def rows(self, trials: Sequence[Trial], *, whole: bool = True) -> list[Row]:
        """Train and judge the trials: a row each, of its run, labels, seed and every figure there is.

        whole: what takes a language model or known features as well, and not the rows and the weights alone.
        """
        found = []
        for trial, run in zip(trials, self.train(trials), strict=True):
            of_text = trial.dataset.provenance.text is not None
            judged = self._judge(run, trial.dataset, whole and (self.cross_entropy or not of_text))
            found.append({"run": run.name, **trial.labels, "seed": trial.config.seed, **judged})
        return found

    def _judge(self, run: Run, dataset: Dataset, whole: bool) -> figures.Figures:
        """Every figure of a finished run; only what is missing is computed."""
        dataset = dataset.kept_up_to(trained.limits(run, dataset))
        held_out = dataset.held_out(self.root)
        if whole and (judging := missing(run, self.judging, dataset, held_out, self.root)) is not None:
            evaluate(
                judging, run, self.root, self.progress, activations=str(dataset.inputs[0].path), device=self.device,
                language_model=None if dataset.provenance.text is None else self._model(dataset),
            )  # fmt: skip
        found = figures.of_run(run, dataset, held_out, self.judging, self.progress, self.device)
        return {**found, **(figures.judged(run) if whole else dict.fromkeys(figures.of_more()))}

    def _model(self, dataset: Dataset) -> LanguageModel:
        store = (dataset.targets or dataset.inputs)[0]
        name = canonical(store.recipe["model"])
        if name not in self._models:
            with said_if_slow(self.progress, f"loading {name}"):
                self._models[name] = boot(store, None, self.device, self.offline)
        return self._models[name]

    def _expect_judgeable(self, dataset: Dataset) -> None:
        try:
            text = dataset.held_out(self.root).provenance.text
        except NotFound as error:
            raise NotFound(
                f"{dataset.key}: no held-out rows beside it to judge on; make them, as `sae eval` asks for too"
            ) from error
        if text is not None and self.cross_entropy and catalogue.of_recipe(self.root, TokenStore, text.recipe) is None:
            raise NotFound(
                f"{dataset.key}: its validation tokens are not in {self.root}; leave out cross-entropy with --no-ce, "
                "or run `sae tokenize` again"
            )


@dataclass(frozen=True)
class Result:
    """What a study found.

    rows: one a run. columns: the labels and figures the table shows. draw: makes the plot from the table's rows and
    writes it to a path.
    """

    study: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[Row]
    draw: Callable[[list[Row], Path], None]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> list[Row]:
        """A row a run: its name, labels, seed and the study's figures."""
        kept = ("run", *self.labels, "seed", *self.unlike, *self.columns)
        return [{key: row[key] for key in kept} for row in self.rows]

    @property
    def unlike(self) -> tuple[str, ...]:
        """What tells on how much runs were judged, where it was not on the same: `rows`, `tokens`."""
        return tuple(name for name in ("rows", "tokens") if len({row.get(name) for row in self.rows}) > 1)

    @property
    def table(self) -> list[Row]:
        """The rows to read: without names, and where there are several seeds their mean and standard deviation."""
        if len({repr([row[label] for label in self.labels]) for row in self.rows}) < len(self.rows):
            return over_seeds(self.runs, self.columns)
        return [{key: value for key, value in row.items() if key not in ("run", "seed")} for row in self.runs]

    def write(self, out: Path) -> dict[str, str]:
        """Write table.csv, results.json and plot.png into a folder; what is where."""
        expect_results(out)
        make_folder(out)
        paths = {name: out / file for name, file in FILES.items()}
        write_atomic(paths["table"], as_csv(self.runs).encode())
        write_atomic(paths["results"], json.dumps(self.as_json(), indent=2, allow_nan=False).encode())
        self.draw(self.table, paths["plot"])  # last: there may be nothing to draw
        return {name: str(path) for name, path in paths.items()}

    def as_json(self) -> dict[str, Any]:
        """Everything found."""
        return {"study": self.study, "runs": self.runs, "table": self.table, "notes": self.notes, **self.extra}


def expect_results(out: Path) -> None:
    """Raise SaeError where results would replace files that are no study's."""
    if not any((out / file).exists() for file in FILES.values()):
        return
    try:
        said = json.loads(read(out / FILES["results"]) or b"")
    except ValueError:
        said = None
    if not isinstance(said, dict) or "study" not in said:
        there = next(file for file in FILES.values() if (out / file).exists())
        raise SaeError(f"--out {out}: {there} there is no study's; move it away or name another folder")


def of_equal_rows(base: TrainConfig, datasets: Iterable[Dataset]) -> TrainConfig:
    """The base with its length in writing: where it has none, the rows that the smallest of the datasets has now.

    So that what is trained later, when one may have grown, sees as many.
    """
    if base.steps is not None or base.rows is not None:
        return base
    return base.model_copy(update={"rows": min(dataset.n_rows for dataset in datasets)})


def variant(base: TrainConfig, arch: str, **settings: Any) -> TrainConfig:
    """`base` with a dictionary of another architecture, and these settings of it.

    What the base says otherwise than its own architecture's defaults is kept: all of it for the same architecture,
    else what all architectures have in common. Raises SaeError where the settings do not go together.
    """
    old, new = base.sae, ARCHITECTURES[arch].config_type
    common = type(old).model_fields if old.arch == arch else Config.model_fields
    given = {name: getattr(old, name) for name in common if getattr(old, name) != type(old).model_fields[name].default}
    given.pop("arch", None)
    try:
        sae = parse({**given, **settings, "arch": arch})
        # validated anew: what training asks of an architecture may not hold for this one
        return TrainConfig.model_validate({**base.model_dump(), "sae": sae.model_dump()})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["sae", *(str(part) for part in first["loc"] if part in new.model_fields)])
        raise SaeError(f"train.{where}: {first['msg'].removeprefix('Value error, ')} (for arch {arch})") from error
