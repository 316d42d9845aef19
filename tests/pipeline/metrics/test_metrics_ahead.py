"""Metrics on a device that runs ahead: they ask it for nothing batch by batch, and find what they find on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.saes_kit import DICTIONARIES, D, batches, small
from support.watching import watched
from torch import nn

from sae.cache.device import landing
from sae.pipeline import saes
from sae.pipeline.metrics.figures import available
from sae.pipeline.metrics.jacobian import JacobianCosine
from sae.pipeline.metrics.metric import Encoded, Metric, Places, Subject, Value, metrics_of
from sae.pipeline.saes import Coder, placement

TRUE = 6
EVERYTHING = available(
    model=False, truth=True, coefficients=True, pairs=True, mlp=True, stores=True, text=True
)  # but what is spliced in, which tests/pipeline/evaluate judges
ON_A_DEVICE = available(model=True, truth=True, coefficients=True, pairs=True, mlp=False, stores=True, text=True)


def shown(arch: str) -> tuple[list[Metric], list[list[str]]]:
    """Metrics that were shown two batches of rows, coefficients and training rows, and who waited in each."""
    torch.manual_seed(0)
    several = arch == "clt"
    widths = (5, 7) if several else D
    it = saes.trainable(small({"arch": arch}), widths, widths if several else None)
    drawn = batches(D if several else None, 3)
    it.initialise(*next(drawn))
    truth = torch.randn(TRUE, D)
    subject = Subject(it.eval(), truth, truth, ((0, 1),), nn.Linear(D, D), ("one", "two")[: len(it.widths_out)])
    metrics, waits = metrics_of(subject, EVERYTHING), []

    def show(x: torch.Tensor, y: torch.Tensor, places: Places, coefficients: torch.Tensor) -> None:
        codes = it.encode(x) if isinstance(it, Coder) else None
        batch = Encoded(x, y, codes, it(x) if codes is None else it.decode(codes), places)
        for metric in metrics:
            metric.update(batch)
            metric.compare(batch, coefficients)
            if codes is not None:
                metric.search(codes)

    for _ in range(2):
        x, y = next(drawn)
        y = x if y is None else y
        places = Places(torch.arange(len(x)), torch.arange(len(x)) % 6 - 1)
        coefficients = (x @ truth.T).relu()
        with torch.no_grad():
            waits.append(watched(lambda given=(x, y, places, coefficients): show(*given)).waited)
    return metrics, waits


def told(metrics: list[Metric]) -> dict[str, Value]:
    return {key: value for metric in metrics for key, value in metric.result().items()}


@pytest.mark.parametrize("arch", [*DICTIONARIES, "vae", "nvae", "fsq", "molt", "clt"])
def test_no_metric_waits_and_all_find_what_the_host_finds(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_host = told(shown(arch)[0])
    monkeypatch.setattr(placement, "HOSTS", set())
    metrics, waits = shown(arch)
    # what goes layer by layer looks up which entries are of which layer
    assert waits == [["aten.nonzero.default"] * (4 if arch == "clt" else 0)] * 2
    found: dict[str, Any] = told(metrics)
    assert found.keys() == on_the_host.keys() and ("detection_f1" in found) == (arch in DICTIONARIES)
    for key, value in on_the_host.items():
        assert found[key] == (value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), key


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "l1", "crosscoder"])
def test_no_metric_mixes_what_is_on_the_device_with_what_is_not(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a device without numbers refuses, and the host as its own twin would not notice."""
    monkeypatch.setattr(placement, "HOSTS", set())
    monkeypatch.setattr(landing, "moved", lambda x, device: torch.empty_like(x, device=device))
    it = saes.trainable(small({"arch": arch}), D)
    x = next(batches(None, 1))[0]
    it.initialise(x)
    truth, layer = torch.randn(TRUE, D), nn.Linear(D, D)
    metrics = metrics_of(Subject(it.eval(), truth, truth, ((0, 1),), None, ("one",)), ON_A_DEVICE)
    it, x = it.to("meta"), x.to("meta")
    assert isinstance(it, Coder)
    metrics.append(JacobianCosine.of(Subject(it, mlp=layer.to("meta"))))  # which takes the weights as it is made
    spliced = dict.fromkeys(("sae", "zero", "mean"), (x.new_zeros(3, 5), x.new_zeros(3, 5)))
    rows, tokens = (Places(*x.new_zeros(2, *shape, dtype=torch.int64)) for shape in ((len(x),), (3, 5)))
    with torch.no_grad():
        codes = it.encode(x)
        for metric in metrics:
            for _ in range(2):
                metric.update(Encoded(x, x, codes, it.decode(codes), rows))
                metric.compare(Encoded(x, x, codes, it.decode(codes), rows), x.new_zeros(len(x), TRUE))
                metric.search(codes)
                metric.splice(x.new_zeros(3, 5), spliced, x.new_ones(3, 5, dtype=torch.bool), tokens)
