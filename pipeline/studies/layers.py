"""How dictionaries differ from layer to layer: one run a layer with the same settings, on stores already harvested.

The layers' stores are found by recipe: that of the store given, with another layer and site. All runs see equally many
rows, by themselves as many as the smallest store has. Between residual sites of neighbouring layers, which share a
space, decoders are compared by MMCS, to be read beside what random directions score. Each layer has seeds of its own:
dictionaries that start alike stay somewhat alike, whatever the layers have in common.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sae.cache import catalogue
from sae.cache.activations import ActivationStore
from sae.cache.disk.identity import Recipe, canonical
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.outliers import largest_norm
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.pipeline.language_model import SITES
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.similarity import chance, symmetric_mmcs
from sae.pipeline.report.compare import Row
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.results import columns
from sae.pipeline.studies.study import Lab, Result, Trial, of_equal_rows
from sae.pipeline.train import trained
from sae.pipeline.train.stage import TrainConfig

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
SEEDS_APART = 1000  # between those of neighbouring layers
NORM_ROWS = 65_536  # whose mean norm is shown
OWN = ("layer", "site", "hook", "d")  # what differs between stores of one pass

LABELS = ("layer",)
FIRST = ("norm", "fvu", "l0", "dead_fraction")
AGREEMENT = ("mmcs_previous", "mmcs_chance")
DRAWN = (*FIRST[1:], "ce_recovered_mean")


def layers(
    base: TrainConfig, reference: ActivationStore, lab: Lab, *, layers: Sequence[int], site: str, seeds: int = 1
) -> Result:
    """A run for every layer, at a site of the model and tokens of the reference store.

    Raises NotFound, with the command that makes them, where stores are missing.
    """
    stores = found(lab.root, reference, layers, site)
    base = of_equal_rows(base, map(Dataset.of, stores.values()))
    trials = []
    for layer, store in sorted(stores.items()):
        config = base.model_copy(update={"seed": base.seed + SEEDS_APART * layer})
        trials += Trial({"layer": layer}, config, Dataset.of(store)).seeded(seeds)
    norms = {layer: mean_norm(store, base.outliers) for layer, store in stores.items()}
    rows = [{**row, "norm": norms[row["layer"]]} for row in lab.rows(trials)]
    if site not in RESIDUAL:
        return Result("layers", LABELS, columns(*FIRST), rows, draw, extra={"site": site})
    _compare_neighbours(rows, lab.runs)
    return Result("layers", LABELS, (*columns(*FIRST), *AGREEMENT), rows, draw, extra={"site": site})


def found(root: Path, reference: ActivationStore, layers: Sequence[int], site: str) -> dict[int, ActivationStore]:
    """The store of every layer. Raises NotFound for those that are missing, SaeError for what is no site."""
    if site not in SITES:
        raise SaeError(f"--site {site}: the sites are {', '.join(SITES)}")
    wanted = _common(reference.recipe)
    every = (ActivationStore(path) for path in catalogue.folders(root, ActivationStore.kind))
    there = {
        int(store.recipe["layer"]): store
        for store in every
        if store.n_rows and store.recipe.get("site") == site and _common(store.recipe) == wanted
    }
    if missing := [layer for layer in layers if layer not in there]:
        raise NotFound(
            f"--layers {','.join(map(str, missing))}: no {site} of {'these' if len(missing) > 1 else 'this'} beside "
            f"{reference.key}; make what is missing with `{harvest_command(root, reference, missing, site)}`"
        )
    return {layer: there[layer] for layer in layers}


def harvest_command(root: Path, reference: ActivationStore, layers: Sequence[int], site: str) -> str:
    """What to type for stores like the reference, of other layers."""
    recipe = reference.recipe
    model = reference.hints.get("model", recipe["model"]["model"])
    words = ["sae", "harvest", "--model", model, "--layer", ",".join(map(str, layers)), "--site", site]
    tokens = catalogue.of_recipe(root, TokenStore, recipe["tokens"])
    if tokens is not None:
        words += ["--tokens-from", tokens.key]
    return shlex.join([*words, "--codec", recipe["codec"]["name"]])


def mean_norm(store: ActivationStore, outliers: float | None = None) -> float:
    """Mean norm of a store's first rows, as they were before they were encoded, without those training leaves out."""
    norms = store.norms(0, min(NORM_ROWS, store.n_rows))
    if outliers is not None:
        norms = norms[norms <= largest_norm(store, outliers)]
    return float(np.mean(norms, dtype=np.float64))


def _common(recipe: Recipe) -> str:
    return canonical({key: value for key, value in recipe.items() if key not in OWN})


def _compare_neighbours(rows: list[Row], runs: Path) -> None:
    """Add to each row how alike its decoder and its counterpart's a layer below are, where there is one."""
    decoders = {(row["layer"], row["seed"]): trained.load(Run(runs / row["run"])).W_dec for row in rows}
    m, d = next(iter(decoders.values())).shape
    by_chance = chance(m, m, d)
    for row in rows:
        below = decoders.get((row["layer"] - 1, row["seed"] - SEEDS_APART))
        row |= dict.fromkeys(AGREEMENT)
        if below is not None:
            row["mmcs_previous"] = symmetric_mmcs(decoders[row["layer"], row["seed"]], below).item()
            row["mmcs_chance"] = by_chance


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each figure against the layer."""
    ticks = [row["layer"] for row in rows]

    def panel(title: str, curves: dict[str, str], dashed: frozenset[str] = frozenset()) -> Panel:
        points = {name: [(row["layer"], row.get(column)) for row in rows] for name, column in curves.items()}
        return Panel(title, "layer", points, dashed=dashed, ticks=ticks)

    titles = {"norm": "mean norm of a row", **{name: label(name) for name in DRAWN}}
    panels = [panel(title, {title: name}) for name, title in titles.items()]
    with_chance = {"dictionaries": "mmcs_previous", "random directions": "mmcs_chance"}
    panels.append(panel("MMCS with the layer below", with_chance, frozenset({"random directions"})))
    draw_panels(panels, path)
