"""Run folders for configurations: what a run is named by, which run is of a configuration, the folder of a new one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.cache import catalogue, points
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import digest, readable
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.outliers import Limits
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.runs import CONFIG, Run
from sae.cache.seen import Seen, SeenStore
from sae.pipeline.saes import ARCHITECTURES
from sae.pipeline.saes.contract import LayerByLayer
from sae.pipeline.train.config import BETAS_BEFORE, REVISION, TrainConfig, settings_of

# settings that names of runs do not know of, and what they were before; of dictionaries, and of training
LATER: dict[str, Any] = {"skip": False}
LATER_OF_TRAINING: dict[str, Any] = {"snapshots": 0, "kernels": "auto"}


def run_name(config: TrainConfig, dataset: Dataset) -> str:
    """The name of a configuration's run folder on a dataset, where none is given: what varies, and a hash of all.

    The number of rows is part of it: on stores that have grown the same settings are another run.
    """
    config = on_rows(config, dataset)
    inputs, targets = dataset.recipes
    where = "-to-".join("+".join(map(_point, side)) for side in (dataset.inputs, dataset.targets) if side)
    sparsity = [
        f"{letter}{_short(getattr(config.sae, name))}"
        for letter, name in (("k", "k"), ("l", "target_l0"), ("c", "coefficient"), ("jl", "jl_coefficient"))
        if getattr(config.sae, name, None) is not None and name not in config.sae.idle
    ]
    identity: dict[str, Any] = {"train": _named_by(config), "activations": inputs[0]}
    identity |= {name: recipes for name, recipes in (("beside", inputs[1:]), ("targets", targets)) if recipes}
    parts = [config.sae.arch, str(config.sae.latents), *sparsity, f"lr{_short(config.rate)}", f"s{config.seed}", where]
    return "-".join([*parts, digest(identity)])


def _named_by(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run is named by: those that came after the first names only where they are set."""
    said = config.model_dump(mode="json")
    for name, unset in LATER.items():
        if said["sae"].get(name, unset) == unset:
            said["sae"].pop(name, None)
    for name, unset in LATER_OF_TRAINING.items():
        if said[name] == unset:
            del said[name]
    said["checkpoint_every"] = config.steps_to_checkpoint
    # before there was a choice by device, float32 was what nobody had asked for
    said["precision"] = {"auto": "float32", "float32": "float32 anywhere"}.get(said["precision"], said["precision"])
    return said


def _point(store: ActivationStore) -> str:
    """Return the name of a store in the name of a run."""
    origin = provenance(store.recipe)
    return origin.point if isinstance(origin, LanguageModelRows) else readable(store.slug)


def _short(value: float) -> str:
    """A number as one types it: 0.001, 3e-5."""
    return re.sub(r"e([+-])0?", lambda sign: "e-" if sign[1] == "-" else "e", f"{value:g}")


def on_rows(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The configuration with the number of rows that it means on a dataset as it is now: all, where it says none.

    Raises SaeError where it wants more than there are.
    """
    rows = config.store_rows or dataset.n_rows
    if rows > dataset.n_rows:
        raise SaeError(
            f"train.store_rows = {rows}: {dataset.key} has {dataset.n_rows:,} rows; lower it, or harvest more"
        )
    return config.settled(rows)


def begun(config: TrainConfig, dataset: Dataset, runs: Sequence[Run]) -> list[Run]:
    """The runs that have a configuration and a dataset; where it says no number of rows, with any."""
    trained = [run for run in runs if run.imported is None and run.seen.recipes == dataset.recipes]
    return [run for run in trained if not _differing(run, config)]


def _differing(run: Run, config: TrainConfig) -> list[str]:
    """The settings in which a run differs from a configuration."""
    saved, given = settings_of(run).model_dump(mode="json"), config.settled(run.seen.rows).model_dump(mode="json")
    saved["store_rows"] = run.seen.rows  # in version 0.1.0 it was said there alone
    if run.revision < 4 and (saved["precision"], given["precision"]) == ("float32", "auto"):
        given["precision"] = "float32"  # as it was then for those who said nothing
    if run.revision < 8 and config.betas is None:
        given["betas"] = BETAS_BEFORE  # likewise
    if run.revision < 5:
        given["checkpoint_every"] = config.steps_to_checkpoint
    return sorted(name for name in saved if saved[name] != given[name])


def open_run(config: TrainConfig, dataset: Dataset, root: Path, name: str | None, *, resume: bool) -> Run:
    """The run folder for a configuration: new, or with `resume` the one that has the same configuration.

    Raises SaeError where a new one exists, where there is none to resume, or where its configuration differs.
    """
    if resume:
        return _continued(config, dataset, root, name)
    config = on_rows(config, dataset)
    rows = config.store_rows
    assert rows is not None
    try:
        config.sae.expect_length(config.total_steps(rows))
        config.sae.expect_widths(dataset.widths_in, dataset.widths_out if dataset.targets else None)
    except ValueError as error:
        raise SaeError(f"train.sae.{error}") from error
    if issubclass(ARCHITECTURES[config.sae.arch], LayerByLayer):
        for stores in (dataset.inputs, dataset.targets, *zip(dataset.inputs, dataset.targets, strict=False)):
            points.expect_in_order(stores)
    elif len(dataset.inputs) == len(dataset.targets) == 1:
        points.expect_read_first(dataset.inputs[0], dataset.targets[0])
    if config.batch > rows:
        raise SaeError(f"batch = {config.batch}: {dataset.key} has {rows:,} rows; lower it, or harvest more")
    limits = dataset.first(rows).limits_by(config.outliers)
    dataset.kept_up_to(limits).expect_kept(config.batch, "batch")
    content = {"revision": REVISION, "train": config.model_dump(mode="json"), **_seen(dataset, rows, limits).as_json()}
    return Run.create(root / (name or run_name(config, dataset)), content)


def _seen(dataset: Dataset, rows: int, limits: Limits | None) -> Seen:
    """Return what a run folder says of its dataset."""
    norms = (None,) * len(dataset.stores) if limits is None else limits
    stores = tuple(SeenStore(store.key, store.recipe, most) for store, most in zip(dataset.stores, norms, strict=True))
    return Seen(rows, stores[: len(dataset.inputs)], stores[len(dataset.inputs) :])


def _continued(config: TrainConfig, dataset: Dataset, root: Path, name: str | None) -> Run:
    if name is None:
        found = begun(config, dataset, catalogue.readable_runs(root)[0])
        waiting = [run for run in found if not run.finished] or found
        if not waiting:
            raise NotFound(
                f"resume = True: no run {run_name(config, dataset)} in {root}; `choices()` shows the runs, without "
                "`resume` it is started"
            )
        if len(waiting) > 1:
            raise SaeError(f"resume = True: ambiguous; give `name`: {', '.join(run.name for run in waiting)}")
        return waiting[0]
    if not (root / name / CONFIG).exists():
        raise NotFound(
            f"resume = True: no run {name} in {root}; `choices()` shows the runs, without `resume` it is started"
        )
    run = catalogue.find_run(root, str(root / name))
    differs = _other_rows(run.seen, dataset) or _differing(run, config)
    if differs:
        raise SaeError(
            f"resume = True: {run.path} was started with other settings ({', '.join(differs)}); repeat those"
        )
    return run


def _other_rows(seen: Seen, dataset: Dataset) -> list[str]:
    """In what the stores of a run differ from those of a dataset, by the names in their recipes."""
    for side, saved, given in zip(("input", "target"), seen.recipes, dataset.recipes, strict=True):
        if len(saved) != len(given):
            return [side]
        for one, other in zip(saved, given, strict=True):
            if one != other:
                return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return []
