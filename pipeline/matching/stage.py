"""Run folders -> how alike their dictionaries are, each pair of them, and what all of them have found.

Decoders are compared where they are directions in one space: of as wide a site, and of a transcoder with another one or
with an autoencoder of what it writes. When latents fire is compared on held-out rows of the cache that are of the same
tokens, whatever the sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import canonical
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import common_rows, expect_aligned
from sae.cache.runs import Run
from sae.cache.seen import SeenStore
from sae.pipeline.formats import trained
from sae.pipeline.interpret.survey import BATCH_ROWS, firings, judging
from sae.pipeline.matching.config import MatchConfig
from sae.pipeline.matching.pairs import SHARES, Firing, Matched, by_direction, by_firing
from sae.pipeline.matching.plots import draw
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime import devices
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.saes.dictionary import Dictionary
from sae.pipeline.studies.tables import Result

ELEMENTS = 1 << 26  # values of latents that are held at a time
LABELS, KEYS = ("a", "b"), ("mmcs", "hungarian")


@dataclass(frozen=True)
class Subject:
    """A finished run, its dictionary, and the cache's held-out rows of what it reads."""

    run: Run
    sae: Dictionary
    place: Workplace

    @property
    def _stores(self) -> Sequence[SeenStore]:
        return self.run.seen.targets or self.run.seen.inputs

    @property
    def written(self) -> list[tuple[str, Any]]:
        """What its decoder rows are directions of: model and point of every store that it writes, or whose rows."""
        recipes = [one.recipe for one in self._stores]
        return [(canonical(one.get("model", one)), (one.get("layer"), one.get("site"))) for one in recipes]

    @property
    def place_name(self) -> str:
        """That, for people."""
        each = zip(self._stores, self.written, strict=True)
        return " + ".join(f"{layer}.{site}" if site else store.key for store, (_, (layer, site)) in each)

    @cached_property
    def held_out(self) -> Dataset:
        dataset = trained.dataset_of(self.run, self.place.cache)
        trained.expect_fits(dataset, self.sae, self.run)
        return dataset.held_out(self.place.cache)

    @torch.no_grad()
    def values(self, rows: int) -> Any:
        """Its latents of the first held-out rows, [rows, d_sae], stored sparsely."""
        step, parts = max(1, min(BATCH_ROWS, ELEMENTS // self.sae.d_sae)), []
        self.place.progress.start(f"encode {self.run.name}", rows, "rows")
        try:
            for low in range(0, rows, step):
                high = min(low + step, rows)
                with judging(self.sae):
                    found = firings(self.sae, self.held_out.read(low, high).to(self.sae.W_dec.device))
                shape = (high - low, self.sae.d_sae)
                parts.append(sparse.csr_matrix((found.value, (found.row, found.latent)), shape=shape))
                self.place.progress.advance(high - low)
        finally:
            self.place.progress.finish()
        return sparse.vstack(parts)


def match(config: MatchConfig, runs: Sequence[Run], place: Workplace) -> Result:
    """Compare the dictionaries of finished runs, each with each.

    Raises SaeError, before anything is computed, where there are no two, one is there twice, or nothing of two of them
    can be compared.
    """
    subjects = _subjects(runs, place)
    every = [*combinations(range(len(subjects)), 2)]
    reasons = [said for a, b in every if (said := apart(subjects[a], subjects[b])) is not None]
    if reasons and not config.correlate:
        raise SaeError(f"{reasons[0]}; `correlate` compares when they fire")
    values = _values(config, subjects)
    alive = [np.asarray((one != 0).sum(0)).reshape(-1) > 0 for one in values] if config.living else None
    latents = [_latents(one, None if alive is None else alive[i]) for i, one in enumerate(subjects)]
    compared = _Compared(config, subjects, latents, values, list(dict.fromkeys(reasons)))
    return compared.result({pair: compared.pair(*pair) for pair in every})


def apart(a: Subject, b: Subject) -> str | None:
    """Why the decoders of two dictionaries lie in no common space; None where they can be compared."""
    widths = [one.sae.widths_out for one in (a, b)]
    if widths[0] != widths[1]:
        there, its = (" + ".join(map(str, one)) for one in widths)
        return f"{a.run.name} writes rows of {there} values, {b.run.name} of {its}, so their directions do not compare"
    if a.sae.is_transcoder != b.sae.is_transcoder and a.written != b.written:
        transcoder, other = (a, b) if a.sae.is_transcoder else (b, a)
        return (
            f"{transcoder.run.name} is a transcoder that writes {transcoder.place_name}, {other.run.name} an "
            f"autoencoder of {other.place_name}, so their directions do not compare"
        )
    return None


def _subjects(runs: Sequence[Run], place: Workplace) -> list[Subject]:
    if len(runs) < 2:
        raise SaeError(f"runs: {len(runs)} given; name two or more to compare")
    device = devices.resolve_device(place.device)
    found: list[Subject] = []
    for run in runs:
        for other in found:
            if other.run.path.resolve() == run.path.resolve():
                raise SaeError(f"{run.name}: is named twice, and is like itself; name another run")
            if other.run.name == run.name:
                raise SaeError(f"{run.path}: another run of that name is compared, too; rename one")
        found.append(Subject(run, trained.load_run(run).to(device), place))
    return found


def _values(config: MatchConfig, subjects: Sequence[Subject]) -> list[Any]:
    """The latents of every dictionary on as many held-out rows; none where those are not asked for.

    Raises SaeError for rows that are not of the same tokens, where that matters.
    """
    if not config.reads_rows:
        return []
    every = [one.held_out for one in subjects]
    there = min(one.n_rows for one in every)
    if config.correlate:
        stores: dict[str, ActivationStore] = {store.key: store for one in every for store in one.inputs}
        expect_aligned([*stores.values()])
        there = common_rows([*stores.values()])
    rows = there if config.rows == "all" else min(config.rows, there)
    if rows < 2:
        raise SaeError(f"match.rows = {config.rows}: that is {rows} held-out rows of {every[0].key}; take two or more")
    return [one.values(rows) for one in subjects]


def _latents(subject: Subject, alive: np.ndarray | None) -> Tensor:
    """int64 [n]: the latents that are compared: those that write something, and fire where that is asked for.

    Raises SaeError where there are none.
    """
    kept = subject.sae.W_dec.detach().any(1).cpu()
    kept = kept if alive is None else kept & torch.from_numpy(alive)
    if not kept.any():
        raise SaeError(f"{subject.run.name}: none of its {subject.sae.d_sae} latents is left to be compared")
    return kept.nonzero().view(-1)


class _Compared:
    """Dictionaries that are being compared: by direction where all of them can be, else by when they fire."""

    def __init__(
        self, config: MatchConfig, subjects: Sequence[Subject], latents: Sequence[Tensor], values: Sequence[Any],
        notes: list[str],
    ) -> None:  # fmt: skip
        self.config, self.subjects, self.latents, self.notes = config, subjects, latents, notes
        self.likeness = "correlation" if notes else "cosine"
        self.names = [one.run.name for one in subjects]
        self.firing: list[Firing] = []
        if config.correlate:
            self.firing = [Firing(one.tocsc()[:, kept.numpy()]) for one, kept in zip(values, latents, strict=True)]
        self.rows: list[Row] = []

    def pair(self, a: int, b: int) -> Matched:
        """Compare two of them: a row of the table, and how alike latents are."""
        names, latents = (self.names[a], self.names[b]), (self.latents[a], self.latents[b])
        one_to_one = max(map(len, latents)) <= self.config.hungarian
        if not one_to_one:
            self.notes.append(
                f"{names[0]} and {names[1]}: not matched one to one, which takes long for so many latents; "
                f"`match.hungarian = {max(map(len, latents))}` does"
            )
        figures: Row = {"latents_a": len(latents[0]), "latents_b": len(latents[1])}
        found: dict[str, Matched] = {}
        if apart(self.subjects[a], self.subjects[b]) is None:
            tables = [self.subjects[i].sae.W_dec.detach().float().cpu()[self.latents[i]] for i in (a, b)]
            found["cosine"] = by_direction(tables[0], tables[1], one_to_one=one_to_one)
            figures |= found["cosine"].figures
            if self.subjects[a].written != self.subjects[b].written:
                places = self.subjects[a].place_name, self.subjects[b].place_name
                self.notes.append(f"{names[0]} is of {places[0]}, {names[1]} of {places[1]}")
        if self.config.correlate:
            mine, its = self.firing[a], self.firing[b]
            found["correlation"] = by_firing(mine, its, one_to_one=one_to_one)
            figures |= found["correlation"].figures
            if "cosine" in found and (pairs := found["cosine"].pairs) is not None:
                both = torch.from_numpy(mine.alive)[pairs[0]] & torch.from_numpy(its.alive)[pairs[1]]
                agreed = mine.of_pairs(its, pairs)[both]
                figures["correlation_of_matched"] = agreed.mean().item() if len(agreed) else None
        self.rows.append({"run": " and ".join(names), "seed": None, **dict(zip(LABELS, names, strict=True)), **figures})
        return found[self.likeness]

    def result(self, found: dict[tuple[int, int], Matched]) -> Result:
        """All that was found, as studies give it."""
        columns = list(dict.fromkeys(key for row in self.rows for key in row if key not in ("run", "seed", *LABELS)))
        rows = [dict.fromkeys(columns) | row for row in self.rows]
        drawn_key = "mmcs" if self.likeness == "cosine" else "correlation"
        drawable = [key for key in (*KEYS, "correlation") if key in {*columns, *KEYS}]
        matrices = {key: _matrix(len(self.names), found, [row.get(key) for row in rows]) for key in drawable}
        stability = _stability(self.names, self.latents, found)
        extra: dict[str, Any] = {
            "settings": self.config.model_dump(mode="json"), "names": self.names, "likeness": self.likeness,
            **{key: _mean([row.get(key) for row in rows]) for key in KEYS}, "matrix": matrices,
            "adjacent": _adjacent(self.subjects, rows), "stability": stability,
        }  # fmt: skip
        if len(self.names) == 2 and (likeness := found[0, 1].likeness) is not None:
            first, second = (self.latents[i][its] for i, its in enumerate(found[0, 1].pairs or ()))
            extra["pairs"] = [
                {"a": a, "b": b, self.likeness: float(f"{value:.6g}")}
                for a, b, value in zip(first.tolist(), second.tolist(), likeness.tolist(), strict=True)
            ]
        least = {name: one["least"] for name, one in stability.items()}

        def drawn(_: list[Row], path: Path) -> None:
            draw(self.names, found, matrices[drawn_key], least, self.likeness, path)

        return Result("match", LABELS, tuple(columns), rows, drawn, list(dict.fromkeys(self.notes)), extra)


def _matrix(n: int, pairs: Iterable[tuple[int, int]], values: Sequence[float | None]) -> list[list[float | None]]:
    """A figure of every pair [n, n]; 1 of a dictionary with itself."""
    table: list[list[float | None]] = [[1.0] * n for _ in range(n)]
    for (a, b), value in zip(pairs, values, strict=True):
        table[a][b] = table[b][a] = value
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _stability(
    names: Sequence[str], latents: Sequence[Tensor], found: dict[tuple[int, int], Matched]
) -> dict[str, dict[str, Any]]:
    """For every run: how much its latents are like their best matches in all the others, at least.

    `mean`: over pairs and latents. `in_all_07`, `in_all_09`: the share of latents found again in every other run.
    `latents`, `least`: one by one, with the smallest of their likenesses.
    """
    told = {}
    for i, name in enumerate(names):
        each = torch.stack([one.ab if pair[0] == i else one.ba for pair, one in found.items() if i in pair])
        least = each.amin(0)
        shares = {f"in_all_{key}": (least > value).double().mean().item() for key, value in SHARES.items()}
        numbers = [float(f"{value:.6g}") for value in least.tolist()]
        told[name] = {"mean": each.mean().item(), **shares, "latents": latents[i].tolist(), "least": numbers}
    return told


def _adjacent(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[Row]:
    """The pairs of neighbours among the layers of one site of one model, from the first layer on."""
    at = {one.run.name: (*one.written[0], len(one.written)) for one in subjects}
    there = {(model, site, layer) for model, (layer, site), _ in at.values()}
    told = []
    for row in rows:
        (model, (layer, site), stores), other = at[row["a"]], at[row["b"]]
        low, high = sorted((layer, other[1][0])) if site and other[1][1] else (0, 0)
        alike = (model, site, stores) == (other[0], other[1][1], 1)
        if alike and low < high and not any((model, site, between) in there for between in range(low + 1, high)):
            told.append({"layers": [low, high], "site": site, **{key: row[key] for key in ("a", "b", *KEYS[:1])}})
    return sorted(told, key=lambda one: one["layers"])
