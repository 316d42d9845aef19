"""A run folder -> one HTML file: what was trained, how well it does, and what its latents fire on.

The page needs nothing but itself: styles, charts and the little script are inside, and its content policy forbids any
request. It is a function of the run folder alone, so the same folder gives the same bytes. Parts that are not there yet
(a run that was not judged) are said to be missing, with the command that makes them.
"""

import base64
import hashlib
import json
import math
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cache.durable import write_atomic
from cache.errors import DamagedStore
from cache.runs import CONFIG, Run
from pipeline.charts import Series, histogram, ladder, line_chart, number
from pipeline.contexts import LEVELS, features_html, percent
from pipeline.examples import Features

EVALUATION, LATENTS, FEATURES = "eval/eval.json", "eval/latents.safetensors", "eval/features.json"
BINS_PER_DECADE = 6
MOST_ITEMS = 24  # of a list in the details; the JSON file has them all


class Found(NamedTuple):
    """What a run folder holds; None for what is not there yet."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    density: np.ndarray | None  # float64 [d_sae]: share of held-out rows a latent fires on
    fired: np.ndarray | None  # bool [d_sae]: whether it fires anywhere, training rows included
    features: Features | None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe of the activations."""
        return dict(self.config["activations"]["recipe"])

    @property
    def sae(self) -> dict[str, Any]:
        """The dictionary's settings."""
        return dict(self.config["train"]["sae"])


def write_report(run: Run, out: Path) -> Path:
    """Write the report of a run to `out`. Raises DamagedStore where a file of the run is not what was written."""
    write_atomic(out, page(read(run)).encode())
    return out


def read(run: Run) -> Found:
    """Everything the report shows."""
    evaluation = run.read_json(EVALUATION) if (run.path / EVALUATION).exists() else None
    density = fired = features = None
    if (path := run.path / LATENTS).exists():
        try:
            tensors = load_file(path)
            density, fired = tensors["density"].astype(np.float64), tensors.get("fired")
        except (SafetensorError, KeyError) as error:
            raise DamagedStore(f"{path}: is not what was written; run `sae eval {run.name}` again") from error
    if (run.path / FEATURES).exists():
        try:
            features = Features.model_validate(run.read_json(FEATURES))
        except ValidationError as error:
            raise DamagedStore(f"{run.path / FEATURES}: is not what was written; find the features again") from error
    return Found(run.name, run.config, run.metrics(), evaluation, density, fired, features)


def page(found: Found) -> str:
    """The whole page."""
    parts = [
        ("numbers", "How good it is", _numbers(found)),
        ("training", "Training", _training(found)),
        ("density", "How often latents fire", _density(found)),
        ("latents", "What latents fire on", _latents(found)),
        ("settings", "Settings", _settings(found)),
    ]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in parts)
    body = f"<header>{_heading(found)}<nav>{links}</nav></header><main>"
    body += "".join(f'<section class="part" id="{name}"><h2>{t}</h2>{html}</section>' for name, t, html in parts)
    body += f"</main><footer>Run <code>{escape(found.name)}</code>. Made by <code>sae report</code>.</footer>"
    resources = files("pipeline")
    script = resources.joinpath("report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(resources.joinpath("report.html").read_text("utf-8")).substitute(
        title=escape(f"{_place(found)} · {found.name}"),
        style=resources.joinpath("report.css").read_text("utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        body=body,
    )


def _place(found: Found) -> str:
    """Where in which model the dictionary sits; the store's name for rows that come from no model."""
    recipe = found.recipe
    if "model" not in recipe or "layer" not in recipe:
        return str(found.config["activations"]["key"])
    return f"{Path(str(recipe['model']['model'])).name} · layer {recipe['layer']} · {recipe['site']}"


def _heading(found: Found) -> str:
    sae, recipe = found.sae, found.recipe
    width = recipe.get("d")
    chosen = f" with k = {sae['k']}" if "k" in sae else ""
    wider = f", {number(sae['d_sae'] / width, 3)} for each of the {width:,} dimensions it reads" if width else ""
    text = f"A <b>{escape(str(sae['arch']))}</b> dictionary of <b>{sae['d_sae']:,} latents</b>{chosen}{wider}"
    if found.metrics:
        seen, there = found.metrics[-1]["rows"], found.config["activations"]["rows"]
        text += f", trained on {number(seen)} rows ({number(seen / there, 3)} passes over {number(there)})"
    source = recipe.get("tokens", {}).get("source", {})
    named = source.get("name") or source.get("source")
    text += f", from the text of <b>{escape(str(named))}</b>." if named else "."
    return f'<p class="eyebrow">Sparse dictionary report</p><h1>{escape(_place(found))}</h1><p class="lede">{text}</p>'


class Figure(NamedTuple):
    """A number of eval.json, its name, and what it means in one line."""

    key: str
    name: str
    meaning: str


FIGURES = (
    Figure("fvu", "FVU", "share of the variance the reconstruction misses: 0 is perfect, 1 no better than the mean"),
    Figure("explained_variance", "explained variance", "1 − FVU"),
    Figure("l0", "L0", "latents active on a token, on average"),
    Figure("dead_fraction", "dead latents", "share of latents that fired on none of the rows searched"),
    Figure("ce_clean", "CE, model as it is", "next-token cross-entropy in nats on held-out text"),
    Figure("ce_spliced", "CE, spliced", "the same with every activation at this site replaced by its reconstruction"),
    Figure("ce_mean", "CE, mean-ablated", "replaced by the mean activation of the training rows"),
    Figure("ce_zero", "CE, zero-ablated", "replaced by zero; so destructive that almost anything recovers most of it"),
    Figure("ce_recovered_mean", "CE recovered, of mean", "share of mean ablation’s damage that splicing avoids"),
    Figure("ce_recovered_zero", "CE recovered, of zero", "the same for zero ablation, the kinder yardstick"),
    Figure("kl", "KL", "divergence in nats of the spliced model's predictions from its own"),
    Figure("rows", "rows", "held-out activations the reconstruction was judged on"),
    Figure("tokens", "tokens", "held-out tokens the cross-entropies were taken over"),
)
SHARES = {"dead_fraction", "ce_recovered_mean", "ce_recovered_zero", "explained_variance"}


def _numbers(found: Found) -> str:
    values = found.evaluation
    if values is None:
        return _missing(f"This run has not been judged yet: sae eval {found.name}")
    cards = _card("Variance explained", values, "explained_variance", f"FVU {_shown(values, 'fvu')}")
    cards += _card("Active per token", values, "l0", f"L0, of {found.sae['d_sae']:,} latents")
    added = _difference(values, "ce_spliced", "ce_clean")
    cards += _card("Loss recovered", values, "ce_recovered_mean", f"against mean ablation; splicing adds {added}")
    cards += _card("Dead latents", values, "dead_fraction", _dead_window(values))
    rows = "".join(
        f'<tr><th scope="row">{f.name}</th><td class="n">{_shown(values, f.key)}</td><td>{f.meaning}</td></tr>'
        for f in FIGURES
        if f.key in values
    )
    details = values.get("details")
    more = f"<details><summary>Details of the evaluation</summary>{tree(details)}</details>" if details else ""
    about = "<p>Judged on documents the dictionary was never trained on.</p>"
    return f'{about}<div class="cards">{cards}</div>{_losses_chart(found, values)}<table>{rows}</table>{more}'


def _card(title: str, values: dict[str, Any], key: str, about: str) -> str:
    return f'<div class="card"><h3>{title}</h3><strong>{_shown(values, key)}</strong><p>{about}</p></div>'


def _dead_window(values: dict[str, Any]) -> str:
    rows = (values.get("details") or {}).get("dead_rows", values.get("rows"))
    return "never fired" if rows is None else f"never fired on {rows:,} rows"


def _shown(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        return '<span title="not defined here">–</span>'
    return percent(value) if key in SHARES else number(value)


def _difference(values: dict[str, Any], key: str, base: str) -> str:
    if values.get(key) is None or values.get(base) is None:
        return "–"
    return f"{values[key] - values[base]:+.3f} nats".replace("-", "−")


def _losses_chart(found: Found, values: dict[str, Any]) -> str:
    named = {"ce_clean": "as it is", "ce_spliced": "spliced", "ce_mean": "mean-ablated", "ce_zero": "zero-ablated"}
    there = {key: name for key, name in named.items() if values.get(key) is not None}
    if "ce_clean" not in there:
        return ""
    rungs = [(n, values[k], "" if k == "ce_clean" else _difference(values, k, "ce_clean")) for k, n in there.items()]
    vocabulary = found.recipe.get("tokens", {}).get("tokenizer", {}).get("n_vocab")
    reference = ("guessing uniformly", math.log(vocabulary)) if vocabulary else None
    chart = ladder(rungs, label="Cross-entropy in nats", reference=reference)
    return f'<div class="charts">{_chart("Cross-entropy of the next token, nats", chart, "full")}</div><br>'


def _training(found: Found) -> str:
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
    charts += _lines("Learning rate", {"lr": series.get("lr", [])})
    known = {"step", "rows", "loss", "fvu", "l0", "dead", "lr", "seconds"}
    for key in [k for k in series if k not in known and not k.startswith("loss_")]:
        charts += _lines(key, {key: series[key]})
    return f'<p>{_spent(found.metrics[-1])}</p><div class="charts">{charts}</div>'


def _spent(last: dict[str, Any]) -> str:
    text = f"{last['step']:,} steps, {last['rows']:,} rows"
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
    return _chart(title, drawn, size, keys if len(series) > 1 else "")


def _chart(title: str, drawn: str, size: str, keys: str = "") -> str:
    caption = f"<figcaption><b>{escape(title)}</b>{keys}<output></output></figcaption>"
    return f'<figure class="chart {size}">{caption}{drawn}</figure>'


def _density(found: Found) -> str:
    if found.density is None:
        return _missing(f"Not counted yet: sae eval {found.name}")
    density = found.density
    live = density[density > 0]
    about = (
        f"<p>Share of held-out rows on which each of {len(density):,} latents fires. "
        f"{len(density) - len(live):,} never do"
    )
    if found.fired is not None and (elsewhere := int((found.fired & (density == 0)).sum())):
        about += f" ({elsewhere:,} of them do on training rows)"
    about += f"; {int((density > 0.1).sum()):,} fire on more than 10 %"
    about += f"; the median live latent on {percent(float(np.median(live)))}.</p>" if len(live) else ".</p>"
    bins: list[tuple[float, float, int]] = []
    if len(live):
        decades = max(1, math.ceil(-math.log10(live.min())))
        edges = 10.0 ** (np.arange(decades * BINS_PER_DECADE + 1) / BINS_PER_DECADE - decades)
        counts = np.histogram(live, edges)[0]
        bins = [(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    drawn = histogram(bins, label="Latents by density", apart=("never", len(density) - len(live)))
    title = "Latents by share of rows they fire on"
    return f'{about}<div class="charts">{_chart(title, drawn, "full")}</div>'


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
    )
    return about + tools + features_html(features)


def _settings(found: Found) -> str:
    train = {k: v for k, v in found.config["train"].items() if k != "sae"}
    sides = {"Dictionary": found.sae, "Training": train, "Activations": found.config["activations"]}
    body = "".join(f"<div><h3>{title}</h3>{tree(values)}</div>" for title, values in sides.items())
    raw = escape(json.dumps(found.config, indent=2, ensure_ascii=False))
    return (
        f'<div class="sides">{body}</div>'
        + f"<details><summary><code>{CONFIG}</code></summary><pre>{raw}</pre></details>"
    )


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def tree(value: Any) -> str:
    """Any JSON as nested definition lists."""
    if isinstance(value, dict):
        items = "".join(f"<dt>{escape(str(key))}</dt><dd>{tree(inner)}</dd>" for key, inner in value.items())
        return f'<dl class="tree">{items}</dl>'
    if isinstance(value, list):
        shown = ", ".join(tree(item) for item in value[:MOST_ITEMS])
        return shown + (f", … {len(value) - MOST_ITEMS:,} more" if len(value) > MOST_ITEMS else "")
    if isinstance(value, float):
        return number(value)
    if isinstance(value, str):
        return escape(value)
    return f"{value:,}" if type(value) is int else "–" if value is None else json.dumps(value)
