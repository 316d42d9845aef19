"""Counting by kernels against torch's own operations: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.saes_kit import one_thread

pytest.importorskip("triton")

from sae.pipeline.saes import counting, kernels
from sae.pipeline.saes.kernels import counting as by_kernels
from sae.pipeline.saes.sparse import SparsePattern

single = pytest.fixture(autouse=True, scope="module")(one_thread)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's; conftest.py asks for it
NAN, INF = torch.nan, torch.inf


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    if DEVICE == "cpu":
        monkeypatch.setattr(by_kernels, "BLOCK", 16)
        monkeypatch.setattr(by_kernels, "VALUES", 16)


def both_ways(call: Callable[[], Any]) -> Any:
    """What the plain way gives, which the kernels give, too."""
    found = call()
    with kernels.chosen("plain"):
        plain = call()
    torch.testing.assert_close(found, plain, equal_nan=True)
    return plain


def test_who_fired() -> None:
    random = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(21, generator=random)[:5] for _ in range(9)]).to(DEVICE)
    values = torch.rand(9, 5, generator=random).round(decimals=1).to(DEVICE)
    values[0, 0], values[1, 1], values[2] = NAN, -1.0, 0.0
    found = both_ways(lambda: counting.fired(values, SparsePattern.per_row(indices, 21)))
    assert found.dtype == torch.int64 and found.sum() == (values != 0).sum() < 41


@pytest.mark.parametrize(("rows", "newest"), [(7, 1.0), (1, 0.01)])
def test_how_long_ago_and_how_often(rows: int, newest: float) -> None:
    fired = (torch.arange(40, device=DEVICE) % 3).clamp(max=rows)
    start = torch.arange(40, device=DEVICE) * 10**12, torch.linspace(0, 1, 40, device=DEVICE)

    def followed() -> tuple[torch.Tensor, torch.Tensor]:
        since, rate = start[0].clone(), start[1].clone()
        counting.follow_(since, rate, fired, rows, newest)
        return since, rate

    since, _ = both_ways(followed)
    assert since[0] == rows and not since[1] and since[3] == 3 * 10**12 + rows


@pytest.mark.parametrize(
    ("some", "least"),
    [([3.0, 0.5, 0.0, -2.0], 0.5), ([0.0, -1.0], NAN), ([INF, 0.0], NAN), ([NAN, 2.0], 2.0), ([1e-40, 1.0], 1e-40)],
)
def test_the_least_value_above_nothing(some: list[float], least: float) -> None:
    values = torch.tensor(some * 5, device=DEVICE).view(5, -1)
    found = both_ways(lambda: counting.least(values))
    torch.testing.assert_close(found, torch.tensor([least], device=DEVICE), equal_nan=True)


def test_a_threshold_follows_what_was_kept() -> None:
    """Evenly while batches are few, not at all where one kept nothing, and as the newest where none counts yet."""

    def led() -> tuple[torch.Tensor, torch.Tensor]:
        threshold = torch.zeros((), device=DEVICE)
        batches = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for seen, counts in ((4.0, False), (NAN, False), (2.0, True), (NAN, True), (1.0, True), (3.0, True)):
            counting.lead_(threshold, batches, torch.tensor([seen], device=DEVICE), counts, 0.4)
        return threshold, batches

    threshold, batches = both_ways(led)
    assert threshold.item() == pytest.approx(1.5 + 0.4 * (3 - 1.5)) and batches.item() == 3
