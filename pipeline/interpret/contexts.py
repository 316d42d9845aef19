"""The second pass: the text around the firings that a survey kept, of all latents at once, and their values on it.

Chosen are a latent's strongest firings, one a document, and random ones of its sample from each quarter of its values,
of documents that are not shown yet. Memory is about 28 bytes for each token of a context, so 13 kB a latent for the
defaults (320 MB for 24,576 latents), whatever the number of rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.cache.device import landing
from sae.cache.errors import DamagedStore
from sae.cache.loader.dataset import Dataset
from sae.cache.store.codecs import Encoded
from sae.cache.tokens import TokenStore
from sae.pipeline.interpret.best import first_of_run, rank_in_run
from sae.pipeline.interpret.survey import BATCH_ROWS, Dictionary, Survey
from sae.pipeline.runtime.progress import Progress
from sae.pipeline.saes import Latents

QUARTERS = ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
"""The bands of a latent's values, by quantiles; band 0 of contexts are the strongest, band i is of quarter i - 1."""


class Contexts(NamedTuple):
    """Firings worth showing, and the tokens around each: n of all latents, those of latent j at start[j]:start[j + 1].

    A latent's come by band, strongest first. start int64 [d_sae + 1]; band int8, value float32, position and document
    int64, peak (the place of the token that fired among the tokens) and length (tokens there are) int32, all [n];
    tokens [n, width], of a type that holds the vocabulary, and activations float32 [n, width], the latent's value on
    each token, NaN where the token has no row. Width is 0 where rows come from no text.
    """

    start: np.ndarray
    band: np.ndarray
    value: np.ndarray
    position: np.ndarray
    document: np.ndarray
    peak: np.ndarray
    length: np.ndarray
    tokens: np.ndarray
    activations: np.ndarray


class Words(NamedTuple):
    """Tokens around some positions: [n, width], and how many of each are real and which is the position's own, [n]."""

    tokens: np.ndarray
    length: np.ndarray
    peak: np.ndarray


def chosen(seen: Survey, weaker: int) -> Contexts:
    """The firings to show, `weaker` of each quarter; the text is not there yet."""
    tops, samples = seen.top.entries(), seen.sample.entries()
    columns = [np.concatenate(pair) for pair in zip(tops, samples, strict=True)]
    latent, score, value, position, document = columns
    band = np.concatenate([np.zeros(len(tops[0]), np.int64), _quarters(samples) + 1])
    # one context a document: the strongest, then the one that the draw, which is random, put first
    order = np.lexsort((-score, band > 0, document, latent))
    order = order[first_of_run(latent[order], document[order])]
    order = order[np.lexsort((-score[order], band[order], latent[order]))]
    rank = rank_in_run(latent[order], band[order])
    order = order[(band[order] == 0) | (rank < weaker)]
    order = order[np.lexsort((position[order], -np.abs(value[order]), band[order], latent[order]))]
    start = np.searchsorted(latent[order], np.arange(seen.d_sae + 1))
    nothing, none = np.zeros(len(order), np.int32), np.zeros((len(order), 0), np.float32)
    parts = band[order].astype(np.int8), value[order], position[order], document[order]
    return Contexts(start, *parts, nothing, nothing.copy(), none.astype(np.uint16), none)


def _quarters(samples: tuple[np.ndarray, ...]) -> np.ndarray:
    """int64 [n]: which of QUARTERS each firing of a sample is in, by its rank among those of its latent."""
    latent, _, value, position, _ = samples
    order = np.lexsort((position, np.abs(value), latent))
    rank, size = rank_in_run(latent[order]), np.bincount(latent)[latent[order]] if len(latent) else latent
    found = np.empty(len(latent), np.int64)
    edges = np.array([low for low, _ in QUARTERS])  # descending
    lowest = np.floor(edges[:, None] * size)
    found[order] = (rank < lowest).sum(0)
    return found


def words(tokens: TokenStore, position: np.ndarray, before: int, after: int) -> Words:
    """The tokens around positions [n], within their contexts; reads each chunk of the token store at most once."""
    length = tokens.context_length
    context, place = np.divmod(position, length)
    width = before + after + 1
    first = np.maximum(0, place - before)
    stop = np.zeros(len(position), np.int64)
    found = np.zeros((len(position), width), np.uint16 if tokens.n_vocab <= 1 << 16 else np.uint32)
    chunk = context // tokens.arrays["tokens"].chunk_rows
    order = np.argsort(chunk, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(chunk[order])) + 1):
        if not len(part):
            continue
        low, high = int(context[part].min()), int(context[part].max()) + 1
        text, real = tokens.contexts(low, high), tokens.lengths(low, high)
        inside = context[part] - low
        stop[part] = np.minimum(real[inside], place[part] + after + 1)
        within = np.minimum(first[part, None] + np.arange(width), length - 1)
        found[part] = text[inside[:, None], within]
    if (beyond := np.flatnonzero(place >= stop)).size:
        at = beyond[0]
        raise DamagedStore(
            f"{tokens.path}: context {context[at]} ends before token {place[at]}, of which there is a row"
        )
    found[np.arange(width) >= (stop - first)[:, None]] = 0
    return Words(found, (stop - first).astype(np.int32), (place - first).astype(np.int32))


def with_text(
    found: Contexts, sae: Dictionary, dataset: Dataset, tokens: TokenStore, around: tuple[int, int],
    progress: Progress, device: torch.device,
) -> Contexts:  # fmt: skip
    """The same with the tokens `around` (before, after), and the latents' values on them."""
    text = words(tokens, found.position, *around)
    width = text.tokens.shape[1]
    latent = np.repeat(np.arange(len(found.start) - 1), np.diff(found.start))
    there = np.arange(width) < text.length[:, None]
    place = (found.position - text.peak)[:, None] + np.arange(width)
    slots = np.flatnonzero(there)
    flat = np.full(there.size, np.nan, np.float32)
    flat[slots] = _values(
        sae, dataset, place.reshape(-1)[slots], np.repeat(latent, width)[slots], progress, device
    )  # fmt: skip
    values = flat.reshape(there.shape)
    values[np.arange(len(latent)), text.peak] = found.value  # as ranked: another batch shape may round it otherwise
    return found._replace(tokens=text.tokens, length=text.length, peak=text.peak, activations=values)


def _values(
    sae: Dictionary, dataset: Dataset, place: np.ndarray, latent: np.ndarray, progress: Progress, device: torch.device
) -> np.ndarray:
    """float32 [n]: the value of a latent on a token, for pairs [n] of them; NaN where the token has no row.

    Reads every window's positions, but decodes and encodes only the rows it needs. The device is asked at the end.
    """
    store = dataset.inputs[0]
    order = np.argsort(place, kind="stable")
    wanted = place[order]
    values = np.full(len(place), np.nan, np.float32)
    found: list[Tensor] = []
    pairs: list[np.ndarray] = []
    windows = [window for window in store.manifest.windows if window.start < dataset.n_rows]
    progress.start("features: reading contexts", len(windows), "windows")
    try:
        for window in windows:
            stop = min(window.stop, dataset.n_rows)
            pair, row = _meeting(wanted, store.positions(window.start, stop))
            if (kept := dataset.kept(window.start, stop)) is not None:
                pair, row = pair[kept[row]], row[kept[row]]
            by_row = np.argsort(row, kind="stable")
            pair, row = order[pair[by_row]], row[by_row] + window.start
            for part in _batches(row, store.chunk_rows):
                rows, which = np.unique(row[part], return_inverse=True)
                codes = sae.encode(landing.moved(_gather(dataset, rows), device))
                asked = landing.moved(torch.from_numpy(np.stack([which, latent[pair[part]]])), device)
                found.append(_looked_up(codes, *asked))
                pairs.append(pair[part])
            progress.advance(1)
    finally:
        progress.finish()
    if found:
        values[np.concatenate(pairs)] = (torch.cat(found) + 0.0).cpu().numpy()  # no zero has a sign
    return values


def _meeting(wanted: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of ascending places [n] those that positions [rows] name: which of them, and which row."""
    low, high = np.searchsorted(wanted, (position.min(), position.max() + 1))
    order = np.argsort(position, kind="stable")
    at = np.searchsorted(position, wanted[low:high], sorter=order)
    row = order[np.minimum(at, len(order) - 1)]
    there = position[row] == wanted[low:high]
    return low + np.flatnonzero(there), row[there]


def _batches(row: np.ndarray, chunk_rows: int) -> list[slice]:
    """Slices of ascending rows [n], each of rows of one chunk, of which no more than BATCH_ROWS are different."""
    if not len(row):
        return []
    starts = first_of_run(row)
    number = np.cumsum(starts) - 1
    chunk = row // chunk_rows
    first_number = number[np.searchsorted(chunk, chunk)]
    edges = np.flatnonzero(first_of_run(chunk, (number - first_number) // BATCH_ROWS))
    return [slice(int(a), int(b)) for a, b in zip(edges, [*edges[1:], len(row)], strict=True)]


def _looked_up(codes: Latents, row: Tensor, latent: Tensor) -> Tensor:
    """float32 [n]: the values of latents in rows, 0 where they do not fire. A device is not waited for."""
    if codes.entries is None:
        return codes.values[row, latent].float()
    keys, order = (codes.entries.row_ids * codes.d_sae + codes.entries.indices).sort()
    asked = row * codes.d_sae + latent
    if not len(keys):
        return asked.new_zeros(len(asked), dtype=torch.float32)
    at = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    return torch.where(keys[at] == asked, codes.values.reshape(-1)[order[at]].float(), 0.0)


def _gather(dataset: Dataset, rows: np.ndarray) -> torch.Tensor:
    """Rows of one chunk of the first store, decoded: float32 [n, d_in]."""
    store, *others = dataset.inputs
    if others:  # whose chunks may be of other sizes
        return dataset.read(int(rows[0]), int(rows[-1]) + 1)[torch.from_numpy(rows - rows[0])]
    chunk = int(rows[0]) // store.chunk_rows
    encoded = store.encoded_chunk(chunk)
    inside = torch.from_numpy(rows - chunk * store.chunk_rows)
    scale = None if encoded.row_scale is None else encoded.row_scale[inside]
    return store.decoded(Encoded(encoded.rows[inside], scale))
