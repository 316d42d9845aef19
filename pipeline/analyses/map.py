"""A map of directions in the plane, which latents fire together, and what a few of them do on a few rows.

The plane is UMAP's by cosine (n_neighbors 15, min_dist 0.1, random_state 42), or where it is not installed that of the
two first principal components. Latents that fire together are joined by their Jaccard index, and communities of that
graph are Louvain's.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, register
from sae.pipeline.analyses.clusters import living
from sae.pipeline.interpret.together import Partners, Together
from sae.pipeline.metrics.sparsity import DENSE
from sae.pipeline.studies.plots import Heat, Panel

NEIGHBOURS, MIN_DIST, SEED = 15, 0.1, 42
LEAST = 5  # directions for a map of UMAP
PARTNERS = 32  # of each latent, those that fire with it most
JOINED = 0.1  # Jaccard index from which on two are
COMMUNITY = 3  # latents of the smallest community that is told of
SHOWN, DRAWN = 64, 64  # latents and rows of a heat map
BANDS = ((0.0, 1e-4), (1e-4, 1e-3), (1e-3, 1e-2), (1e-2, DENSE), (DENSE, 1.1))  # rates that have a colour each


@register
class Map(Analysis):
    """A map of directions in the plane, communities of latents that fire together, and heat maps. Better with UMAP."""

    name = "map"
    meanings: ClassVar[dict[str, str]] = {
        "communities": f"communities of {COMMUNITY} latents or more that fire together",
        "in_communities": "latents in one of them",
        "latents": "latents that have a direction",
    }
    asked_for = True

    def find(self, subject: Analysed) -> Finding:
        unit, latents = living(subject.sae.W_dec.detach().float().cpu())
        places, by = embedded(unit)
        if by == "pca":
            subject.progress.note(
                'map: by principal components, for UMAP is not installed; `pip install "sae-cache[umap]"`'
            )
        together, fired = Together(subject.sae.d_sae, SEED), torch.zeros(subject.sae.d_sae, dtype=torch.float64)
        for batch in subject.batches():
            at = np.arange(together.seen, together.seen + len(batch.x))
            row, latent = batch.latents.dense().nonzero(as_tuple=True)
            together.add(row, latent, at)
            fired += batch.latents.fired().cpu()
        rates, partners = fired / max(1, together.seen), together.partners(PARTNERS)
        groups = communities(partners)
        named = [group for group in groups if len(group) >= COMMUNITY]
        shown = [i for group in groups for i in group][:SHOWN]
        on_rows = _on_rows(subject, torch.tensor(shown, dtype=torch.int64))
        where = torch.full((subject.sae.d_sae, 2), torch.nan)
        where[torch.from_numpy(latents)] = places
        return Finding(
            {
                "communities": len(named), "in_communities": sum(map(len, named)),
                "latents": len(latents), "rows": together.seen,
            },
            {
                "by": by, "places": [None if x != x else [round(x, 4), round(y, 4)] for x, y in where.tolist()],
                "communities": named, "heat_latents": shown,
            },
            [
                Panel("", f"directions, by {'UMAP' if by == 'umap' else 'principal components'}",
                      _by_rate(places, rates[torch.from_numpy(latents)]), joined=False),
                Heat("latent, by community", "latent", alike(partners, shown), "Jaccard"),
                Heat("latent", "row", on_rows, "activation over its largest"),
            ],
        )  # fmt: skip


def embedded(unit: Tensor) -> tuple[Tensor, str]:
    """[m, 2]: the places of rows of length 1 in the plane, and by which method."""
    if len(unit) > LEAST and find_spec("umap") is not None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, of seeds and threads
            from umap import UMAP

            made = UMAP(
                n_neighbors=min(NEIGHBOURS, len(unit) - 1), min_dist=MIN_DIST, metric="cosine", random_state=SEED,
                init="random" if len(unit) <= NEIGHBOURS else "spectral",
            ).fit_transform(unit.numpy())  # fmt: skip
        return torch.from_numpy(made).float(), "umap"
    centred = unit - unit.mean(0) if len(unit) else unit
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    found = centred @ axes[:2].T
    return torch.nn.functional.pad(found, (0, 2 - found.shape[1])), "pca"


def communities(partners: Partners) -> list[list[int]]:
    """Groups of latents that are joined, larger ones first; each that has a partner is in one."""
    import networkx

    graph = networkx.Graph()
    one, rank = np.nonzero(partners.jaccard > JOINED)
    edges = zip(one.tolist(), partners.latent[one, rank].tolist(), partners.jaccard[one, rank].tolist(), strict=True)
    graph.add_weighted_edges_from(edges)
    found = networkx.community.louvain_communities(graph, seed=SEED) if len(graph) else []
    return sorted((sorted(group) for group in found), key=lambda group: (-len(group), group))


def alike(partners: Partners, latents: list[int]) -> list[list[float]]:
    """The Jaccard index of each two latents, 0 where they are not among each other's partners."""
    known = [dict(zip(partners.latent[i].tolist(), partners.jaccard[i].tolist(), strict=True)) for i in latents]
    return [[one.get(other, 0.0) for other in latents] for one in known]


def _by_rate(places: Tensor, rates: Tensor) -> dict[str, Sequence[tuple[float, float]]]:
    """The points of the map by how often their latents fire."""
    curves: dict[str, Sequence[tuple[float, float]]] = {}
    for low, high in BANDS:
        chosen = (rates >= low) & (rates < high)
        if chosen.any():
            name = f"below {high:g}" if low == 0 else f"{low:g} to {high:g}" if high < 1 else f"above {low:g}"
            curves[f"rate {name}"] = [(x, y) for x, y in places[chosen].tolist()]
    return curves


def _on_rows(subject: Analysed, latents: Tensor) -> list[list[Any]]:
    """[latents, rows]: activations as shares of each latent's largest, rows by the latent that is strongest there."""
    if not len(latents):
        return []
    with torch.no_grad():
        values = subject.sae.encode(subject.sample(DRAWN)).dense().cpu()[:, latents]
    shares = values / values.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny)
    return shares[shares.argmax(1).argsort(stable=True)].T.tolist()
