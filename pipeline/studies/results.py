"""The figures of a finished run that studies put side by side: those of every metric, and its last loss.

Figures of rows and weights alone are those that `sae eval` found, where it has judged the run on enough rows; else they
are computed without a language model, once, and kept in `eval/study.json`. Cross-entropies, and how many of the true
features were found where those are known, are those of `eval/eval.json`.
"""

from typing import Any

from sae.cache.disk.parsing import figure
from sae.cache.errors import DamagedStore
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.evaluate.judging import EvalConfig, judge
from sae.pipeline.formats import trained
from sae.pipeline.metrics.figures import WITHOUT_MODEL, compared, completed, figures
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress

STUDY = "eval/study.json"
NUMBERS = ("mse", "l0", "sparsity", "dead_fraction", "rows")  # which no rows leave undefined

Figures = dict[str, float | None]


def columns(*first: str) -> tuple[str, ...]:
    """Return the columns of a study: those it shows first, then the other figures that are compared everywhere."""
    return tuple(dict.fromkeys([*first, *(one.key for one in compared())]))


def of_rows() -> list[str]:
    """Return the keys of the figures of rows and weights alone, and `rows`: how many were judged.

    Where training left rows out by their norm, the figures are over the others of them.
    """
    told = figures(shown=("everywhere", "studies"), needs=WITHOUT_MODEL)
    return ["rows", *(one.key for one in told if not one.amount)]


def of_run(
    run: Run, dataset: Dataset, held_out: Dataset, config: EvalConfig, progress: Progress, device: str
) -> Figures:
    """Return the figures of `of_rows`, and `train_loss`: the run's total loss at the last logged step.

    Kept figures are used where none is missing and they were judged on no fewer rows than are asked for. Raises
    NotFound while training has not finished.
    """
    rows = config.rows_of(held_out)
    evaluated = run.evaluation() or {}
    kept = {} if dataset.limits is not None and "kept" not in evaluated else _flat(run, evaluated)
    if not _enough(kept, rows):
        kept = _read(run)
    if not _enough(kept, rows):
        sae = trained.load_run(run).to(devices.resolve_device(device))
        kept = _flat(run, judge(Subject(sae), dataset, held_out, config, progress).as_json())
        run.write_json(STUDY, {name: kept[name] for name in of_rows()})
    return {**{name: kept[name] for name in of_rows()}, "train_loss": (run.metrics() or [{}])[-1].get("loss")}


def judged(run: Run) -> Figures:
    """Return the figures of `of_more`; None where they do not apply."""
    found = on_kept_rows(run, completed(run.evaluation() or {}))
    return {name: found.get(name) for name in of_more()}


def of_more() -> list[str]:
    """Return the keys of the figures that only `sae eval` finds, and `tokens`: how many they were judged on."""
    return [*(key for key in columns() if key not in of_rows()), "tokens"]


def on_kept_rows(run: Run, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation whose figures are over rows of the norms that the run was trained on."""
    trained_on_all = run.settings.get("outliers") is None  # though it is judged without the massive ones as well
    return evaluation if trained_on_all else {**evaluation, **evaluation.get("kept", {})}


def _flat(run: Run, evaluation: dict[str, Any]) -> Figures:
    """Return the figures over kept rows, with how many rows were judged in all."""
    return {**on_kept_rows(run, evaluation), "rows": evaluation.get("rows")}


def _enough(kept: Figures, rows: int) -> bool:
    """Return whether every figure is there, judged on so many rows at least. One that may not be null must not be."""
    there = {*of_rows()} <= kept.keys() and all(kept[name] is not None for name in NUMBERS)
    return there and (kept["rows"] or 0) >= rows


def _read(run: Run) -> Figures:
    """Return the figures that an earlier study kept; none where there was no study."""
    found = run.read_json(STUDY) if (run.path / STUDY).exists() else {}
    try:
        return {name: figure(found, name) for name in found if name in of_rows()}
    except ValueError as error:
        raise DamagedStore(f"{run.path / STUDY}: {error}; remove it and repeat the study") from error
