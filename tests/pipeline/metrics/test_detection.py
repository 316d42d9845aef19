"""Latents as detectors of their features: planted ones, and the slow count."""

import pytest
import torch

from sae.pipeline.metrics.detection import Detection
from sae.pipeline.metrics.metric import Encoded
from sae.pipeline.metrics.recovery import Recovery
from sae.pipeline.saes import Latents


def test_the_counts_of_every_latent_batch_by_batch() -> None:
    random = torch.Generator().manual_seed(0)
    truth, learned = torch.randn(5, 8, generator=random), torch.randn(7, 8, generator=random)
    true = torch.where(torch.rand(400, 5, generator=random) < 0.3, 1.0, 0.0)
    codes = torch.where(torch.rand(400, 7, generator=random) < 0.2, 1.0, 0.0)
    codes[:, 3] = 0  # a dead latent counts 0
    metric = Detection(learned, truth)
    for part in torch.arange(400).split(150):
        x = torch.zeros(len(part), 8)
        metric.compare(Encoded(x, x, Latents.of_dense(codes[part]), x), true[part])
    f1s = []
    for latent in range(7):
        feature = max(range(5), key=lambda i: float(torch.cosine_similarity(learned[latent], truth[i], dim=0)))
        fires, there = codes[:, latent] > 0, true[:, feature] > 0
        hits = int((fires & there).sum())
        precision, recall = hits / max(int(fires.sum()), 1), hits / int(there.sum())
        f1s.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert metric.result()["detection_f1"] == pytest.approx(sum(f1s) / 7)
    assert f1s[3] == 0


def test_the_true_dictionary_detects_all_and_is_unique() -> None:
    truth = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    true = torch.tensor([[1.0, 0, 2, 0, 0, 0], [0, 1, 0, 1, 0, 3], [1, 0, 0, 0, 1, 0]])
    metric = Detection(truth, truth)
    metric.compare(Encoded(true @ truth, true @ truth, Latents.of_dense(true), true @ truth), true)
    assert set(metric.result().values()) == {1.0}
    assert Recovery(truth, truth).result()["uniqueness"] == 1.0
    assert Recovery(truth[[0, 0, 1]], truth).result()["uniqueness"] == pytest.approx(2 / 3)


def test_no_feature_is_shown() -> None:
    metric = Detection(torch.eye(3), torch.zeros(2, 3))
    x = torch.zeros(1, 3)
    metric.compare(Encoded(x, x, Latents.of_dense(x), x), torch.zeros(1, 2))
    assert set(metric.result().values()) == {None}
