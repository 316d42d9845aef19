"""Dictionaries with the same settings are trained on stores of several layers of a model, and compared.

The layers' stores are found by recipe: that of the store given, with another layer and site. All runs see equally many
rows, by themselves as many as the smallest store has. Between residual sites of neighbouring layers, which share a
space, decoders are compared by MMCS, to be read beside what random directions score. Each layer has seeds of its own:
dictionaries that start alike stay somewhat alike, whatever the layers have in common.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, NonNegativeInt

from sae.cache import catalogue, points
from sae.cache.activations import ActivationStore
from sae.cache.errors import NotFound, SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.massive import OutlierRule, limit_of
from sae.cache.runs import Run
from sae.cache.tokens import TokenStore
from sae.pipeline.formats import trained
from sae.pipeline.language_model import SITES
from sae.pipeline.metrics.figures import label
from sae.pipeline.metrics.similarity import chance, symmetric_mmcs
from sae.pipeline.report.compare import Row
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.plots import Panel
from sae.pipeline.studies.plots import draw as draw_panels
from sae.pipeline.studies.study import Setup, Study, expect_dictionary, of_equal_rows, register
from sae.pipeline.studies.tables import Result

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")
SEEDS_APART = 1000  # between those of neighbouring layers
NORM_ROWS = 65_536  # whose mean norm is shown

AGREEMENT = ("mmcs_previous", "mmcs_chance")


@register
class Layers(Study):
    """The same dictionary on several layers of one model: norms, errors, dead latents, likeness of neighbours.

    The layers' stores are found by what `--activations` names: same model, tokens and codec.

    Examples:

        sae study layers --layers 0,4,8,11 --site resid_post --rows 50M
        sae study layers --layers 5,6 --arch batchtopk --k 64
    """

    name = "layers"
    labels = ("layer",)
    shown = ("norm", "fvu", "l0", "dead_fraction")
    any_store = True

    layers: tuple[NonNegativeInt, ...] | None = Field(
        None,
        description="layers, from 0, as 0,4,8 or 0-3; a store of each must be there; null: all that have one",
    )
    site: str | None = Field(None, description="site, as resid_post; null: that of the store")

    def trials(self, setup: Setup) -> list[Trial]:
        """Return a trial a layer. Raises NotFound, with the command that makes them, where stores are missing."""
        (reference,) = setup.dataset.inputs
        if "tokens" not in reference.recipe:
            raise SaeError(
                f"activations = {reference.key}: is of no layer of a model; name a store that `harvest()` made"
            )
        stores = found(setup.lab.place.cache, reference, self.layers, self.site or str(reference.recipe["site"]))
        datasets = {layer: Dataset.of(store) for layer, store in stores.items()}
        base = of_equal_rows(setup.base, datasets.values())
        return [
            Trial({"layer": layer}, base.model_copy(update={"seed": base.seed + SEEDS_APART * layer}), dataset)
            for layer, dataset in datasets.items()
        ]

    def run(self, setup: Setup) -> Result:
        expect_dictionary(setup.base)
        trials = self.trials(setup)
        stores = {trial.labels["layer"]: trial.dataset.inputs[0] for trial in trials}
        norms = {layer: mean_norm(store, setup.base.outliers) for layer, store in stores.items()}
        rows = [{**row, "norm": norms[row["layer"]]} for row in self.rows(setup, trials)]
        site = self.site or str(setup.dataset.inputs[0].recipe["site"])
        if site not in RESIDUAL:
            return self.result(rows, extra={"site": site})
        _compare_neighbours(rows, setup.lab.place.runs)
        return self.result(rows, *AGREEMENT, extra={"site": site})

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        ticks = [row["layer"] for row in rows]

        def panel(title: str, curves: dict[str, str], dashed: frozenset[str] = frozenset()) -> Panel:
            points = {name: [(row["layer"], row.get(column)) for row in rows] for name, column in curves.items()}
            return Panel(title, "layer", points, dashed=dashed, ticks=ticks)

        drawn = (*self.shown[1:], "ce_recovered_mean")
        titles = {"norm": "mean norm of a row", **{name: label(name) for name in drawn}}
        panels = [panel(title, {title: name}) for name, title in titles.items()]
        with_chance = {"dictionaries": "mmcs_previous", "random directions": "mmcs_chance"}
        panels.append(panel("MMCS with the layer below", with_chance, frozenset({"random directions"})))
        draw_panels(panels, path)


def found(
    root: Path, reference: ActivationStore, layers: Sequence[int] | None, site: str
) -> dict[int, ActivationStore]:
    """Find the store of each layer, in the order of layers; layers None: of all that are there.

    Raises NotFound for those that are missing, SaeError for what is no site.
    """
    if site not in SITES:
        raise SaeError(f"site = {site}: the sites are {', '.join(SITES)}")
    there = {layer: store for (layer, its), store in points.beside(root, reference).items() if its == site}
    layers = sorted(there if layers is None else layers)
    if missing := [layer for layer in layers if layer not in there]:
        raise NotFound(
            f"layers = {','.join(map(str, missing))}: no {site} of {'these' if len(missing) > 1 else 'this'} beside "
            f"{reference.key}; make what is missing with `{harvest_call(root, reference, missing, site)}`"
        )
    return {layer: there[layer] for layer in layers}


def harvest_call(root: Path, reference: ActivationStore, layers: Sequence[int], site: str) -> str:
    """Return the call that makes stores like the reference, of other layers."""
    recipe = reference.recipe
    model = reference.hints.get("model", recipe["model"]["model"])
    tokens = catalogue.of_recipe(root, TokenStore, recipe["tokens"])
    said = {"model": model, "layer": ",".join(map(str, layers)), "site": site}
    said |= {} if tokens is None else {"tokens_from": tokens.key}
    said |= {"codec": recipe["codec"]["name"]}
    return f"harvest({', '.join(f'{name}={value}' for name, value in said.items())})"


def mean_norm(store: ActivationStore, outliers: OutlierRule = None) -> float:
    """Return the mean norm of a store's first rows, not yet encoded, without those that training leaves out."""
    norms = store.norms(0, min(NORM_ROWS, store.n_rows))
    if (largest := limit_of(store, outliers, store.n_rows)) is not None:
        norms = norms[norms <= largest]
    return float(np.mean(norms, dtype=np.float64))


def _compare_neighbours(rows: list[Row], runs: Path) -> None:
    """Add to each row how alike its decoder and its counterpart's a layer below are, where there is one."""
    decoders = {(row["layer"], row["seed"]): trained.load_run(Run(runs / row["run"])).W_dec for row in rows}
    m, d = next(iter(decoders.values())).shape
    by_chance = chance(m, m, d)
    for row in rows:
        below = decoders.get((row["layer"] - 1, row["seed"] - SEEDS_APART))
        row |= dict.fromkeys(AGREEMENT)
        if below is not None:
            row["mmcs_previous"] = symmetric_mmcs(decoders[row["layer"], row["seed"]], below).item()
            row["mmcs_chance"] = by_chance
