"""How well latents tell that their true feature is in a row: the classification of SynthSAEBench (arXiv 2602.14687)."""

from __future__ import annotations

import torch
from torch import Tensor

from sae.pipeline.metrics.figures import Figure
from sae.pipeline.metrics.metric import Encoded, Metric, Subject, Value, register
from sae.pipeline.metrics.similarity import best


@register
class Detection(Metric):
    """Every latent as a detector of the true feature its decoder row is nearest to: it fires, or it does not.

    Means over latents; of a latent that never fires, or whose feature is in no row, what is undefined counts 0.
    """

    name = "detection"
    needs = ("directions", "truth", "coefficients")
    figures = (
        Figure("detection_f1", "F1 of latents", "mean over latents of the harmonic mean of precision and recall", "high"),
        Figure("detection_precision", "precision of latents", "mean share of a latent's rows that its nearest true feature is in", "high", "evaluation"),
        Figure("detection_recall", "recall of latents", "mean share of the rows with that feature in which the latent fires", "high", "evaluation"),
    )  # fmt: skip

    def __init__(self, learned: Tensor, truth: Tensor) -> None:
        """learned: directions [m, d]. truth: features [G, d]; those of zeros are shown by no row."""
        self._feature = best(learned, truth) if truth.any() else None
        self._sums = torch.zeros(3, len(learned), dtype=torch.float64)  # both, it fires, its feature is there
        self.rows = 0

    @classmethod
    def of(cls, subject: Subject) -> Detection:
        assert subject.truth is not None
        return cls(subject.dictionary.W_dec.detach().cpu(), subject.truth)

    def compare(self, batch: Encoded, coefficients: Tensor) -> None:
        if self._feature is None:
            return
        assert batch.codes is not None
        fires = batch.codes.dense().detach() != 0
        self._feature, self._sums = self._feature.to(fires.device), self._sums.to(fires.device)
        there = coefficients[:, self._feature] > 0
        self._sums += torch.stack([(fires & there).sum(0), fires.sum(0), there.sum(0)])
        self.rows += len(fires)

    def result(self) -> dict[str, Value]:
        if not self.rows:
            return dict.fromkeys(one.key for one in self.figures)
        hits, fired, there = self._sums.cpu()
        precision, recall = hits / fired.clamp(min=1), hits / there.clamp(min=1)
        f1 = 2 * hits / (fired + there).clamp(min=1)
        return {
            "detection_f1": f1.mean().item(), "detection_precision": precision.mean().item(),
            "detection_recall": recall.mean().item(),
        }  # fmt: skip
