"""A run folder -> one HTML file: what was trained, how well it does, and what its latents fire on.

The page needs nothing but itself: styles, charts and the little script are inside, and its content policy forbids any
request. It is a function of the run folder alone, so the same folder gives the same bytes. Parts that are not there yet
(a run that was not judged) are said to be missing, with the command that makes them.
"""

import base64
import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from sae.cache.disk.durable import expect_no_link, write_atomic
from sae.cache.errors import DamagedStore
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.runs import CONFIG, FEATURES, LATENTS, Run
from sae.cache.seen import Seen
from sae.pipeline.formats.trained import Described
from sae.pipeline.interpret.examples import Features
from sae.pipeline.report.charts import Series, framed, line_chart, number
from sae.pipeline.report.contexts import LEVELS, features_html
from sae.pipeline.report.escaping import escape
from sae.pipeline.report.scores import density_html, scores_html, tree
from sae.pipeline.report.stores import stores_html
from sae.pipeline.report.toys import DrawnToy, drawn_toy, toy_html

LEAST_SHARE = 1e-19  # of the rows of a store that a latent fires on, where it does at all


class Found(NamedTuple):
    """The contents of a run folder; None for what is not there yet."""

    name: str
    config: dict[str, Any]
    seen: Seen
    sae: Described
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    density: np.ndarray | None  # float64 [d_sae]: share of held-out rows a latent fires on
    fired: np.ndarray | None  # bool [d_sae]: whether it fires anywhere, training rows included
    features: Features | None
    toy: DrawnToy | None = None


def write_report(run: Run, out: Path) -> Path:
    """Write the report of a run to `out`. Raises DamagedStore where a file of the run is not what was written."""
    expect_no_link(out.parent)
    write_atomic(out, page(read(run)).encode())
    return out


def read(run: Run) -> Found:
    """Read everything that the report shows."""
    sae = Described.of(run)
    density, fired = _densities(run, sae.d_sae)
    features, toy = found_features(run), drawn_toy(run)
    return Found(run.name, run.config, run.seen, sae, run.metrics(), run.evaluation(), density, fired, features, toy)


def found_features(run: Run) -> Features | None:
    """Read what `report` found of latents; None where it has not looked."""
    if not (run.path / FEATURES).exists():
        return None
    try:
        return Features.model_validate(run.read_json(FEATURES))
    except ValidationError as error:
        raise DamagedStore(f"{run.path / FEATURES}: is not what was written; find the features again") from error


def _densities(run: Run, d_sae: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read, from what `sae eval` wrote, how often each latent fires and which ever do."""
    if (tensors := run.load_latents()) is None:
        return None, None
    try:
        density, fired = tensors["density"].double().numpy(), tensors.get("fired")
        shares = (density == 0) | ((density >= LEAST_SHARE) & (density <= 1))
        if density.shape != (d_sae,) or not shares.all():
            raise ValueError(f"{d_sae} shares should be there")
        if fired is not None and (fired.shape != (d_sae,) or fired.dtype != torch.bool):
            raise ValueError("whether they fired should be there for each")
    except (ValueError, KeyError) as error:
        raise DamagedStore(
            f"{run.path / LATENTS}: is not what was written ({error}); run `evaluate({run.name})` again"
        ) from error
    return density, None if fired is None else fired.numpy()


def page(found: Found) -> str:
    """The whole page."""
    parts = [
        ("numbers", "How good it is", _scores(found)),
        ("training", "Training", _training(found)),
        ("density", "How often latents fire", _density(found)),
        ("latents", "What latents fire on", _latents(found))
        if found.toy is None
        else ("toy", "The toy model", toy_html(found.toy)),
        ("settings", "Settings", _settings(found)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in parts)
    body = f"<header>{_heading(found)}<nav>{links}</nav></header><main>"
    body += "".join(f'<section class="part" id="{name}"><h2>{t}</h2>{html}</section>' for name, t, html in parts)
    body += f"</main><footer>Run <code>{escape(found.name)}</code>. Made by <code>sae report</code>.</footer>"
    resources = files("sae.pipeline.report")
    script = resources.joinpath("page.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(resources.joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(f"{_place(found)} · {found.name}"),
        style=resources.joinpath("page.css").read_text("utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        body=body,
    )


def _place(found: Found) -> str:
    """Say at which point of which model the dictionary is; for rows that come from no model, name the stores."""
    sides = [[provenance(recipe) for recipe in side] for side in found.seen.recipes]
    points = [[one for one in side if isinstance(one, LanguageModelRows)] for side in sides]
    if points != sides:
        return found.seen.key
    first = points[0][0]
    model, several = Path(first.model).name, len(points[0]) > 1 or len(points[1]) > 1
    if several:
        names = [" + ".join(f"{one.layer}.{one.site}" for one in side) for side in points if side]
        return f"{model} · {' → '.join(names)}"
    others = [one.site if one.layer == first.layer else f"layer {one.layer} · {one.site}" for one in points[1]]
    return " → ".join([f"{model} · layer {first.layer} · {first.site}", *others])


def _heading(found: Found) -> str:
    sae, recipe = found.sae, found.seen.inputs[0].recipe
    k, width = sae.k, sum(one.recipe["d"] for one in found.seen.inputs)
    chosen = f" with k = {k}" if k is not None else ""
    wider = f", {number(sae.d_sae / width, 3)} for each of the {width:,} dimensions it reads"
    text = f"A <b>{escape(sae.arch)}</b> dictionary of <b>{sae.d_sae:,} latents</b>{chosen}{wider}"
    if found.metrics and (seen := found.metrics[-1].get("rows")):
        there = found.seen.rows
        text += f", trained on {number(seen)} rows ({number(seen / there, 3)} passes over {number(there)})"
    if imported := found.config.get("imported"):
        text += f", that <b>{escape(str(imported.get('format')))}</b> trained, on activations"
    origin = provenance(recipe).text
    text += "." if origin is None or not origin.described else f", from the text of <b>{escape(origin.described)}</b>."
    return f'<p class="eyebrow">Sparse dictionary report</p><h1>{escape(_place(found))}</h1><p class="lede">{text}</p>'


def _scores(found: Found) -> str:
    if found.evaluation is None:
        return _missing(f"This run has not been judged yet: sae eval {found.name}")
    text = provenance(found.seen.inputs[0].recipe).text
    vocabulary = None if text is None else text.n_vocab
    return scores_html(found.evaluation, found.sae.d_sae, vocabulary) + stores_html(found.evaluation)


def _density(found: Found) -> str:
    if found.density is None:
        return _missing(f"Not counted yet: sae eval {found.name}")
    return density_html(found.density, found.fired)


def _training(found: Found) -> str:
    if "imported" in found.config:
        return _missing("It was trained by another tool.")
    if not found.metrics:
        return _missing("No step has been logged yet.")
    series = {key: points for key in found.metrics[-1] if (points := _points(found.metrics, key))}
    terms = {k.removeprefix("loss_"): v for k, v in series.items() if k.startswith("loss_")}
    if list(terms.values()) != [series.get("loss")]:  # one term alone is the loss itself
        terms = {"total": series.get("loss", []), **terms}
    charts = _lines("Loss", {name: points for name, points in terms.items() if points}, "wide")
    charts += _lines("FVU of the training batch", {"FVU": series.get("fvu", [])}, "wide")
    charts += _lines("L0, active latents per token", {"L0": series.get("l0", [])})
    charts += _lines("Share of latents that are dead", {"dead": series.get("dead", [])})
    rates = {"lr": series.get("lr", []), "decoder's": series.get("lr_decoder", [])}
    charts += _lines("Learning rate", {name: points for name, points in rates.items() if points})
    known = {
        "step",
        "rows",
        "loss",
        "fvu",
        "l0",
        "dead",
        "lr",
        "lr_decoder",
        "seconds",
        "seconds_per_step",
        "megabytes",
    }
    for key in [k for k in series if k not in known and not k.startswith("loss_")]:
        charts += _lines(key, {key: series[key]})
    return f'<p>{_spent(found.metrics[-1])}</p><div class="charts">{charts}</div>'


def _spent(last: dict[str, Any]) -> str:
    text = f"{last['step']:,} steps" + (f", {last['rows']:,} rows" if last.get("rows") else "")
    if seconds := last.get("seconds"):
        text += f", {seconds / 60:,.1f} minutes"
    return f"{text}."


def _points(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, where it is a finite number."""
    pairs = [(line["step"], line.get(key)) for line in metrics]
    return [(float(step), float(v)) for step, v in pairs if isinstance(v, int | float) and math.isfinite(v)]


def _lines(title: str, lines: dict[str, list[tuple[float, float]]], size: str = "") -> str:
    series = [Series(name, points) for name, points in lines.items() if points]
    if not series:
        return ""
    keys = "".join(f'<span class="key s{i}">{escape(s.name)}</span>' for i, s in enumerate(series))
    width = 540 if size else 360
    drawn = line_chart(series, label=title, x_label="step", ratios=bool(size), width=width, height=240 if size else 200)
    return framed(title, drawn, size, keys if len(series) > 1 else "")


def _latents(found: Found) -> str:
    features = found.features
    if features is None:
        return _missing("Not looked up yet.")
    shades = "".join(f'<i class="a{level}"></i>' for level in range(1, LEVELS + 1))
    about = (
        f'<p class="about">{len(features.features)} of the {features.live:,} latents that fire on {features.rows:,} '
        f"{escape(features.split)} rows of <code>{escape(features.store)}</code>: the strongest, and a random draw "
        "across densities. Each line is a place in the text; the underlined token is the one that fired. Below a "
        "latent’s largest activations, one a document, are random ones from each quarter of its activation values: "
        "the best examples alone flatter a latent.</p>"
    )
    tools = (
        '<div class="tools"><label hidden>Filter <input type="search" id="search" placeholder="text or latent number">'
        '</label><label><input type="checkbox" id="wrap"> wrap contexts</label>'
        f'<span class="shades"><span>weak</span>{shades}<span>the latent’s maximum</span></span></div>'
        '<p class="missing" id="nothing" role="status" hidden></p>'
    )
    return about + tools + features_html(features)


def _settings(found: Found) -> str:
    asked, heading = found.config.get("train"), "Training"
    if asked is None:
        asked, heading = found.config["imported"], "Imported"
    others = {k: v for k, v in asked.items() if k != "sae"}
    sides = {"Dictionary": asked["sae"], heading: others, "Activations": found.config["activations"]}
    for title, name in (("Beside them", "beside"), ("Targets", "targets")):
        sides[title] = {str(i): one for i, one in enumerate(found.config.get(name, []), 1)}
    body = "".join(f"<div><h3>{title}</h3>{tree(values)}</div>" for title, values in sides.items() if values)
    raw = escape(json.dumps(found.config, indent=2, ensure_ascii=False))
    return (
        f'<div class="sides">{body}</div>'
        + f"<details><summary><code>{CONFIG}</code></summary><pre>{raw}</pre></details>"
    )


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
