"""Training curves, how decoder directions lie, and several runs beside each other, as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sae.pipeline.metrics.figures import label
from sae.pipeline.report.charts import Point, Series, histogram, line_chart, scatter
from sae.pipeline.report.compare import Row, notes
from sae.pipeline.report.escaping import escape
from sae.pipeline.report.numbers import number

if TYPE_CHECKING:
    from sae.pipeline.report.page import Found

KNOWN = {
    "fvu": "FVU of the training batch",
    "l0": "L0, active latents per token",
    "dead": "Share of latents that are dead",
}
UNSHOWN = {"step", "rows", "seconds", "seconds_per_step", "megabytes", "loss", "lr", "lr_decoder", *KNOWN}
COMPARED = (("fvu", "l0"), ("ce_degradation", "l0"))
BINS = 25


def curves(metrics: list[dict[str, Any]]) -> str:
    """Everything that was logged of a training, over its steps."""
    series = {key: found for key in metrics[-1] if (found := points(metrics, key))}
    terms = {k.removeprefix("loss_"): v for k, v in series.items() if k.startswith("loss_")}
    if list(terms.values()) != [series.get("loss")]:  # one term alone is the loss itself
        terms = {"total": series.get("loss", []), **terms}
    rates = {"lr": series.get("lr", []), "decoder's": series.get("lr_decoder", [])}
    charts = _lines("Loss", terms, "wide") + _lines(KNOWN["fvu"], {"FVU": series.get("fvu", [])}, "wide")
    charts += "".join(_lines(KNOWN[key], {key: series.get(key, [])}) for key in ("l0", "dead"))
    charts += _lines("Learning rate", rates)
    others = [key for key in series if key not in UNSHOWN and not key.startswith("loss_")]
    charts += "".join(_lines(key, {key: series[key]}) for key in others)
    return f'<div class="charts">{charts}</div>'


def curves_of_several(found: Sequence[Found]) -> str:
    """What every training logs, a line a run."""
    charts = "".join(
        _lines(
            title, {one.name: points(one.metrics, key) for one in found if one.metrics}, "wide" if key == "fvu" else ""
        )
        for key, title in {"fvu": KNOWN["fvu"], "loss": "Loss", "l0": KNOWN["l0"], "dead": KNOWN["dead"]}.items()
    )
    return f'<div class="charts">{charts}</div>' if charts else ""


def points(metrics: list[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) of a metric, where it is a finite number."""
    pairs = [(line["step"], line.get(key)) for line in metrics]
    return [(float(step), float(v)) for step, v in pairs if isinstance(v, int | float) and math.isfinite(v)]


def _lines(title: str, lines: dict[str, list[Point]], size: str = "") -> str:
    series = [Series(name, found) for name, found in lines.items()]
    return line_chart(title, series, x_label="step", ratios=bool(size), size=size)


def geometry_html(found: Sequence[Found]) -> str:
    """How near each latent's decoder direction is to another's, beside what chance and the best packing would give."""
    charts = ""
    for one in found:
        near = None if one.statistics is None else one.statistics.nearest
        if near is None or near.cosine.shape[1] == 0 or len(near.cosine) < 2:
            continue
        largest = near.cosine[:, 0].astype(float)
        d, m = sum(each.recipe["d"] for each in one.seen.targets or one.seen.inputs), len(largest)
        low = min(0.0, math.floor(float(largest.min()) * 10) / 10)
        edges = np.linspace(low, 1.0, BINS + 1)
        counts = np.histogram(largest.clip(low, 1.0), edges)[0]
        references = [("random directions", min(1.0, math.sqrt(2 * math.log(m) / d)))]
        if m > d:
            references.append(("Welch bound", math.sqrt((m - d) / (d * (m - 1)))))
        title = "Latents by cosine with the nearest other direction" + (f", {one.name}" if len(found) > 1 else "")
        size = "full" if len(found) == 1 else "wide"
        charts += histogram(
            title, counts.tolist(), edges.tolist(), size=size, references=references, log=False
        )  # fmt: skip
    if not charts:
        return ""
    about = (
        "<p>A latent whose direction is nearly another\u2019s says the same twice. The largest of so many random "
        "directions would be near the dashed line of that name; no dictionary has all its cosines below the Welch "
        "bound.</p>"
    )
    return f'{about}<div class="charts">{charts}</div>'


def runs_html(rows: Sequence[Row]) -> str:
    """A comparison: a table with a row a run, and figures over L0 as points."""
    columns = [key for key in rows[0] if any(row.get(key) is not None for row in rows) and not key.startswith("train_")]
    head = "".join(f"<th>{escape(key)}</th>" for key in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(key), key) for key in columns) + "</tr>" for row in rows)
    said = "".join(f'<p class="about">{escape(line)}</p>' for line in notes(rows))
    charts = ""
    for y, x in COMPARED:
        places = [
            (str(r["run"]), str(r["sae.arch"]), float(r[x]), float(r[y]))
            for r in rows
            if r.get(x) and r.get(y) is not None
        ]
        if places:
            charts += scatter(label(y), places, x_label="L0")
    table = f'<div class="scrolled"><table><tr>{head}</tr>{body}</table></div>'
    return f'{said}{table}<div class="charts">{charts}</div>'


def _cell(value: Any, key: str) -> str:
    if key == "run":
        return f'<th scope="row">{escape(str(value))}</th>'
    if isinstance(value, float) or type(value) is int:
        return f'<td class="n">{number(value)}</td>'
    return f"<td>{escape('–' if value is None else str(value))}</td>"
