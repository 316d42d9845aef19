"""The same documents in contexts of several lengths: dictionaries trained on each, judged on each.

The stores are found by recipe: that of the store given, with tokens cut at another length. All runs see equally many
rows, by themselves as many as the smallest store has. Every dictionary is judged on held-out rows of every length, all
in all and by position: a token far into a context has more before it, and other activations. Each length has seeds of
its own, for dictionaries that start alike stay somewhat alike.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.pipeline.evaluate.judging import judge
from sae.pipeline.formats import trained
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.metric import Subject
from sae.pipeline.metrics.similarity import chance, symmetric_mmcs
from sae.pipeline.report.compare import Row
from sae.pipeline.runtime import devices
from sae.pipeline.studies.lab import Lab, Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.study import Setup, Study, expect_dictionary, of_equal_rows, register
from sae.pipeline.studies.tables import Result

JUDGED = "eval/study-contexts.json"
SEEDS_APART = 1000  # between those of lengths that follow each other
MMCS = ("mmcs_own", "mmcs_chance")


@register
class Contexts(Study):
    """Dictionaries of the same documents in contexts of several lengths, each judged on all of them, by position.

    The stores are found by what `--activations` names: same documents, model and codec, cut at other lengths.

    Examples:

        sae study contexts --lengths 32,128,512 --rows 10M
        sae study contexts --arch batchtopk --k 64 --seeds 3 --no-ce
    """

    name = "contexts"
    labels = ("trained", "judged")
    shown = ("fvu", "l0", "ce_recovered_zero")
    any_store = True

    lengths: tuple[PositiveInt, ...] | None = Field(
        None, description="tokens in a context, as 32,128; a store of each must be there; null: all that have one"
    )

    def trials(self, setup: Setup) -> list[Trial]:
        """Return a trial a length. Raises NotFound, with the calls that make them, where stores are missing."""
        (reference,) = setup.dataset.inputs
        stores = found(setup.lab.place.cache, reference, self.lengths)
        if len(stores) < 2:
            there = ",".join(map(str, stores))
            raise NotFound(f"lengths = {there}: two are compared at least; {_calls(reference, [])}")
        datasets = {length: Dataset.of(store) for length, store in stores.items()}
        base = of_equal_rows(setup.base, datasets.values())
        return [
            Trial({"trained": length}, base.model_copy(update={"seed": base.seed + SEEDS_APART * i}), dataset)
            for i, (length, dataset) in enumerate(datasets.items())
        ]

    def run(self, setup: Setup) -> Result:
        expect_dictionary(setup.base)
        trials = self.trials(setup)
        lab, seeds = setup.lab, setup.seeds or self.usual_seeds
        seeded = [one for trial in trials for one in trial.seeded(seeds)]
        runs = lab.train(seeded)
        rows: list[Row] = []
        positions: list[dict[str, Any]] = []
        for trial, run in zip(seeded, runs, strict=True):
            for other in trials:
                judged = _judged(run, other.dataset, lab)
                labels = {"trained": trial.labels["trained"], "judged": other.labels["trained"]}
                rows.append({"run": run.name, **labels, "seed": trial.config.seed, **judged["figures"]})
                positions += [{**labels, "seed": trial.config.seed, **one} for one in judged["by_position"]]
        _compare(rows, lab.place.runs)
        return self.result(rows, *MMCS, extra={"by_position": positions}, draw=_drawing(positions, self.shown))

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        _drawing([], self.shown)([*rows], path)


def found(root: Path, reference: ActivationStore, lengths: Sequence[int] | None) -> dict[int, ActivationStore]:
    """Find the store of each length, shortest first; lengths None: of all that are there. NotFound for those missing.

    A store whose model, documents, site or codec differ is another's; one of the reference's length is it itself.
    """
    if "tokens" not in reference.recipe:
        raise SaeError(f"activations = {reference.key}: is of no text; name a store that `harvest()` made")
    wanted = _but_length(reference.recipe)
    there: dict[int, ActivationStore] = {}
    for store in catalogue.readable(root, catalogue.folders(root, ActivationStore.kind))[0]:
        assert isinstance(store, ActivationStore)
        if "tokens" in store.recipe and _but_length(store.recipe) == wanted:
            there[int(store.recipe["tokens"]["context_length"])] = store
    chosen = sorted(there if lengths is None else lengths)
    if missing := [length for length in chosen if length not in there]:
        raise NotFound(
            f"lengths = {','.join(map(str, missing))}: no store of the documents of {reference.key} in contexts of "
            f"{'these lengths' if len(missing) > 1 else 'this length'}; {_calls(reference, missing)}"
        )
    return {length: there[length] for length in chosen}


def _but_length(recipe: Recipe) -> str:
    """What stores of the same documents, cut at several lengths, have in common."""
    tokens = {name: value for name, value in recipe["tokens"].items() if name != "context_length"}
    return canonical({**recipe, "tokens": tokens})


def _calls(reference: ActivationStore, missing: Sequence[int]) -> str:
    """The calls that make the stores of other lengths."""
    site, layer = reference.recipe["site"], reference.recipe["layer"]
    each = ", ".join(map(str, missing)) or "another length"
    return f"for {each}: `tokenize(context=...)` of the same source, then `harvest(layer={layer}, site={site})`"


def _judged(run: Run, dataset: Dataset, lab: Lab) -> dict[str, Any]:
    """The figures of a run on the held-out rows of a dataset, and by position; kept in the run folder by the store."""
    place, config = lab.place, lab.eval_config
    held_out = dataset.held_out(place.cache)
    asked = {"store": held_out.key, "rows": held_out.n_rows, "eval": config.model_dump(mode="json")}
    asked |= {"ce": lab.cross_entropy}
    kept = run.read_json(JUDGED) if (run.path / JUDGED).exists() else {"judged": []}
    for one in kept["judged"]:
        if one["asked"] == asked:
            return dict(one["found"])
    text = held_out.provenance.text
    assert text is not None, "as `found` has seen"
    tokens = catalogue.of_recipe(place.cache, TokenStore, text.recipe)
    if tokens is None:
        raise NotFound(f"{held_out.key}: its tokens are not in {place.cache}; run `tokenize()` again")
    sae = trained.load_run(run).to(devices.resolve_device(place.device))
    model = lab.model(dataset) if lab.cross_entropy else None
    evaluation = judge(Subject(sae), dataset, held_out, config, place.progress, tokens=tokens, model=model)
    names = (*columns(*Contexts.shown), "rows", "tokens")
    figures = {name: evaluation.figures.get(name) for name in names}
    told = {"figures": figures, "by_position": evaluation.details["by_position"]}
    others = [one for one in kept["judged"] if one["asked"]["store"] != held_out.key]
    run.write_json(JUDGED, {"judged": [*others, {"asked": asked, "found": told}]})
    return told


def _compare(rows: Sequence[Row], runs: Path) -> None:
    """Add to each row how alike the decoder and one that was trained on the length it is judged on are."""
    decoders = {row["run"]: trained.load_run(Run(runs / row["run"])).W_dec for row in rows}
    by = {row["run"]: (row["trained"], row["seed"] % SEEDS_APART) for row in rows}
    names = {key: name for name, key in by.items()}
    m, d = next(iter(decoders.values())).shape
    for row in rows:
        row |= dict.fromkeys(MMCS)
        own = names.get((row["judged"], row["seed"] % SEEDS_APART))
        if own is not None and own != row["run"]:
            row["mmcs_own"] = symmetric_mmcs(decoders[row["run"]], decoders[own]).item()
            row["mmcs_chance"] = chance(m, m, d)


def _drawing(positions: Sequence[dict[str, Any]], shown: Sequence[str]) -> Any:
    """What draws the matrix, a curve for each length trained on; and FVU by position, judged on the longest."""

    def draw(rows: list[Row], path: Path) -> None:
        ticks = sorted({row["judged"] for row in rows})

        def panel(name: str) -> Panel:
            curves = {
                f"trained on {length}": [(row["judged"], row[name]) for row in rows if row["trained"] == length]
                for length in ticks
            }
            return Panel(label(name), "tokens in a context, judged", curves, log_x=True, ticks=ticks)

        curves: dict[str, list[tuple[float, float | None]]] = {}
        first = min((one["seed"] % SEEDS_APART for one in positions), default=0)
        for one in positions:
            if one["judged"] == ticks[-1] and one["seed"] % SEEDS_APART == first and one["from"] > 0:
                curves.setdefault(f"trained on {one['trained']}", []).append((one["from"], one["fvu"]))
        by_position = Panel(f"FVU, judged on {ticks[-1]}", "position, from", curves, log_x=True)
        draw_panels([*(panel(name) for name in shown), by_position], path)

    return draw
