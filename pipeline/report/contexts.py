"""Latents and the text they fire on, as HTML. Token text is untrusted: all of it is escaped.

A context is one line, the token that fired in the same column in every line (a concordance), shaded by how strongly the
latent fires, as a share of its largest activation. Where it fires with a negative sign, the token is underlined.
"""

import codecs
import math
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

from sae.pipeline.interpret.examples import Example, Feature, Features
from sae.pipeline.report.charts import number, percent, sparkline, steady, superscript
from sae.pipeline.report.escaping import escape

LEVELS = 8  # shades; classes a1 ... a8 of the style sheet
SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
DENSITIES = (1.0, 0.1, 0.01, 0.001, 0.0)


def features_html(found: Features) -> str:
    """All latents in their groups, as sections."""
    return "".join(
        f'<section class="group"><h3>{escape(title)} <span>{len(members)}</span></h3>'
        + "".join(feature_html(feature, found) for feature in members)
        + "</section>"
        for title, members in _groups(found.features)
        if members
    )


def _groups(features: Sequence[Feature]) -> Iterator[tuple[str, list[Feature]]]:
    yield "Asked for", [f for f in features if f.group == "asked"]
    yield "Strongest activations", [f for f in features if f.group == "strongest"]
    for high, low in pairwise(DENSITIES):
        members = [f for f in features if f.group == "sampled" and low < f.density <= high]
        if high == 1.0:
            title = f"More than {100 * low:g} % of rows"
        else:
            title = f"{100 * low:g} to {100 * high:g} % of rows" if low else f"Less than {100 * high:g} % of rows"
        yield title, members


def feature_html(feature: Feature, found: Features) -> str:
    """One latent: its figures beside its contexts."""
    lines = _lines("top", "its largest activations, one a document", feature.top, feature, found)
    for band in feature.bands:
        name = f"{100 * band.low:.0f}–{100 * band.high:.0f} %"
        lines += _lines(
            name, "drawn at random between these quantiles of its activations", band.examples, feature, found
        )
    anchor = f"latent-{feature.latent}"
    return (
        f'<article class="feature" id="{anchor}"><header>'
        f'<h4><a href="#{anchor}">{feature.latent:,}</a></h4>{_figures(feature)}{_frequent(feature, found)}</header>'
        f'<div class="contexts">{lines or "<p>It never fired on these rows.</p>"}</div></article>'
    )


def _figures(feature: Feature) -> str:
    rows = f"{feature.fired:,} rows"
    body = f"<dt>fires on</dt><dd>{percent(feature.density)} <small>{rows}</small></dd>"
    body += f"<dt>max</dt><dd>{number(feature.max)}</dd><dt>mean</dt><dd>{number(feature.mean)}</dd>"
    drawn = ""
    if feature.histogram:
        low, high = feature.histogram[0].low, min(feature.histogram[-1].high, feature.max)
        label = f"activations from {number(low, 2)} to {number(high, 2)}, logarithmic bins"
        bars = sparkline([b.count for b in feature.histogram], label)
        drawn = f'<figure class="spark" title="{label}">{bars}<figcaption><span>{number(low, 2)}</span>'
        drawn += f"<span>{number(high, 2)}</span></figcaption></figure>"
    return f"<dl>{body}</dl>{drawn}"


def _frequent(feature: Feature, found: Features) -> str:
    """The tokens it fires on most, from the random sample."""
    if not feature.frequent:
        return ""
    title = f"tokens under {feature.sampled} firings drawn at random"
    items = "".join(
        f"<li><code>{''.join(pieces([found.bytes_of(t.token)]))}</code> {100 * t.count / feature.sampled:.0f} %</li>"
        for t in feature.frequent
    )
    return f'<ul class="frequent" title="{title}">{items}</ul>'


def _lines(name: str, title: str, examples: Sequence[Example], feature: Feature, found: Features) -> str:
    if not examples:
        return ""
    body = "".join(f"<li>{context_html(example, feature.max, found)}</li>" for example in examples)
    return f'<div class="band"><h5 title="{title}">{name}</h5><ol>{body}</ol></div>'


def context_html(example: Example, largest: float, found: Features) -> str:
    """One context: the activation, what comes before, the token that fired, what comes after."""
    texts = pieces([found.bytes_of(token) for token in example.tokens])
    shaded = [
        _token(text, value, largest, "peak" if i == example.peak else "", token == found.begin)
        for i, (token, text, value) in enumerate(zip(example.tokens, texts, example.activations, strict=True))
    ]
    before, peak, after = shaded[: example.peak], shaded[example.peak], shaded[example.peak + 1 :]
    return (
        f'<span class="v">{steady(example.value)}</span>'
        f'<p><span class="l"><span>{"".join(before)}</span></span><span class="r">{peak}{"".join(after)}</span></p>'
    )


def _token(text: str, value: float | None, largest: float, extra: str, begins: bool) -> str:
    """A token's HTML: marked where the latent fires, faint where it is a begin token or was never looked at."""
    if value and largest > 0:
        level = min(LEVELS, max(1, math.ceil(LEVELS * abs(value) / largest)))
        kind = " ".join([f"a{level}", *(["minus"] if value < 0 else []), *([extra] if extra else [])])
        return f'<mark class="{kind}" title="{number(value)}">{text}</mark>'
    if extra:
        return f'<mark class="{extra}">{text}</mark>'
    if begins:
        return f'<i class="begin" title="begin token">{text}</i>'
    return f'<i class="unseen" title="not in the cache">{text}</i>' if value is None else text


def pieces(tokens: Sequence[bytes]) -> list[str]:
    """Each token as HTML text.

    A character split over tokens stands where it is complete; bytes before that, and bytes that are no text, are shown
    as hexadecimal digits. Line ends, tabs, runs of blanks and invisible characters become faint signs.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    last = len(tokens) - 1
    texts = [decoder.decode(token, final=i == last) for i, token in enumerate(tokens)]
    return [_visible(text) if text else _hex(token) for text, token in zip(texts, tokens, strict=True)]


def _visible(text: str) -> str:
    out = []
    at = 0
    while at < len(text):
        run = len(text[at:]) - len(text[at:].lstrip(" "))
        if run > 1:  # indentation is as wide as code is deep: its width is told, not drawn
            out.append("<s>··</s>" if run == 2 else f"<s>·{superscript(run)}</s>")
        elif text[at] in SIGNS:
            out.append(f"<s>{SIGNS[text[at]]}</s>")
        elif 0xDC80 <= ord(text[at]) <= 0xDCFF:
            out.append(_hex(bytes([ord(text[at]) - 0xDC00])))
        elif unicodedata.category(text[at]) in ("Cc", "Cf", "Zl", "Zp", "Cn", "Co"):
            out.append(f"<b>U+{ord(text[at]):04X}</b>")  # would be invisible, or turn the line's direction
        else:
            out.append(escape(text[at]))
        at += max(run, 1)
    return "".join(out)


def _hex(data: bytes) -> str:
    return f"<b>{data.hex(' ')}</b>" if data else "<b>∅</b>"
