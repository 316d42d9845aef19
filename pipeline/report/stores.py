"""What a dictionary of several stores makes of each of them, as HTML: figures, and where its latents have decoders."""

import math
from typing import Any

from sae.pipeline.report.charts import histogram
from sae.pipeline.report.escaping import escape
from sae.pipeline.report.numbers import number


def stores_html(evaluation: dict[str, Any]) -> str:
    """A row a store, with a histogram of the latents' shares there; the triangle of decoders where there is one."""
    details = evaluation.get("details") or {}
    stores = details.get("stores")
    if not isinstance(stores, dict) or not all(isinstance(one, dict) for one in stores.values()):
        return ""
    alone = details.get("downstream_alone")
    head = "<th>store</th><th>FVU</th><th>CE added, alone</th><th>KL, alone</th><th></th>"
    rows = "".join(_row(name, one, _of(alone, name)) for name, one in stores.items())
    about = (
        "<p>Each store by itself: how well it is reconstructed, what that costs the model where no other is replaced, "
        "and what share of a latent\u2019s decoder norms, in units of each store\u2019s rows, is there: at the left "
        "latents that write nothing to it, at the right those that write to no other.</p>"
    )
    drawn = "".join(_shares(name, one.get("decoder_shares")) for name, one in stores.items())
    shares = f'<div class="charts">{drawn}</div>' if drawn else ""
    return f"<h3>By store</h3>{about}<table><tr>{head}</tr>{rows}</table>{shares}{_triangle(details, [*stores])}"


def _of(said: Any, key: str) -> Any:
    """What a mapping says under a key; None where it is no mapping, as of a file that is not ours."""
    return said.get(key) if isinstance(said, dict) else None


def _row(name: str, one: dict[str, Any], alone: Any) -> str:
    costs = [_of(_of(alone, key), "value") for key in ("degradation", "kl")]
    cells = "".join(f'<td class="n">{_shown(value)}</td>' for value in (one.get("fvu"), *costs))
    return f'<tr><th scope="row">{escape(name)}</th>{cells}<td></td></tr>'


def _shares(name: str, counts: Any) -> str:
    whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if not (whole and counts):
        return ""
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    return histogram(f"Latents by share of decoder norm at {name}", counts, edges, log=False)


def _triangle(details: dict[str, Any], names: list[str]) -> str:
    triangle = details.get("decoder_triangle")
    if not isinstance(triangle, list) or not all(isinstance(norms, list) for norms in triangle):
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f'<tr><th scope="row">layer {layer + 1} of latents</th>'
        + "".join(f'<td class="n">{_shown(norm)}</td>' for norm in norms)
        + "</tr>"
        for layer, norms in enumerate(triangle)
    )
    return f"<h3>Mean decoder norms, from layer to store</h3><table><tr><th></th>{head}</tr>{rows}</table>"


def _shown(value: Any) -> str:
    return number(value, 3) if type(value) in (int, float) and math.isfinite(value) else "\u2013"
