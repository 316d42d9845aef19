"""When each latent became what it is: its direction, its tokens and its rate at log-spaced steps of its training.

Training keeps snapshots where `train.snapshots` says how many. A latent has emerged at the first of them from which on
its direction keeps a cosine of 0.9 with the last one's. Beside directions stand the tokens of the rows furthest along
its encoder row, compared with the last ones', and the clusters that directions lie in.
"""

from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.cache import catalogue
from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore
from sae.pipeline.analyses.analysis import Analysed, Analysis, Finding, quantiles, register
from sae.pipeline.analyses.clusters import labelled
from sae.pipeline.studies.plots import Heat, Panel

EMERGED = 0.9  # cosine with the last direction
ALIVE = 1e-6  # firing rate
NEAREST = 10  # rows along an encoder row whose tokens are compared
SAMPLED = 8192  # rows they are looked for among
LATENTS = 512  # of a heat map, and of those whose tokens are compared


@register
class Emergence(Analysis):
    """When each latent became what it is, from the snapshots that training kept (`train.snapshots`)."""

    name = "emergence"
    meanings: ClassVar[dict[str, str]] = {
        "snapshots": "snapshots that training kept",
        "median_step": f"median of the steps from which latents have a cosine of {EMERGED} with their last direction",
        "last_step": "step of the last snapshot",
        "emerged_by_half": "share of latents that have it by half of the steps",
        "emerged_at_the_end": "latents that have it in the last snapshot alone",
        "alive_first": f"latents that fire in more than {ALIVE:g} of the rows, in the first snapshot",
        "alive_last": "the same in the last one",
        "first_cosine": "mean cosine of first and last directions",
    }
    asked_for = True

    def find(self, subject: Analysed) -> Finding:
        steps = subject.run.snapshots()
        if len(steps) < 2:
            raise SaeError(
                f"{subject.run.path}: training kept no snapshots of it; train again with `train.snapshots = 12`, "
                "under another `name`"
            )
        shots = [subject.run.load_snapshot(step) for step in steps]
        last = shots[-1]["decoder"].float()
        cosines = torch.stack([cosine_similarity(one["decoder"].float(), last) for one in shots])
        first = emerged(cosines)
        at = torch.tensor(steps)[first]
        alive = [int((one["rate"] > ALIVE).sum()) for one in shots]
        overlap, of_text = self._overlap(subject, [one["encoder"].float() for one in shots])
        alike = self._clusters(subject, [one["decoder"].float() for one in shots])
        share = [((first <= i).double().mean().item()) for i in range(len(steps))]
        mean = cosines.double().mean(1).tolist()
        shown = first.argsort(stable=True)[torch.linspace(0, len(last) - 1, min(LATENTS, len(last))).long()]
        shares = {"mean cosine with the last": mean, "share emerged": share, "tokens kept": overlap}
        curves = {name: [*zip(steps, each, strict=True)] for name, each in shares.items()}
        by_latent = cosines[:, shown].T.tolist()
        return Finding(
            {
                "snapshots": len(steps), "median_step": at.double().median().item(), "last_step": steps[-1],
                "emerged_by_half": (at <= steps[-1] / 2).double().mean().item(),
                "emerged_at_the_end": int((at == steps[-1]).sum()),
                "alive_first": alive[0], "alive_last": alive[-1], "first_cosine": mean[0],
            },
            {
                "steps": steps, "emergence_step": at.tolist(), "mean_cosine": mean, "share_emerged": share,
                "alive": alive,
                "tokens_kept": overlap, "tokens_are": "tokens" if of_text else "rows", "cluster_ari": alike,
                "cosine_quantiles": [quantiles(one) for one in cosines],
            },
            [
                Panel("", "step", curves, log_x=True),
                Panel("latents alive", "step", {"": [*zip(steps, alive, strict=True)]}, log_x=True),
                Heat("latent, in the order they emerged", "snapshot", by_latent, "cosine with the last"),
            ],
        )  # fmt: skip

    def _overlap(self, subject: Analysed, encoders: list[Tensor]) -> tuple[list[float], bool]:
        """By snapshot the mean Jaccard index of latents' tokens with the last's; and whether they are no mere rows."""
        m = len(encoders[-1])
        chosen = torch.linspace(0, m - 1, min(LATENTS, m)).long()
        dataset, count = subject.held_out, min(SAMPLED, subject.rows)
        rows = dataset.rows(0, count).x
        text = dataset.provenance.text
        tokens = None if text is None else catalogue.of_recipe(subject.root, TokenStore, text.recipe)
        names = np.arange(count)
        if tokens is not None:
            positions = dataset.inputs[0].positions(0, count)
            tokens.expect_positions(positions, dataset.inputs[0])
            names = tokens_at(tokens, positions)
        sets = [_nearest(rows, encoder[chosen], names) for encoder in encoders]
        last = sets[-1]
        kept = [[len(a & b) / len(a | b) for a, b in zip(one, last, strict=True)] for one in sets]
        return [float(np.mean(one)) for one in kept], tokens is not None

    def _clusters(self, subject: Analysed, decoders: list[Tensor]) -> list[float] | None:
        """By snapshot the adjusted Rand index of its clusters and the last's; None without scikit-learn."""
        count = subject.config.clusters
        if find_spec("sklearn") is None or len(decoders[-1]) <= count:
            return None
        from sklearn.metrics import adjusted_rand_score

        labels = [labelled(one, "kmeans", count) for one in decoders]
        return [float(adjusted_rand_score(one, labels[-1])) for one in labels]


def emerged(cosines: Tensor) -> Tensor:
    """int64 [m]: of cosines [T, m] with the last, the first place from which on all are at least EMERGED."""
    kept = (cosines >= EMERGED).flip(0).cumprod(0).flip(0)
    kept[-1] = 1
    return kept.argmax(0)


def tokens_at(tokens: TokenStore, positions: np.ndarray) -> np.ndarray:
    """int64 [n]: the tokens at positions [n] of a store."""
    length = tokens.context_length
    contexts, where = np.unique(positions // length, return_inverse=True)
    first, last = int(contexts.min()), int(contexts.max())
    if last - first < 4 * len(contexts):
        ids = tokens.contexts(first, last + 1)[contexts - first]
    else:
        ids = np.concatenate([tokens.contexts(one, one + 1) for one in contexts.tolist()])
    return ids[where, positions % length]


def _nearest(rows: Tensor, encoder: Tensor, names: np.ndarray) -> list[set[int]]:
    """For each latent what the rows are called that lie furthest along its encoder row."""
    found = (rows @ encoder.T).topk(min(NEAREST, len(rows)), dim=0).indices
    return [{*names[column].tolist()} for column in found.T.numpy()]
