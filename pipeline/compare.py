"""Run folders -> one table: what the runs differ in, what each reached, and the mean over seeds.

Figures on held-out documents are those `sae eval` wrote; where it has not run they are missing, and the last training
batch's stand in columns of their own, so that the two are never mistaken for each other.
"""

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from cache.errors import NotFound, SaeError
from cache.runs import Run

RECOVERY = ("true_to_learned", "learned_to_true", "recovered", "hungarian", "duplicates", "chance")
HELD_OUT = ("fvu", "l0", "dead_fraction", "ce_degradation", "ce_recovered_zero", "ce_recovered_mean", *RECOVERY)
TRAINING = ("fvu", "l0", "dead", "agreement", "recovery", "seconds_per_step", "megabytes")
FIGURES = (*HELD_OUT, *(f"train_{name}" for name in TRAINING))

Row = dict[str, Any]


def compare(runs: Sequence[Run]) -> list[Row]:
    """One row a run: its name, the settings in which the runs differ (and the architecture), its figures.

    A figure that is not there is None. Raises SaeError where a run has neither trained nor been evaluated at all.
    """
    if not runs:
        raise NotFound("sae compare: no runs; `sae train` makes one, `sae train --sweep` many")
    settings = [_flat(run.settings) | {"activations": run.seen.key} for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    # a setting that only some architectures have is told by the architecture, unless its values differ
    differing = [key for key in keys if len({repr(one[key]) for one in settings if key in one}) > 1]
    shown = list(dict.fromkeys(["sae.arch", *differing]))
    return [
        {"run": run.name, **{key: one.get(key) for key in shown}, **_figures(run)}
        for run, one in zip(runs, settings, strict=True)
    ]


def over_seeds(rows: Sequence[Row], figures: Sequence[str] = FIGURES) -> list[Row]:
    """Rows that differ in nothing but the seed as one: number of seeds, mean and standard deviation of each figure."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("run", "seed", *figures)}
        groups.setdefault(repr(sorted(kept.items(), key=repr)), []).append(row)
    merged: list[Row] = []
    for group in groups.values():
        one: Row = {key: value for key, value in group[0].items() if key not in ("run", "seed", *figures)}
        one["seeds"] = len(group)
        for name in figures:
            values = [row[name] for row in group if row[name] is not None]
            complete = len(values) == len(group)
            one[name] = statistics.fmean(values) if complete else None
            one[f"{name}_sd"] = statistics.stdev(values) if complete and len(values) > 1 else None
        merged.append(one)
    return merged


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points no other is better than in both coordinates (smaller is better), by the first one."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def as_csv(rows: Sequence[Row]) -> str:
    """Comma-separated values with a header; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(settings: dict[str, Any], inside: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{inside}{key}.") if isinstance(value, dict) else {inside + key: value}
    return flat


def _figures(run: Run) -> Row:
    judged = run.evaluation() or {}
    trained = next(reversed(run.metrics()), None)
    if trained is None and not judged:
        raise SaeError(f"{run.path}: has no figures yet; train it first, or name the runs to compare")
    figures: Row = {name: judged.get(name) for name in HELD_OUT}
    spliced, clean = judged.get("ce_spliced"), judged.get("ce_clean")
    figures["ce_degradation"] = None if spliced is None or clean is None else spliced - clean
    return figures | {f"train_{name}": (trained or {}).get(name) for name in TRAINING}
