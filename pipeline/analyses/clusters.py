"""Groups of directions: k-means or HDBSCAN on unit decoder rows, how tight they are, and whether they are found again.

A clustering is found in any cloud of points. Beside the silhouette stands that of as many random directions, and beside
the clusters how alike those are that other seeds find (k-means), or that are found in most of the latents (HDBSCAN):
the adjusted Rand index, 1 for the same clusters, about 0 for unrelated ones.
"""

from itertools import combinations
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.cache.errors import SaeError, needing
from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, Value, register
from sae.pipeline.metrics.similarity import random_directions
from sae.pipeline.studies.plots import Panel

SEEDS = 5  # clusterings that are compared
STARTS = 4  # of k-means for each
PART = 0.9  # of the latents that HDBSCAN is given each time
SAMPLED = 4000  # latents whose silhouettes are taken
LEAST = 5  # latents of a cluster of HDBSCAN
NOISE = -1  # its label for what is in none


@register
class Clusters(Analysis):
    """Groups of directions that are alike, and whether other seeds find the same. Needs scikit-learn."""

    name = "clusters"
    meanings: ClassVar[dict[str, str]] = {
        "clusters": "clusters of directions",
        "in_none": "latents in none of them",
        "silhouette": "mean silhouette: 1 where clusters are apart, 0 where they touch",
        "stability": "how alike clusterings of several seeds are (adjusted Rand index): 1 where the same",
        "silhouette_chance": "mean silhouette of as many random directions",
    }
    asked_for = True

    def find(self, subject: Analysed) -> Finding:
        unit, latents = living(subject.sae.W_dec.detach().float().cpu())
        count, kind = subject.config.clusters, subject.config.clustering
        if kind == "kmeans" and len(unit) <= count:
            raise SaeError(
                f"clusters = {count}: {subject.run.name} has {len(unit)} directions; ask for fewer than that"
            )
        labels = labelled(unit, kind, count)
        of_chance = random_directions(*unit.shape)
        silhouettes = silhouette(unit, labels)
        by_cluster = [
            _cluster(int(one), unit, labels, silhouettes, latents, subject.config.top) for one in _names(labels)
        ]
        by_cluster.sort(key=lambda one: -one["size"])
        of_points = [[*enumerate(np.sort(silhouettes[labels == one])[::-1].tolist())] for one in _names(labels)]
        figures: dict[str, Value] = {
            "clusters": len(by_cluster), "in_none": int((labels == NOISE).sum()),
            "silhouette": _mean(silhouettes), "stability": stability(unit, kind, count),
            "silhouette_chance": _mean(silhouette(of_chance, labelled(of_chance, kind, count))),
        }  # fmt: skip
        every = np.full(subject.sae.d_sae, NOISE)
        every[latents] = labels
        return Finding(
            figures,
            {"clusters": by_cluster, "labels": every.tolist(), "by": kind},
            [
                Panel("latents", "cluster", {"": [(i, one["size"]) for i, one in enumerate(by_cluster, 1)]}),
                Panel("silhouette", "its latents", dict(zip("12345678", of_points, strict=False)), marks=False),
            ],
        )  # fmt: skip


def living(table: Tensor) -> tuple[Tensor, np.ndarray]:
    """The rows of a table that are not zero, at length 1, and which they are."""
    there = table.any(1)
    return normalize(table[there], dim=1), there.nonzero().flatten().numpy()


def labelled(unit: Tensor, kind: str, count: int, seed: int = 0) -> np.ndarray:
    """int [m]: the cluster of each row of length 1; NOISE for what is in none."""
    with needing("clusters", "probing"):
        from sklearn.cluster import HDBSCAN, KMeans
    if kind == "kmeans":
        found = KMeans(count, n_init=STARTS, random_state=seed).fit_predict(unit.numpy())
    elif len(unit) <= LEAST:
        found = np.full(len(unit), NOISE)
    else:
        found = HDBSCAN(min_cluster_size=LEAST, copy=True).fit_predict(unit.double().numpy())
    return np.asarray(found)


def stability(unit: Tensor, kind: str, count: int) -> float | None:
    """The mean adjusted Rand index of pairs of clusterings: of several seeds, or of several parts of the latents."""
    from sklearn.metrics import adjusted_rand_score

    m, found = len(unit), []
    for seed in range(SEEDS):
        chosen = np.arange(m)
        if kind != "kmeans":
            chosen = np.sort(np.random.default_rng(seed).permutation(m)[: max(1, round(PART * m))])
        labels = np.full(m, NOISE - 1)
        labels[chosen] = labelled(unit[torch.from_numpy(chosen)], kind, count, seed)
        found.append(labels)
    each = []
    for a, b in combinations(found, 2):
        both = (a >= NOISE) & (b >= NOISE)
        each.append(float(adjusted_rand_score(a[both], b[both])))
    return fmean(each)


def silhouette(unit: Tensor, labels: np.ndarray) -> np.ndarray:
    """float64 [m]: the silhouettes by cosine of the first SAMPLED rows that are in a cluster; NaN elsewhere."""
    from sklearn.metrics import silhouette_samples

    found = np.full(len(labels), np.nan)
    chosen = np.flatnonzero(labels != NOISE)
    if len(chosen) > SAMPLED:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, SAMPLED, replace=False))
    names = len({*labels[chosen].tolist()})
    if 2 <= names < len(chosen):
        found[chosen] = silhouette_samples(unit.numpy()[chosen], labels[chosen], metric="cosine")
    return found


def _cluster(
    one: int, unit: Tensor, labels: np.ndarray, silhouettes: np.ndarray, latents: np.ndarray, top: int
) -> dict[str, Any]:
    chosen = np.flatnonzero(labels == one)
    rows = unit[torch.from_numpy(chosen)]
    towards = rows @ normalize(rows.mean(0), dim=0)
    first = towards.argsort(descending=True, stable=True)[:top]
    return {
        "cluster": one, "size": len(chosen), "silhouette": _mean(silhouettes[chosen]),
        "cohesion": towards.mean().item(), "latents": latents[chosen[first.numpy()]].tolist(),
    }  # fmt: skip


def _names(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels[labels != NOISE])


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None
