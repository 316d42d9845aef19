"""Studies: a class under `@register` in a file of this folder each, its settings declared as literals.

    @register
    class Widths(Study):
        \"\"\"The same dictionary with several numbers of latents.

        Example: `sae study widths --widths 1024,4096`.
        \"\"\"

        name = "widths"
        labels = ("d_sae",)
        shown = ("fvu", "l0", "dead_fraction")
        decides = ("sae.d_sae",)
        dictionary = ("arch", "k")

        widths: tuple[PositiveInt, ...] = Field((1024, 4096), description="numbers of latents")

        def trials(self, setup: Setup) -> list[Trial]:
            return [setup.trial({"d_sae": m}, variant(setup.base, setup.base.sae.arch, d_sae=m)) for m in self.widths]

Its fields are the options of `sae study widths` and the keys of `study.widths` in a YAML file; its docstring is the
help. The command line reads both from the text of the class, for importing takes torch.

Repeating a study trains and judges only what is missing: a run folder is named by its settings, an interrupted run
continues at its checkpoint, and the figures of a finished one are kept beside it. All trials on one dataset that agree
on their batches train in one pass over it, and so must fit into memory together.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError, create_model, field_validator

from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.configs.base import Settings, distinct
from sae.pipeline.declared.importing import enter, in_files
from sae.pipeline.metrics.figures import compared, label
from sae.pipeline.report.compare import Row
from sae.pipeline.saes import ARCHITECTURES, SAE, Config, parse
from sae.pipeline.studies.lab import Lab, Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.tables import Result
from sae.pipeline.train.stage import TrainConfig

STUDIES: dict[str, type["Study"]] = {}
"""Every registered study by its name; `studies` has those of this folder in it, too."""


@dataclass(frozen=True)
class Setup:
    """Everything that a study needs to be carried out.

    base: the training that all its dictionaries have in common. seeds: how many of each, None for as many as is usual.
    sae: `k` and `d_sae` of every dictionary in the place of the base's, for a study that chooses architectures itself.
    """

    base: TrainConfig
    dataset: Dataset
    lab: Lab
    seeds: int | None = None
    sae: Mapping[str, Any] = field(default_factory=dict)

    def trial(self, labels: dict[str, Any], config: TrainConfig) -> Trial:
        """Return a trial: a dictionary with these labels, trained on the dataset."""
        return Trial(labels, config, self.dataset)


class Study(Settings, ABC):
    """A question that takes many dictionaries. Every field is a setting with a default.

    name: what it is called on the command line, in YAML and in its results. labels: the columns that tell its
    dictionaries apart, the first of which is the plot's x axis. shown: the figures that come first in its table and
    are drawn. decides: settings of training that it sets itself, as `sae.d_sae`, and refuses to be told.
    architectures: those it trains, where it chooses them. dictionary: which options say something of all its
    dictionaries. usual_seeds: dictionaries of each kind where nobody says. any_store: whether one of several stores
    that one harvest made is as good as another to begin with.
    """

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...]]
    shown: ClassVar[tuple[str, ...]]
    decides: ClassVar[tuple[str, ...]] = ()
    architectures: ClassVar[tuple[str, ...]] = ()
    dictionary: ClassVar[tuple[str, ...]] = ("arch", "k", "d_sae")
    usual_seeds: ClassVar[int] = 1
    any_store: ClassVar[bool] = False

    @field_validator("*", mode="after")
    @classmethod
    def _nothing_twice(cls, value: Any) -> Any:
        return distinct(value) if isinstance(value, tuple) else value

    def sets(self, key: str) -> bool:
        """Return whether the study itself decides a setting of training, as `sae.d_sae`."""
        return any(f"{key}.".startswith(f"{one}.") for one in self.decides)

    @abstractmethod
    def trials(self, setup: Setup) -> list[Trial]:
        """Return the dictionaries to train, with one seed each. The base says how many steps or rows."""

    def run(self, setup: Setup) -> Result:
        """Train and judge the dictionaries, and put them side by side.

        Raises SaeError, before anything is trained, where settings do not go together or there is nothing to train.
        """
        setup = replace(setup, base=of_equal_rows(setup.base, [setup.dataset]))
        return self.result(self.rows(setup, self.trials(setup)))

    def rows(self, setup: Setup, trials: Sequence[Trial]) -> list[Row]:
        """Train and judge every trial with every seed: a row a run. Raises SaeError where there is no trial."""
        if not trials:
            raise SaeError(f"study.{self.name}: there is nothing to train, since its lists are empty; give a value")
        seeds = setup.seeds or self.usual_seeds
        return setup.lab.rows([seeded for trial in trials for seeded in trial.seeded(seeds)])

    def result(self, rows: list[Row], *more: str, **other: Any) -> Result:
        """Put rows, one a run, into a result: with `more` columns, and its other fields by name."""
        draw = other.pop("draw", self.draw)
        return Result(self.name, self.labels, (*columns(*self.shown), *more), rows, draw, **other)

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Write the plot of the table's rows: each figure against the first label, a curve for what else differs."""
        x, *others = self.labels
        titles = {figure.key: label(figure.key) for figure in compared()}

        def panel(name: str) -> Panel:
            curves: dict[str, list[tuple[float, float | None]]] = {}
            for row in sorted((row for row in rows if row[x] is not None), key=lambda row: row[x]):
                curve = ", ".join(f"{other} {row[other]}" for other in others)
                curves.setdefault(curve, []).append((row[x], row[name]))
            return Panel(titles.get(name, name), x, curves)

        draw_panels([panel(name) for name in self.shown], path)

    def lines(self, result: Result, *, plain: bool = False) -> list[str]:
        """Return lines to show below the table. plain: nothing but ASCII."""
        return []


Kind = TypeVar("Kind", bound=Study)


def register(kind: type[Kind]) -> type[Kind]:
    """Make a study known under its name, which must be nobody else's. Each of its settings needs a default."""
    if required := [name for name, setting in kind.model_fields.items() if setting.is_required()]:
        raise ValueError(f"study {kind.name}: {', '.join(required)} has no default")
    enter(STUDIES, "study", kind.name, kind)
    return kind


def studies() -> dict[str, type[Study]]:
    """Import the files of this folder, and return every registered study by its name."""
    return in_files(__package__, STUDIES)


def settings() -> type[Settings]:
    """Return the settings class of the section `study` of a YAML file: a key for every study."""
    every: dict[str, Any] = {name: (kind, kind()) for name, kind in studies().items()}
    return create_model("StudySettings", __base__=Settings, **every)


def expect_dictionary(config: TrainConfig) -> None:
    """Raise SaeError, before anything is trained, for what is no sparse dictionary: some studies look into one."""
    if not issubclass(ARCHITECTURES[config.sae.arch], SAE):
        raise SaeError(
            f"arch = {config.sae.arch}: is no sparse dictionary, and the study looks into one; take another, as topk"
        )


def of_equal_rows(base: TrainConfig, datasets: Iterable[Dataset]) -> TrainConfig:
    """Return the base with a length: where it has none, as many rows as the smallest of the datasets has now.

    So that what is trained later, when one may have grown, sees as many.
    """
    if base.steps is not None or base.rows is not None:
        return base
    return base.model_copy(update={"rows": min(dataset.n_rows for dataset in datasets)})


def variant(base: TrainConfig, arch: str, **settings: Any) -> TrainConfig:
    """Return `base` with a dictionary of another architecture, and these settings of it.

    What the base says otherwise than its own architecture's defaults is kept: all of it for the same architecture,
    else what all architectures have in common. Raises SaeError where the settings do not go together.
    """
    old, new = base.sae, ARCHITECTURES[arch].config_type
    common = type(old).model_fields if old.arch == arch else Config.model_fields
    said = {name: getattr(old, name) for name in common if getattr(old, name) != type(old).model_fields[name].default}
    given = {name: value for name, value in said.items() if name != "arch" and name in new.model_fields}
    try:
        sae = parse({**given, **settings, "arch": arch})
        # validated anew: what training asks of an architecture may not hold for this one
        return TrainConfig.model_validate({**base.model_dump(), "sae": sae.model_dump()})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["sae", *(str(part) for part in first["loc"] if part in new.model_fields)])
        raise SaeError(f"train.{where}: {first['msg'].removeprefix('Value error, ')} (for arch {arch})") from error
