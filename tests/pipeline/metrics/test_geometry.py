"""Angles of directions, against every pair looked at one by one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import few

from sae.pipeline.metrics.geometry import encoder_decoder_cosine, pairs, random_cosine, welch_bound
from sae.pipeline.saes import coherence


@few
@given(m=st.integers(2, 12), d=st.integers(1, 6), seed=st.integers(0, 99), block=st.sampled_from([1, 7, 1000]))
def test_the_mean_cosine_is_that_of_every_pair(m: int, d: int, seed: int, block: int) -> None:
    table = torch.randn(m, d, generator=torch.Generator().manual_seed(seed))
    table[seed % m] *= seed % 3  # sometimes a row of zeros
    sizes = []
    for i in range(m):
        for j in range(m):
            if i != j:
                norms = table[i].norm().item() * table[j].norm().item()
                sizes.append(abs((table[i] @ table[j]).item()) / norms if norms else 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coherence, "BLOCK_ELEMENTS", block)
        assert pairs(table).mean_abs == pytest.approx(sum(sizes) / len(sizes), abs=1e-6)


def test_the_ends_of_the_scale() -> None:
    assert pairs(torch.eye(5) * 3).mean_abs == 0
    assert pairs(torch.ones(4, 3)).mean_abs == pytest.approx(1)
    assert pairs(torch.ones(1, 3)).mean_abs is None


def test_random_directions_score_what_is_said() -> None:
    table = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    assert pairs(table).mean_abs == pytest.approx(random_cosine(64), rel=0.01)


def test_welchs_bound_is_met_by_a_simplex() -> None:
    simplex = torch.eye(3) - 1 / 3  # three directions at 120 degrees, in a plane
    assert pairs(simplex).mean_abs == pytest.approx(welch_bound(3, 2)) == pytest.approx(0.5)
    assert welch_bound(4, 4) == 0 and welch_bound(8192, 768) == pytest.approx(math.sqrt(7424 / (768 * 8191)))


def test_each_latent_has_its_own_cosine() -> None:
    encoder = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    decoder = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0], [1.0, 0.0]])
    assert encoder_decoder_cosine(encoder, decoder).tolist() == pytest.approx([1, -1, 0, 0.5**0.5])
