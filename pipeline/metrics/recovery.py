"""How many of the features that rows were made of a dictionary has found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Metric, Subject, Value, register
from sae.pipeline.metrics.similarity import best, chance, hungarian, mean_cosine, mmcs, random_directions

RECOVERED = 0.9  # a true feature counts as recovered from this cosine on


@register
class Recovery(Metric):
    """How many of the true features were found, of directions [m, d] learned and the true ones [G, d]."""

    name = "recovery"
    needs = ("directions", "truth")
    figures = (
        Figure("true_to_learned", "true features found", "mean over the true features of the largest cosine with a learned one", "high"),
        Figure("learned_to_true", "learned features true", "mean over the learned features of the largest cosine with a true one", "high"),
        Figure("recovered", "features recovered", "true features that a learned one has a cosine above 0.9 with", "high" ),
        Figure("hungarian", "one-to-one cosine", "mean cosine of the best one-to-one matching", "high"),
        Figure("duplicates", "duplicates", "learned features whose nearest true one is that of another, too", "low"),
        Figure("uniqueness", "unique features", "true features that are nearest to some learned one, over the number of learned ones", "high", "evaluation"),
        Figure("length_ratio", "length of found features", "mean over the true features of the nearest learned one's length over theirs", None, "studies"),
        Figure("chance", "found by chance", "true_to_learned of random directions"),
        Figure("duplicates_chance", "duplicates by chance", "duplicates among random directions", None, "evaluation"),
    )  # fmt: skip

    def __init__(self, learned: Tensor, truth: Tensor) -> None:
        self.learned, self.truth = learned, truth[truth.any(1)]  # zeros are features that no row shows

    @classmethod
    def of(cls, subject: Subject) -> Recovery:
        assert subject.truth is not None
        return cls(subject.dictionary.W_dec.detach().cpu(), subject.truth)

    @torch.no_grad()
    def result(self) -> dict[str, Value]:
        learned, truth = self.learned, self.truth
        if not len(truth):
            return dict.fromkeys(one.key for one in self.figures)
        by_chance = random_directions(len(learned), truth.shape[1]).to(truth.dtype)
        nearest = learned[best(truth, learned)]
        found, unique = cosine_similarity(truth, nearest), len(best(learned, truth).unique())
        return {
            "true_to_learned": found.mean().item(),
            "learned_to_true": mmcs(learned, truth).item(),
            "recovered": (found > RECOVERED).double().mean().item(),
            "hungarian": mean_cosine(learned, truth, hungarian(learned, truth)).item(),
            "duplicates": len(learned) - unique,
            "uniqueness": unique / len(learned),
            "length_ratio": (nearest.norm(dim=1) / truth.norm(dim=1)).mean().item(),
            "chance": chance(len(truth), len(learned), truth.shape[1]),
            "duplicates_chance": len(learned) - len(best(by_chance, truth).unique()),
        }
