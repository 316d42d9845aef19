"""An evaluation as HTML: the figures with a line on each, the cross-entropies, how often latents fire."""

import json
import math
from typing import Any

import numpy as np

from sae.pipeline.metrics.figures import completed, evaluation_table, figures, largest_norms
from sae.pipeline.report.charts import bars, histogram
from sae.pipeline.report.escaping import escape
from sae.pipeline.report.numbers import number, percent

BINS_PER_DECADE = 6
MOST_ITEMS = 24  # of a list in the details; the JSON file has them all


def scores_html(values: dict[str, Any], latents: int, vocabulary: int | None) -> str:
    """`eval.json` of a dictionary of so many latents, for a model of so many tokens. A null is shown as undefined."""
    values = completed(values)
    kept = values.get("kept")
    without = "" if kept is None else f"; {_shown(kept, 'fvu')} without rows that lie far out"
    cards = _card("Variance explained", values, "explained_variance", f"FVU {_shown(values, 'fvu')}{without}")
    of_text = vocabulary is not None
    cards += _card(f"Active per {'token' if of_text else 'row'}", values, "l0", f"L0, of {latents:,} latents")
    if "true_to_learned" in values:
        by_chance = f"mean cosine with the nearest direction; by chance {_shown(values, 'chance')}"
        cards += _card("True features found", values, "true_to_learned", by_chance)
    else:
        added = _signed(values.get("ce_degradation"))
        cards += _card("Loss recovered", values, "ce_recovered_mean", f"against mean ablation; splicing adds {added}")
    cards += _card("Dead latents", values, "dead_fraction", _dead_window(values))
    details = values.get("details")
    more = f"<details><summary>Details of the evaluation</summary>{tree(details)}</details>" if details else ""
    unseen = f"{'documents' if of_text else 'samples'} the dictionary was never trained on."
    about = f"<p>Judged on {_amount(values)}{unseen}{_about_kept(values)}</p>"
    return f'{about}<div class="cards">{cards}</div>{_losses(values, vocabulary)}{_table(values)}{more}'


def _amount(values: dict[str, Any]) -> str:
    """Say how much an evaluation was judged on, as a beginning of "documents ..."."""
    named = {"rows": "rows", "tokens": "predictions"}
    there = [f"{values[key]:,} {name}" for key, name in named.items() if values.get(key) is not None]
    return f"{' and '.join(there)} of " if there else ""


def _about_kept(values: dict[str, Any]) -> str:
    kept = values.get("kept")
    if kept is None:
        return ""
    return (
        f" Rows of a norm above {' and '.join(map(number, largest_norms(kept)))} lie far out: these figures are over "
        "all rows, those under “kept” in the table over the others."
    )


def _table(values: dict[str, Any]) -> str:
    """Every figure with what it means, and beside it that without rows that lie far out."""
    kept = values.get("kept")
    sides = [values] if kept is None else [values, kept]
    head = "" if kept is None else "<tr><th></th><th>all rows</th><th>kept</th><th></th></tr>"
    rows = "".join(
        f'<tr><th scope="row">{f.title}</th>'
        + "".join(f'<td class="n">{_shown(side, f.key)}</td>' for side in sides)
        + f"<td>{f.meaning}</td></tr>"
        for f in evaluation_table()
        if f.key in values
    )
    return f"<table>{head}{rows}</table>"


def _card(title: str, values: dict[str, Any], key: str, about: str) -> str:
    return f'<div class="card"><h3>{title}</h3><strong>{_shown(values, key)}</strong><p>{about}</p></div>'


def _dead_window(values: dict[str, Any]) -> str:
    rows = values.get("dead_rows", values.get("rows"))
    return "never fired" if rows is None else f"never fired on {rows:,} rows"


def _shown(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        return '<span title="not defined here">–</span>'
    return percent(value) if any(one.share for one in figures() if one.key == key) else number(value)


def _signed(nats: float | None) -> str:
    return "–" if nats is None else f"{nats:+.3f} nats".replace("-", "−")


def _losses(values: dict[str, Any], vocabulary: int | None) -> str:
    """The cross-entropies as bars, beside that of guessing every token alike."""
    named = {"ce_clean": "as it is", "ce_spliced": "spliced", "ce_mean": "mean-ablated", "ce_zero": "zero-ablated"}
    there = {key: name for key, name in named.items() if values.get(key) is not None}
    if "ce_clean" not in there:
        return ""
    clean = values["ce_clean"]
    told = [
        f"{values[k]:.3f}" + ("" if k == "ce_clean" else f" ({_signed(values[k] - clean).removesuffix(' nats')})")
        for k in there
    ]
    reference = [("guessing uniformly", math.log(vocabulary), "y")] if vocabulary else []
    title = "Cross-entropy of the next token, nats"
    chart = bars(
        title, [*there.values()], [values[k] for k in there], size="wide", ticks=[*enumerate(there.values())],
        told=told, references=reference,
    )  # fmt: skip
    return f'<div class="charts">{chart}</div><br>'


def density_html(density: np.ndarray, fired: np.ndarray | None) -> str:
    """Draw a histogram of firing rates: density float64 [d_sae], and bool [d_sae], which latents fired anywhere."""
    live = density[density > 0]
    about = (
        f"<p>Share of held-out rows on which each of {len(density):,} latents fires. "
        f"{len(density) - len(live):,} never do"
    )
    if fired is not None and (elsewhere := int((fired & (density == 0)).sum())):
        about += f" ({elsewhere:,} of them do on training rows)"
    about += f"; {int((density > 0.1).sum()):,} fire on more than 10 %"
    about += f"; the median live latent on {percent(float(np.median(live)))}.</p>" if len(live) else ".</p>"
    counts, edges = np.zeros(0, int), np.array([0.1, 1.0])
    if len(live):
        decades = max(1, math.ceil(-math.log10(live.min())))
        edges = 10.0 ** (np.arange(decades * BINS_PER_DECADE + 1) / BINS_PER_DECADE - decades)
        counts = np.histogram(live.clip(edges[0]), edges)[0]  # whose rounding may exceed the least
        filled = np.flatnonzero(counts)
        counts, edges = (
            counts[filled[0] : filled[-1] + 1],
            edges[filled[0] : filled[-1] + 2],
        )  # an axis of what there is
    drawn = histogram(
        "Latents by share of rows they fire on", counts.tolist(), edges.tolist(), size="full",
        never=len(density) - len(live),
    )  # fmt: skip
    return f'{about}<div class="charts">{drawn}</div>'


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
