"""Run folders -> one table: what the runs differ in, what each reached, and the mean over seeds.

Figures on held-out documents are those `sae eval` wrote; where it has not run they are missing, and the last training
batch's stand in columns of their own, so that the two are never mistaken for each other. On how much each run was
judged stands beside its figures (`amounts`), and what was not judged on the same is never averaged.
"""

import csv
import io
import statistics
from collections.abc import Sequence
from typing import Any

from sae.cache.disk.parsing import as_written, field, figure, inner, shown, text, whole
from sae.cache.errors import NotFound, SaeError
from sae.cache.printable import printable
from sae.cache.runs import CONFIG, DECOMPOSITION, Run
from sae.pipeline.metrics.figures import (
    OF_ROWS,
    Better,
    Figure,
    amounts,
    available,
    compared,
    completed,
    figures,
    lacking,
)

TRAINING = ("fvu", "l0", "dead", "agreement", "recovery", "seconds_per_step", "megabytes")
FORMULA = tuple("=+-@＝＋－＠")

Row = dict[str, Any]


def compare(runs: Sequence[Run]) -> list[Row]:
    """One row a run: its name, the settings in which the runs differ (and the architecture), its figures.

    A figure that is not there is None. Raises SaeError where a run has neither trained nor been evaluated at all.
    """
    if not runs:
        raise NotFound("no runs; `train()` makes one, `train(sweep=...)` many")
    settings = [_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for one in settings for key in one))
    # a setting that only some architectures have is told by the architecture, unless its values differ
    differing = [key for key in keys if len({repr(one[key]) for one in settings if key in one}) > 1]
    transcoders = ["activations"] if any(run.decomposes or run.seen.targets for run in runs) else []
    imported = ["format"] if any(run.imported for run in runs) else []
    shown = list(dict.fromkeys(["sae.arch", *imported, *transcoders, *differing]))
    return [
        {"run": run.name, **{key: one.get(key) for key in shown}, **_figures(run)}
        for run, one in zip(runs, settings, strict=True)
    ]


def over_seeds(rows: Sequence[Row], figures: Sequence[str] | None = None) -> list[Row]:
    """Rows that differ in nothing but the seed as one: number of seeds, mean and standard deviation of each figure.

    Rows that were not judged on the same stay apart.
    """
    figures = [*held_out(), *(f"train_{name}" for name in TRAINING)] if figures is None else figures
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


def front(points: Sequence[tuple[float, float]], better: Better = "low") -> list[tuple[float, float]]:
    """The points no other is better than in both coordinates, by the first one, of which less is better.

    better: which end of the second one is; where neither is, no point is better than another.
    """
    sign = {"low": 1, "high": -1, None: 0}[better]
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda point: (point[0], sign * point[1], point[1])):
        if not best or not sign or sign * point[1] < sign * best[-1][1]:
            best.append(point)
    return best


def cell(value: Any) -> Any:
    """A value as a cell of CSV. Text that a spreadsheet would compute is marked as text; numbers stay numbers."""
    if value is None or isinstance(value, int | float):
        return value
    text = printable(str(value))
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def as_csv(rows: Sequence[Row]) -> str:
    """Comma-separated values with a header; None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writerow({name: cell(name) for name in writer.fieldnames})
    writer.writerows([{name: cell(value) for name, value in row.items()} for row in rows])
    return text.getvalue()


def evaluation_of(run: Run) -> dict[str, Any]:
    """What was found of a run on held-out data; of a decomposition, with its active components alone."""
    found = run.evaluation() or {}
    if not run.decomposes or not (run.path / DECOMPOSITION).exists():
        return found
    said = run.read_json(DECOMPOSITION)
    with as_written(run.path / DECOMPOSITION):
        return _of_decomposition(said, whole(run.settings, "batch", 1)) | found


def _of_decomposition(said: dict[str, Any], batch: int) -> dict[str, Any]:
    """The figures of a `decomposition.json` under the names that those of dictionaries have."""
    active, itself, matrices = (inner(said, name) for name in ("rounded", "itself", "matrices"))
    l0 = parameters = 0.0
    bits: float | None = 0.0
    for one in (inner(matrices, name) for name in matrices):
        on, own, shape = figure(one, "ci_l0") or 0.0, figure(one, "bits"), field(one, "shape")
        if not isinstance(shape, list) or any(type(width) is not int for width in shape):
            raise ValueError(f"shape is {shown(shape)}, not two whole numbers")
        l0, parameters = l0 + on, parameters + on * sum(shape)
        bits = None if bits is None or own is None else bits + own  # one of before has none
    # one of before says of batches alone how many there were
    rows = whole(said, "rows") if "rows" in said else whole(said, "batches") * batch
    clean = figure(itself, "ce")
    return {
        "l0": l0, "active_parameters": parameters, "bits": bits, "rows": rows,
        "tokens": None if clean is None else rows, "ce_clean": clean, "ce_spliced": figure(active, "ce"),
        **{name: figure(active, name) for name in ("fvu", "mse", "kl")},
    }  # fmt: skip


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run in one level, with what it was trained on."""
    if not run.decomposes:
        return _flat(run.settings) | {"activations": run.seen.key}
    own = {"sae.arch": "spd", **_flat(run.settings)}
    with as_written(run.path / CONFIG):
        if "activations" in run.config:
            return own | {"activations": run.seen.key}
        return own | ({"activations": text(inner(run.config, "tokens"), "key")} if "tokens" in run.config else {})


def _flat(settings: dict[str, Any], inside: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{inside}{key}.") if isinstance(value, dict) else {inside + key: value}
    return flat


def _figures(run: Run) -> Row:
    judged = completed(evaluation_of(run))
    trained = next(reversed(run.metrics()), None)
    if trained is None and not judged and run.imported is None:
        raise SaeError(f"{run.path}: has no figures yet; train it first, or name the runs to compare")
    judged |= {f"kept_{name}": value for name, value in (judged.get("kept") or {}).items()}
    found: Row = {name: judged.get(name) for name in [*(one.key for one in amounts()), *held_out()]}
    return found | {f"train_{name}": (trained or {}).get(name) for name in TRAINING}


def held_out() -> list[str]:
    """The columns of what `sae eval` found; `kept_fvu` and the like are without rows that lie far out."""
    keys, of_rows = [one.key for one in compared()], {one.key for one in figures(needs=OF_ROWS)}
    return [*keys, *(f"kept_{key}" for key in keys if key in of_rows)]


def unlike(rows: Sequence[Row]) -> list[Figure]:
    """Return the amounts (`rows`, `tokens`) that differ between the runs that were judged at all."""
    return [one for one in amounts() if len({row[one.key] for row in rows if row.get(one.key) is not None}) > 1]


def notes(rows: Sequence[Row]) -> list[str]:
    """Return a line for each thing to know first: amounts that differ, runs that were not judged."""
    said = []
    for amount in unlike(rows):
        found = sorted({row[amount.key] for row in rows if row[amount.key] is not None})
        said.append(
            f"judged on {found[0]:,} to {found[-1]:,} {amount.title}: compare only what is alike, or judge them alike "
            "with `evaluate()`"
        )
    if missing := [row["run"] for row in rows if row["rows"] is None]:
        said.append(f"not judged on held-out rows: {named(missing)}; `evaluate(RUN)` does")
    return said


def outdated(runs: Sequence[Run]) -> list[str]:
    """Return a line for each figure that is newer than some evaluations, with their runs."""
    without: dict[str, list[str]] = {}
    for run in runs:
        if not run.decomposes and (found := run.evaluation()) is not None:
            found = completed(found)
            for key in lacking(found, available(model="ce_clean" in found, truth="chance" in found)):
                without.setdefault(key, []).append(run.name)
    shown = [key for key in held_out() if key in without]
    return [f"judged before there was {key}: {named(without[key])}; `evaluate(RUN)` adds it" for key in shown]


def named(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
