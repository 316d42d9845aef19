"""Run folders + labelled texts -> how well k latents tell the labels, beside what the activations themselves tell.

Latents are chosen and regressions fitted on the training texts of a split, and scored on its test texts; texts that are
the same tokens to the model are taken once, so that none is on both sides. What was found of a run on a set lies in its
folder (`probing/`), and is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sae.cache.disk.durable import expect_no_link, expect_writable, make_folder
from sae.cache.disk.identity import Recipe, canonical, key
from sae.cache.disk.parsing import as_written
from sae.cache.errors import SaeError
from sae.cache.points import point_of
from sae.cache.runs import Run
from sae.pipeline.evaluate.stage import expect_one_model
from sae.pipeline.formats import trained
from sae.pipeline.language_model import Point
from sae.pipeline.probing.config import ProbeConfig
from sae.pipeline.probing.labelled import Labelled, TextSet
from sae.pipeline.probing.pooling import Points, Read, Reader
from sae.pipeline.probing.probes import (
    Fitting,
    Scores,
    aurocs,
    expect_scikit_learn,
    fired,
    largest,
    mean_differences,
    split_of,
)
from sae.pipeline.probing.tables import ACTIVATIONS, BEST, LABELS, LATENTS, MAJORITY, RANDOM, result_of
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime.workplace import Workplace
from sae.pipeline.saes.contract import LatentCoder
from sae.pipeline.studies.tables import Result

FOLDER = "probing"
PROTOCOL = 1  # of what the figures mean: others are computed anew


class Subject(NamedTuple):
    """A finished run, what it trained, where in which model it reads; `site` is how that place is called in a table."""

    run: Run
    coder: LatentCoder
    reader: Reader
    points: Points
    site: str

    def rows(self, scores: Sequence[Row]) -> list[Row]:
        """What was found of it as rows of a table: named by the run or, of what no latent decides, by the site."""
        names = [self.site if row["probe"] in (ACTIVATIONS, MAJORITY) else self.run.name for row in scores]
        return [{"run": name, "dictionary": name, **row} for name, row in zip(names, scores, strict=True)]


@dataclass(frozen=True)
class Probed:
    """What was found of a run on a set: a row a probe and split, the latents that were chosen, what to know of it."""

    rows: list[Row]
    chosen: dict[str, Any]
    notes: list[str]


def probe(
    config: ProbeConfig, runs: Sequence[Run], sets: Sequence[TextSet | Labelled], place: Workplace, *,
    model: str | None = None, tokenizer: str | None = None, leave_out_numbers: bool = False,
) -> Result:  # fmt: skip
    """Probe the latents of finished runs on every set. leave_out_numbers: sets of too many labels are passed over.

    Raises SaeError for runs without latents or whose rows come from no language model, and for sets that say nothing.
    """
    expect_scikit_learn()
    subjects = subjects_of(runs, place, model, tokenizer)
    for subject in subjects:
        if max(config.ks) > subject.coder.d_sae:
            raise SaeError(f"ks = {max(config.ks)}: {subject.run.name} has {subject.coder.d_sae} latents; name fewer")
        make_folder(subject.run.path / FOLDER)
    rows: dict[tuple[Any, ...], Row] = {}  # those of a site once, however many runs read it
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    for one in sets:
        texts = one if isinstance(one, Labelled) else one.read()
        if leave_out_numbers and len(texts.classes) > config.classes:
            notes.append(f"{texts.name}: left out, its {len(texts.classes):,} labels are numbers")
            continue
        texts.expect_classes(config.classes)
        for subject, found in zip(subjects, _of_set(config, subjects, texts), strict=True):
            for row in subject.rows(found.rows):
                rows.setdefault(tuple(row[name] for name in (*LABELS, "seed")), row)
            chosen.setdefault(subject.run.name, {})[texts.name] = found.chosen
            notes += [note for note in found.notes if note not in notes]
    if not rows:
        raise SaeError("sets: none of them has classes; name some that have, or allow more with `probe.classes`")
    return result_of([*rows.values()], config, chosen, notes)


def subjects_of(runs: Sequence[Run], place: Workplace, model: str | None, tokenizer: str | None) -> list[Subject]:
    """What is probed, runs of one model with one reader. Raises SaeError where a run is there twice."""
    found: list[Subject] = []
    readers: dict[str, Reader] = {}
    sites: dict[str, tuple[str, Points]] = {}
    for run in runs:
        if any(one.run.path == run.path for one in found):
            raise SaeError(f"{run.name}: is named twice; name each run once")
        if any(one.run.name == run.name for one in found):
            raise SaeError(f"{run.path}: another run of that name is probed, too; rename one")
        coder = trained.load_latents(run)
        dataset = trained.dataset_of(run, place.cache)
        trained.expect_fits(dataset, coder, run)
        expect_one_model(dataset.inputs)
        reader = Reader.of(
            dataset.inputs[0], place.cache, place.progress, model, tokenizer, place.device, place.offline
        )
        points = tuple(Point(*where) for store in dataset.inputs if (where := point_of(store)) is not None)
        site = f"{reader.source.model} " + " + ".join(f"{layer}.{name}" for layer, name in points)
        if sites.setdefault(site, (reader.key, points)) != (reader.key, points):
            site = key(site, {"reader": reader.key})  # of another model, or text, under the same name
        found.append(Subject(run, coder, readers.setdefault(reader.key, reader), points, site))
    return found


def _of_set(config: ProbeConfig, subjects: Sequence[Subject], texts: Labelled) -> list[Probed]:
    """What there is to say of every subject on a set, computing what is missing."""
    recipes = {one.run.name: _recipe(config, one, texts) for one in subjects}
    found = {one.run.name: _kept(one.run, texts.name, recipes[one.run.name]) for one in subjects}
    for reader in dict.fromkeys(id(one.reader) for one in subjects):
        missing = [one for one in subjects if id(one.reader) == reader and found[one.run.name] is None]
        for one, probed in zip(missing, _probed(config, missing, texts) if missing else (), strict=True):
            found[one.run.name] = probed
            content = {"recipe": recipes[one.run.name], **vars(probed)}
            one.run.write_json(_file(texts.name, recipes[one.run.name]), content)
    return [probed for probed in found.values() if probed is not None]


def _recipe(config: ProbeConfig, subject: Subject, texts: Labelled) -> Recipe:
    """Everything that the figures depend on, but for the weights of the run."""
    said = config.model_dump(mode="json", exclude={"text_column", "label_column", "classes", "batch_tokens"})
    return {
        "protocol": PROTOCOL, "set": texts.name, "texts": texts.digest, "points": [list(one) for one in subject.points],
        "reader": subject.reader.key, "settings": said,
    }  # fmt: skip


def _file(name: str, recipe: Recipe) -> str:
    return f"{FOLDER}/{key(name, recipe)}.json"


def _kept(run: Run, name: str, recipe: Recipe) -> Probed | None:
    """What an earlier call found; None where there is none of this recipe."""
    file = _file(name, recipe)
    expect_no_link(run.path, file)
    if not (run.path / file).exists():
        expect_writable(run.path / file)
        return None
    said = run.read_json(file)
    with as_written(run.path / file):
        if lacks := {"recipe", "rows", "chosen", "notes"} - said.keys():
            raise ValueError(f"{min(lacks)} is missing")
    same = canonical(said["recipe"]) == canonical(recipe)
    return Probed(said["rows"], said["chosen"], said["notes"]) if same else None


def _probed(config: ProbeConfig, subjects: Sequence[Subject], texts: Labelled) -> list[Probed]:
    """Subjects of one reader on a set: one pass, and then the probes of every split."""
    reader = subjects[0].reader
    taken, labels, notes = _drawn(config, reader, texts)
    coders = [(one.points, one.coder.to(reader.model.device)) for one in subjects]
    pooled = reader.pooled(taken, coders, config.batch_tokens, f"probe {texts.name}")
    splits = [Fitting(labels, split_of(labels, config.test, seed)) for seed in range(config.splits)]
    names = texts.classes
    asked = names[1:] if len(names) == 2 else names
    common = {"set": texts.name, "texts": len(labels), "classes": len(names)}
    of_site: dict[Points, list[Row]] = {}
    found = []
    for subject, latents in zip(subjects, pooled.latents, strict=True):
        rows, chosen = [], []
        for seed, fitting in enumerate(splits):
            scores, picked = of_latents(config, fitting, latents, seed)
            rows += _rows(scores, {**common, "seed": seed})
            chosen.append(dict(zip(asked, picked, strict=True)))
        if subject.points not in of_site:
            scored = [of_activations(config, fitting, pooled.activations[subject.points]) for fitting in splits]
            of_site[subject.points] = [
                row for seed, one in enumerate(scored) for row in _rows(one, {**common, "seed": seed})
            ]
        found.append(Probed([*rows, *of_site[subject.points]], {"splits": chosen}, notes))
    if late := sum(one.unconverged for one in splits):
        notes.append(f"{texts.name}: {late} of {sum(one.fits for one in splits)} regressions did not settle")
    return found


def _rows(scores: dict[tuple[str, int | str], Scores], common: Row) -> list[Row]:
    return [{"probe": name, "k": k, **common, **one} for (name, k), one in scores.items()]


def _drawn(config: ProbeConfig, reader: Reader, texts: Labelled) -> tuple[list[Read], np.ndarray, list[str]]:
    """The texts that are read, the number of each one's class, and what to know of them."""
    total, most = len(texts.texts), len(texts.texts) if config.texts == "all" else config.texts
    order = np.random.default_rng(0).permutation(total) if total > most else np.arange(total)
    seen: dict[bytes, int] = {}
    read: dict[int, Read] = {}
    looked = cut = empty = 0
    while looked < total and len(read) < most:
        part = order[looked : looked + most - len(read)].tolist()
        found, longer = reader.read([texts.texts[i] for i in part], config.max_tokens, config.pool)
        for i, one in zip(part, found, strict=True):
            empty += not one.kept.any()
            if one.kept.any() and seen.setdefault(one.ids.tobytes(), i) == i:
                read[i] = one
        looked, cut = looked + len(part), cut + longer
    kept = sorted(read)
    twice = looked - empty - len(kept)
    notes = [f"{texts.name}: {len(kept):,} of {total:,} texts are read, drawn at random"] if looked < total else []
    if cut:
        end, length = (
            "first" if config.pool == "mean" else "last",
            max((len(one.ids) for one in read.values()), default=0),
        )
        notes.append(f"{texts.name}: of {cut:,} texts longer than that only the {end} {length:,} tokens are read")
    if empty:
        notes.append(f"{texts.name}: {empty:,} texts have no token that becomes a row, and are left out")
    if twice:
        notes.append(f"{texts.name}: {twice:,} texts are the same tokens as an earlier one, and are left out")
    left = Labelled(texts.name, texts.where, [texts.texts[i] for i in kept], [texts.labels[i] for i in kept])
    number = {name: i for i, name in enumerate(texts.classes)}
    if gone := [name for name in number if name not in left.labels]:
        raise SaeError(f"{texts.where}: no text of the class {gone[0]!r} is left that can be read; {'; '.join(notes)}")
    left.expect_classes(config.classes)
    return [read[i] for i in kept], np.array([number[label] for label in left.labels]), notes


def of_latents(
    config: ProbeConfig, fitting: Fitting, latents: Any, seed: int
) -> tuple[dict[tuple[str, int | str], Scores], list[dict[str, Any]]]:
    """The scores of probes on latents [n, d_sae] by probe and k, and which latents each question chose, the best first.

    The random latents are drawn among those that fire on some training text.
    """
    train = latents[fitting.split.train]
    asked = [y for y, _ in fitting.asked()]
    differences = [mean_differences(train, y) for y in asked]
    ranked = [largest(one, max(config.ks)) for one in differences]
    areas = aurocs(train, asked)
    best = [int(np.abs(one - 0.5).argmax()) for one in areas]
    alive = np.random.default_rng([seed, 2]).permutation(np.flatnonzero(fired(train)))
    scores: dict[tuple[str, int | str], Scores] = {}
    for k in config.ks:
        scores[LATENTS, k] = fitting.scores(latents, [one[:k] for one in ranked])
    scores[LATENTS, "all"] = fitting.scores(latents)
    scores[BEST, 1] = fitting.scores(latents, [np.array([one]) for one in best])
    for k in config.ks:
        if len(alive) >= k:
            scores[RANDOM, k] = fitting.scores(latents, [alive[:k]] * len(asked))
    picked = [
        {
            "latents": one.tolist(), "differences": [float(difference[i]) for i in one],
            "best": index, "best_train_auroc": float(area[index]),
        }
        for one, difference, index, area in zip(ranked, differences, best, areas, strict=True)
    ]  # fmt: skip
    return scores, picked


def of_activations(config: ProbeConfig, fitting: Fitting, table: np.ndarray) -> dict[tuple[str, int | str], Scores]:
    """The scores of probes on the activations [n, d] themselves: k of their values, and all; and of no probe at all."""
    train = table[fitting.split.train]
    ranked = [largest(mean_differences(train, y), max(config.ks)) for y, _ in fitting.asked()]
    scores: dict[tuple[str, int | str], Scores] = {}
    for k in config.ks:
        if k < table.shape[1]:
            scores[ACTIVATIONS, k] = fitting.scores(table, [one[:k] for one in ranked])
    scores[ACTIVATIONS, "all"] = fitting.scores(table)
    scores[MAJORITY, 0] = fitting.majority()
    return scores
