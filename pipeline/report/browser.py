"""What is known of latents as parts of a page, for the feature browser's script to unpack when they are looked at.

Everything is JSON under gzip under base64, in elements that no browser runs: text of strangers is only ever data. An
index holds what the list shows of all latents; each part holds PART latents in full.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sae.pipeline.interpret.contexts import QUARTERS
from sae.pipeline.interpret.examples import BINS_PER_OCTAVE, LOWEST_OCTAVE
from sae.pipeline.interpret.features import varied
from sae.pipeline.interpret.statistics import Statistics, short
from sae.pipeline.report.escaping import escape

PART = 128  # latents in a part
LISTED = 4  # tokens of a latent that the list shows
MOST_CONTEXTS = 1 << 17  # in a page: of more latents than that allows, each shows fewer
FEW = 4  # top contexts of a latent then, and one of each quarter

Explained = dict[int, tuple[str | None, float | None, float | None]]
"""Explanation, its score and that of another latent's, by latent."""


def browser_html(runs: Sequence[tuple[str, Statistics, Explained, Sequence[int]]]) -> str:
    """The browser of some runs' latents: each its name, what is known, explanations, and latents to show first."""
    options = "".join(f'<option value="{i}">{escape(name)}</option>' for i, (name, *_) in enumerate(runs))
    hidden = "" if len(runs) > 1 else " hidden"
    shades = "".join(f'<i class="a{level}"></i>' for level in range(1, 9))
    tools = (
        '<div class="tools"><input type="search" id="b-search" placeholder="token, word or number  ( / )" '
        'aria-label="Search latents"><label>sort by <select id="b-sort"></select></label>'
        '<label>fires <select id="b-filter"></select></label>'
        f'<label{hidden}>run <select id="b-run">{options}</select></label>'
        '<label><input type="checkbox" id="wrap"> wrap contexts</label>'
        '<span class="count" id="b-count" role="status"></span></div>'
    )
    panes = (
        '<div class="panes"><div id="b-list" role="listbox" tabindex="0" aria-label="Latents"><div class="rows"></div>'
        '</div><article id="b-detail"></article></div>'
        f'<p class="shades"><span>weak</span>{shades}<span>the latent’s maximum</span></p>'
    )
    data = "".join(_element(name, part) for i, run in enumerate(runs) for name, part in _parts(i, *run[1:]))
    return f'<div id="browser">{tools}{panes}<noscript><p>Latents need a script to be shown.</p></noscript></div>{data}'


def _element(name: str, content: Any) -> str:
    data = gzip.compress(json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), 6, mtime=0)
    return f'<script type="text/plain" id="{name}">{base64.b64encode(data).decode()}</script>'


def _parts(
    number: int, found: Statistics, explained: Explained, first: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any] | list[Any]]]:
    """The index of a run and its parts, with their names."""
    kept = _kept(found)
    asked = set(first)
    order = [*first, *(latent for latent in varied(found).tolist() if latent not in asked)]
    tokens = _rows(found.frequent.token, LISTED, found.frequent.times > 0)
    density, largest = ([short(value) for value in column.tolist()] for column in (found.density, found.max))
    none: list[list[int]] = [[] for _ in range(found.d_sae)]
    up = none if found.lens is None else _rows(found.lens.up, LISTED)
    yield (
        f"index-{number}",
        {
            "part": PART, "rows": found.rows, "begin": found.of["begin"], "order": order, "tokens": tokens, "up": up,
            "density": density, "max": largest,
            "near": [] if found.nearest is None else [short(value) for value in found.nearest.cosine[:, 0].tolist()],
            "said": {str(latent): list(one) for latent, one in explained.items()},
            "lowest": LOWEST_OCTAVE, "octave": BINS_PER_OCTAVE, **_words(found, kept),
            "bands": ["top", *(f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in QUARTERS)],
        },
    )  # fmt: skip
    for start in range(0, found.d_sae, PART):
        latents = range(start, min(start + PART, found.d_sae))
        yield f"part-{number}-{start // PART}", [_latent(found, latent, kept) for latent in latents]


def _kept(found: Statistics) -> np.ndarray:
    """bool [n]: the contexts that are in the page."""
    band, start = found.contexts.band, found.contexts.start
    if len(band) <= MOST_CONTEXTS:
        return np.ones(len(band), bool)
    key = np.repeat(np.arange(found.d_sae), np.diff(start)) * (len(QUARTERS) + 1) + band
    rank = np.arange(len(key)) - np.searchsorted(key, key)
    return np.asarray(rank < np.where(band == 0, FEW, 1))


def _rows(table: np.ndarray, most: int, there: np.ndarray | None = None) -> list[list[int]]:
    """The first entries of each row of [d_sae, n], those that are there."""
    if there is None:
        return table[:, :most].tolist()
    return [row[:n] for row, n in zip(table[:, :most].tolist(), there.sum(1).tolist(), strict=True)]


def _words(found: Statistics, kept: np.ndarray) -> dict[str, list[Any]]:
    """The bytes of every token that is mentioned, as latin-1."""
    c = found.contexts
    inside = np.arange(c.tokens.shape[1]) < c.length[kept, None]
    tables = [c.tokens[kept][inside], found.frequent.token, *([] if found.lens is None else found.lens[::2])]
    ids = np.unique(np.concatenate([table.reshape(-1).astype(np.int64) for table in tables]))
    return {"ids": ids.tolist(), "words": [found.text(token).decode("latin-1") for token in ids.tolist()]}


def _latent(found: Statistics, latent: int, kept: np.ndarray) -> dict[str, Any]:
    """A latent in full, by letters that the script knows."""
    counts = found.histogram[latent]
    filled = np.flatnonzero(counts)
    histogram = [] if not len(filled) else [int(filled[0]), *counts[filled[0] : filled[-1] + 1].tolist()]
    frequent = zip(found.frequent.token[latent].tolist(), found.frequent.times[latent].tolist(), strict=True)
    c = found.contexts
    shown = [i for i in range(int(c.start[latent]), int(c.start[latent + 1])) if kept[i]]
    return {
        "f": int(found.fired[latent]), "n": int(found.frequent.sampled[latent]), "h": histogram or None,
        "m": short(found.total[latent] / max(int(found.fired[latent]), 1)),
        "q": [[token, times] for token, times in frequent if times],
        "u": [[one.token, one.weight] for one in found.tokens_of(latent)],
        "v": [[one.token, one.weight] for one in found.tokens_of(latent, down=True)],
        "p": [[one.latent, one.jaccard, one.phi, one.error] for one in found.partners_of(latent)],
        "c": [[one.latent, one.cosine] for one in found.nearest_to(latent)],
        "t": [_context(found, i) for i in shown],
    }  # fmt: skip


def _context(found: Statistics, i: int) -> list[Any]:
    c, n = found.contexts, int(found.contexts.length[i])
    values = [None if value != value else float(f"{value:.3g}") for value in c.activations[i, :n].tolist()]
    around = [0 if value == 0 else value for value in values]
    head = [int(c.band[i]), float(f"{c.value[i]:.4g}"), int(c.peak[i]), int(c.position[i]), int(c.document[i])]
    return [*head, c.tokens[i, :n].tolist(), around]
