"""Run folders -> one HTML file: what was trained, how well it does, and what its latents fire on.

The page needs nothing but itself: styles, data and scripts are inside, and its content policy forbids any request. It
is a function of the run folders alone, so the same folders give the same bytes. Parts that are not there yet (a run
that was not judged) are said to be missing, with the command that makes them.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import torch

from sae.cache.disk.durable import expect_no_link, write_atomic
from sae.cache.errors import DamagedStore
from sae.cache.provenance import LanguageModelRows, provenance
from sae.cache.runs import CONFIG, LATENTS, Run
from sae.cache.seen import Seen
from sae.pipeline.formats.trained import Described
from sae.pipeline.interpret.explanations import explanations
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.report.browser import Explained, browser_html
from sae.pipeline.report.compare import Row, compare
from sae.pipeline.report.curves import curves, curves_of_several, geometry_html, runs_html
from sae.pipeline.report.escaping import escape
from sae.pipeline.report.numbers import number
from sae.pipeline.report.scores import density_html, scores_html, tree
from sae.pipeline.report.stores import stores_html
from sae.pipeline.report.toys import DrawnToy, drawn_toy, toy_html

UPLOT = "1.6.32"  # the version in web/uplot, which is that of its npm package, unchanged
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
    statistics: Statistics | None = None
    explained: Explained | None = None
    toy: DrawnToy | None = None


def write_report(runs: Run | Sequence[Run], out: Path, *, first: Sequence[int] = ()) -> Path:
    """Write the report of a run, or of several side by side, to `out`; `first` are latents to show before others.

    Raises DamagedStore where a file of a run is not what was written.
    """
    runs = [runs] if isinstance(runs, Run) else runs
    expect_no_link(out.parent)
    write_atomic(out, page([read(run) for run in runs], compare(runs) if len(runs) > 1 else (), first).encode())
    return out


def read(run: Run) -> Found:
    """Read everything that the report shows."""
    sae = Described.of(run)
    density, fired = _densities(run, sae.d_sae)
    found = Found(run.name, run.config, run.seen, sae, run.metrics(), run.evaluation(), density, fired)
    said = explanations(run)
    known = {} if said is None else {one.feature: (one.explanation, one.score, one.control) for one in said.features}
    return found._replace(statistics=Statistics.read(run), explained=known, toy=drawn_toy(run))


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


def page(found: Sequence[Found], rows: Sequence[Row] = (), first: Sequence[int] = ()) -> str:
    """The whole page; `rows` are those of a comparison of several runs."""
    one = found[0]
    toys = [(f"The toy model{_of(found, each)}", toy_html(each.toy)) for each in found if each.toy is not None]
    parts = [
        *([("runs", "The runs", runs_html(rows))] if len(found) > 1 else []),
        ("numbers", "How good it is", _each(found, _scores)),
        ("training", "Training", _training(one) if len(found) == 1 else curves_of_several(found)),
        ("density", "How often latents fire", _each(found, _density)),
        ("geometry", "Decoder directions", geometry_html(found)),
        *([("toy", *toys[0])] if toys else [("latents", "What latents fire on", _latents(found, first))]),
        ("settings", "Settings", _each(found, _settings)),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in parts)
    body = f"<header>{_heading(one) if len(found) == 1 else _headings(found)}<nav>{links}</nav></header><main>"
    body += "".join(f'<section class="part" id="{name}"><h2>{escape(t)}</h2>{h}</section>' for name, t, h in parts)
    named = ", ".join(f"<code>{escape(each.name)}</code>" for each in found)
    body += f"</main><footer>Run{'s' * (len(found) > 1)} {named}. Made by <code>sae report</code>. "
    licence = escape(_web("uplot/LICENSE"))
    body += f"<details><summary>Charts: uPlot {UPLOT}</summary><pre>{licence}</pre></details></footer>"
    place = _place(one) if len(found) == 1 else f"{len(found)} runs"
    return whole(f"{place} · {', '.join(each.name for each in found)}", body)


def whole(title: str, body: str) -> str:
    """A page around a body: styles, scripts, and a policy that allows nothing else."""
    scripts = [_web("uplot/uPlot.iife.min.js"), "\n".join(map(_web, ("charts.js", "text.js", "browser.js")))]
    return Template(_web("page.html")).substitute(
        title=escape(title),
        style=_web("uplot/uPlot.min.css") + _web("page.css"),
        scripts="".join(f"<script>{script}</script>\n" for script in scripts),
        script_hashes=" ".join(f"'{_digest(script)}'" for script in scripts),
        body=body,
    )


def _web(name: str) -> str:
    """A file that goes into the page."""
    return files("sae.pipeline.report").joinpath("web", *name.split("/")).read_text("utf-8")


def _digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _each(found: Sequence[Found], part: Callable[[Found], str]) -> str:
    """A part of every run: the first in sight, the others to unfold."""
    if len(found) == 1:
        return part(found[0])
    return "".join(
        f'<details class="run"{" open" * (i == 0)}><summary>{escape(one.name)}</summary>{part(one)}</details>'
        for i, one in enumerate(found)
    )


def _of(found: Sequence[Found], one: Found) -> str:
    return f" of {one.name}" if len(found) > 1 else ""


def _headings(found: Sequence[Found]) -> str:
    places = list(dict.fromkeys(map(_place, found)))
    title = places[0] if len(places) == 1 else f"{len(places)} places"
    about = f"<b>{len(found)} dictionaries</b> side by side: {', '.join(escape(one.name) for one in found)}."
    return f'<p class="eyebrow">Sparse dictionary report</p><h1>{escape(title)}</h1><p class="lede">{about}</p>'


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
    return f"<p>{_spent(found.metrics[-1])}</p>{curves(found.metrics)}"


def _spent(last: dict[str, Any]) -> str:
    text = f"{last['step']:,} steps" + (f", {last['rows']:,} rows" if last.get("rows") else "")
    if seconds := last.get("seconds"):
        text += f", {seconds / 60:,.1f} minutes"
    return f"{text}."


def _latents(found: Sequence[Found], first: Sequence[int]) -> str:
    known = [(one.name, one.statistics, one.explained or {}, first) for one in found if one.statistics is not None]
    if not known:
        return _missing(f"Not looked up yet: sae report {found[0].name}")
    what = known[0][1]
    store = ", ".join(what.of.get("stores", []))
    about = (
        f'<p class="about">{len(what.live):,} of {what.d_sae:,} latents fire on {what.rows:,} '
        f"{escape(str(what.of.get('split', '')))} rows of <code>{escape(store)}</code>. Each line of a latent is a "
        "place in the text; the underlined token is the one that fired. Below the largest activations, one a document, "
        "are random ones from each quarter of its values: the best examples alone flatter a latent. "
        '<span class="keys">Keys: j and k, the arrows in the list, / to search.</span></p>'
    )
    return about + browser_html(known)


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
