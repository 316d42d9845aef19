"""What a dictionary makes of true features that come in pairs: one latent for both, or one for each.

Features that always come together can be had for one latent instead of two, and features that never both come tempt to
share one. A pair is merged where a learned direction is near both of its members. How much its members' latents speak
for each other is tried on rows of one feature alone: E[f_i | only j], where i is the latent nearest to a member.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Metric, Subject, Value, register
from sae.pipeline.metrics.similarity import best, random_directions
from sae.pipeline.saes.dictionary import Dictionary

MERGED = 0.6  # a learned direction with a larger cosine to both members merges a pair
STRENGTHS = torch.arange(1, 16, 2) / 16  # coefficients of the feature that is alone in a row: the middles of eighths


@register
class Pairs(Metric):
    """Whether features that come together, or never both, have a latent each."""

    name = "pairs"
    needs = ("directions", "truth", "pairs")
    figures = (
        Figure("merged_pairs", "merged pairs", "share of the pairs of true features that one learned one has a cosine above 0.6 with both of", "low", share=True),
        Figure("cross_talk", "cross-talk", "share of what a pair's latents say of its one member alone that the other member's says", "low"),
        Figure("merged_pairs_chance", "merged by chance", "merged_pairs of random directions", None, "evaluation", share=True),
        Figure("cross_talk_chance", "cross-talk by chance", "cross_talk of random directions", None, "evaluation"),
        Figure("alike_pairs", "pairs alike", "share of the pairs whose members have a cosine above 0.6 with each other: no dictionary could tell them apart", None, "evaluation", share=True),
    )  # fmt: skip

    def __init__(self, sae: Dictionary, effect: Tensor, pairs: tuple[tuple[int, int], ...]) -> None:
        """effect: what each feature adds to a row for a coefficient of 1, [G, d]. Pairs that no row shows are left out."""
        self.sae, self.effect = sae, effect
        self.pairs = [pair for pair in pairs if effect[list(pair)].any(1).all()]

    @classmethod
    def of(cls, subject: Subject) -> Pairs:
        assert subject.effect is not None and subject.truth is not None
        return cls(subject.dictionary, subject.effect * subject.truth.any(1, keepdim=True), subject.pairs)

    @torch.no_grad()
    def result(self) -> dict[str, Value]:
        if not self.pairs:
            return dict.fromkeys(one.key for one in self.figures)
        learned = self.sae.W_dec.detach().cpu()
        by_chance = random_directions(*learned.shape)
        self._merged, self._talk = self._both(learned), self._responses(learned, self._encoded)
        return {
            "merged_pairs": _share(self._merged), "cross_talk": _cross_talk(self._talk),
            "merged_pairs_chance": _share(self._both(by_chance)),
            "cross_talk_chance": _cross_talk(self._responses(by_chance, lambda x: (x @ by_chance.T).relu())),
            "alike_pairs": _share(self._alike()),
        }  # fmt: skip

    def details(self) -> dict[str, Any]:
        """For each pair its members and their cosine, the largest cosine with both, and E[f_i | only j] as [i][j]."""
        found = []
        told = zip(self.pairs, self._alike(), self._merged, self._talk, strict=True) if self.pairs else ()
        for pair, cosine, both, talk in told:
            found.append({"members": list(pair), "cosine": cosine, "both": both, "only": talk.tolist()})
        return {"pairs": found}

    def _alike(self) -> list[float]:
        """For each pair the cosine of its members."""
        one, other = (self.effect[[pair[i] for pair in self.pairs]] for i in (0, 1))
        return [float(cosine) for cosine in cosine_similarity(one, other).tolist()]

    def _both(self, learned: Tensor) -> list[float]:
        """For each pair the largest cosine that one of the directions [m, d] has with both members."""
        unit = torch.nn.functional.normalize(learned, dim=1)
        members = torch.nn.functional.normalize(self.effect[torch.tensor(self.pairs)], dim=2)
        return [(unit @ pair.T).amin(1).max().item() for pair in members]

    def _responses(self, learned: Tensor, encode: Any) -> list[Tensor]:
        """For each pair [2, 2]: what the latent nearest to member i says, on the average, where j alone is in a row."""
        found = []
        for pair in self.pairs:
            effect = self.effect[list(pair)]
            latents = best(effect, learned)
            rows = STRENGTHS[:, None, None] * effect
            said = encode(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])[..., latents]
            found.append(said.mean(0).T)
        return found

    def _encoded(self, x: Tensor) -> Tensor:
        return self.sae.encode(x.to(self.sae.W_dec)).dense().cpu().float()


def _share(both: list[float]) -> float:
    return sum(cosine > MERGED for cosine in both) / len(both)


def _cross_talk(talk: list[Tensor]) -> float | None:
    """Mean over members j of E[f_other | only j] / (E[f_other | only j] + E[f_own | only j]), where either speaks."""
    shares = []
    for pair in talk:
        own, other = pair.diagonal(), pair.flip(0).diagonal()
        shares += [(o / (o + mine)).item() for o, mine in zip(other, own, strict=True) if o + mine > 0]
    return sum(shares) / len(shares) if shares else None
