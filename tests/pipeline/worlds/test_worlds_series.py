"""The series of known noise: its signal and its noise have the power that is said, and a seed says all of it."""

import numpy as np
import pytest

from sae.pipeline.worlds.series import BLOCK, Noisy, NoisySeries


def whole(**settings: float) -> tuple[np.ndarray, np.ndarray]:
    """The series of some settings, and what is of it without noise: float64 [steps, channels]."""
    made = list(NoisySeries(Noisy.model_validate(settings)).blocks())
    return np.concatenate([one.noisy for one in made]), np.concatenate([one.clean for one in made])


@pytest.mark.parametrize("snr", [-6.0, 0.0, 12.0])
def test_signal_and_noise_have_the_power_that_is_said(snr: float) -> None:
    noisy, clean = whole(channels=6, steps=60_000, snr=snr, seed=1)
    assert clean.var(0) == pytest.approx(np.ones(6), abs=0.25)
    assert 10 * np.log10(clean.var() / (noisy - clean).var()) == pytest.approx(snr, abs=0.6)


def test_a_longer_series_begins_as_a_shorter_one() -> None:
    short, long = whole(channels=2, steps=BLOCK + 7)[0], whole(channels=2, steps=2 * BLOCK + 1)[0]
    assert len(long) == 2 * BLOCK + 1 and np.array_equal(long[: BLOCK + 7], short)
    assert not np.array_equal(whole(channels=2, steps=BLOCK + 7, seed=1)[0], short)


def test_it_goes_on_over_the_edge_of_a_block() -> None:
    """The signal's steps are as small there as elsewhere."""
    clean = whole(channels=3, steps=2 * BLOCK)[1]
    jumps = np.abs(np.diff(clean, axis=0)).max(1)
    assert jumps[BLOCK - 1] < 2 * np.quantile(jumps, 0.99)


def test_one_source_is_enough() -> None:
    assert np.linalg.matrix_rank(whole(channels=3, sources=1, steps=500)[1]) == 1
