"""A finished run -> the figures that studies put side by side: what every metric tells of it, and its last loss.

What rows and weights alone tell is what `sae eval` found, where it has judged the run on enough rows; else it is
computed without a language model, once, and kept in `eval/study.json`. Cross-entropies, and how many of the true
features were found where those are known, are those of `eval/eval.json`.
"""

from typing import Any

from sae.cache.disk.parsing import figure
from sae.cache.errors import DamagedStore
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.pipeline.evaluate.judging import EvalConfig, judge
from sae.pipeline.metrics.figures import WITHOUT_MODEL, compared, completed, figures
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.train import trained

STUDY = "eval/study.json"
NUMBERS = ("mse", "l0", "sparsity", "dead_fraction", "rows")  # which no rows leave undefined

Figures = dict[str, float | None]


def columns(*first: str) -> tuple[str, ...]:
    """A study's columns: those it shows first, then the other figures that are compared everywhere."""
    return tuple(dict.fromkeys([*first, *(one.key for one in compared())]))


def of_rows() -> list[str]:
    """The keys of what rows and weights alone tell, and `rows`: how many were judged.

    Where training left rows out by their norm, the figures are over the others of them.
    """
    told = figures(shown=("everywhere", "studies"), needs=WITHOUT_MODEL)
    return ["rows", *(one.key for one in told if not one.amount)]


def of_run(
    run: Run, dataset: Dataset, held_out: Dataset, config: EvalConfig, progress: Progress, device: str
) -> Figures:
    """The figures of `of_rows`, and `train_loss`: the total loss of the last logged step, in the run's own terms.

    What is kept serves where it has every figure and was judged on no fewer rows than are asked for. Raises NotFound
    while training has not finished.
    """
    rows = config.rows_of(held_out)
    evaluated = run.evaluation() or {}
    kept = {} if dataset.limits is not None and "kept" not in evaluated else _flat(evaluated)
    if not _enough(kept, rows):
        kept = _read(run)
    if not _enough(kept, rows):
        sae = trained.load(run).to(devices.device(device))
        kept = _flat(judge(Subject(sae), dataset, held_out, config, progress).as_json())
        run.write_json(STUDY, {name: kept[name] for name in of_rows()})
    return {**{name: kept[name] for name in of_rows()}, "train_loss": (run.metrics() or [{}])[-1].get("loss")}


def judged(run: Run) -> Figures:
    """The figures of `of_more`; None where they do not apply."""
    found = on_kept_rows(completed(run.evaluation() or {}))
    return {name: found.get(name) for name in of_more()}


def of_more() -> list[str]:
    """The keys of what `sae eval` alone can tell, and on how many `tokens`."""
    return [*(key for key in columns() if key not in of_rows()), "tokens"]


def on_kept_rows(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation over rows as the run was trained on, where it left some out."""
    return {**evaluation, **evaluation.get("kept", {})}


def _flat(evaluation: dict[str, Any]) -> Figures:
    """The figures over kept rows, with how many rows were judged in all."""
    return {**on_kept_rows(evaluation), "rows": evaluation.get("rows")}


def _enough(kept: Figures, rows: int) -> bool:
    """Whether every figure is there, judged on so many rows at least. What cannot be null and is, is not there."""
    there = {*of_rows()} <= kept.keys() and all(kept[name] is not None for name in NUMBERS)
    return there and (kept["rows"] or 0) >= rows


def _read(run: Run) -> Figures:
    """What an earlier study kept; nothing where there was none."""
    found = run.read_json(STUDY) if (run.path / STUDY).exists() else {}
    try:
        return {name: figure(found, name) for name in found if name in of_rows()}
    except ValueError as error:
        raise DamagedStore(f"{run.path / STUDY}: {error}; remove it and repeat the study") from error
