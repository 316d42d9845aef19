"""Which rows lie too far out: one number, and whatever reads rows by it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import CHUNK, N, few, shrunk, write_activations
from torch import Tensor

from sae.cache.activations import ActivationStore
from sae.cache.errors import SaeError
from sae.cache.loader.dataset import Dataset
from sae.cache.loader.loader import Loader
from sae.cache.outliers import largest_norm, usual_norm
from sae.cache.window_buffer import norms_of

FAR = 7  # every so-manyth row
LARGEST = 5e4


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk():
        yield


def numbered() -> Tensor:
    """Rows (n, size) from 1 on: those whose number is a multiple of FAR are 100 times larger than the others."""
    number = torch.arange(1.0, N + 1)
    return torch.stack([number, torch.where(number % FAR == 0, 1e6, 1e4)], dim=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, small: None) -> ActivationStore:
    return write_activations(tmp_path_factory.mktemp("cache"), numbered(), "float32", ended=True)


def kept_after(store: ActivationStore, first: int) -> list[int]:
    return [n for n in of(store.rows(first, N)) if n % FAR]


def of(rows: Tensor) -> list[int]:
    return [round(n) for n in rows[:, 0].tolist()]


def test_the_largest_norm_is_that_of_the_first_window_whatever_comes_after(tmp_path: Path) -> None:
    rows = numbered()
    begun = write_activations(tmp_path, rows[:CHUNK], "float32")
    before = largest_norm(begun, 5.0)
    assert before == pytest.approx(5e4, rel=1e-2)
    grown = write_activations(tmp_path, torch.cat([rows[:CHUNK], 9 * rows[CHUNK:]]), "float32", ended=True)
    assert grown.n_rows == N and largest_norm(grown, 5.0) == before


def test_norms_of_rows_are_those_that_are_stored(tmp_path: Path) -> None:
    """So that a row is left out wherever it is met, in a store or on its way through the model."""
    rows = 30 * torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    there = write_activations(tmp_path, rows, "int8", ended=True)
    assert torch.equal(norms_of(rows[torch.from_numpy(there.positions(0, N))]), torch.from_numpy(there.norms(0, N)))


def test_rows_of_zeros_have_no_usual_norm(tmp_path: Path) -> None:
    zeros = write_activations(tmp_path, torch.zeros(N, 3), "float32", ended=True)
    assert usual_norm(zeros) == 0
    with pytest.raises(SaeError, match=r"outliers = 10: the first rows of .* are all zero; leave it unset"):
        largest_norm(zeros, 10)


@few
@given(st.integers(0, N - 1), st.integers(1, N), st.integers(1, N), st.integers(1, 50), st.booleans())
def test_some_rows_are_the_next_that_are_kept(
    store: ActivationStore, first: int, count: int, rows: int, batch: int, limited: bool
) -> None:
    first = min(first, rows - 1)
    stored = of(store.rows(0, rows))
    circle = [n for n in stored[first:] + stored[:first] if not (limited and n % FAR == 0)]
    dataset = Dataset.of(store, rows=rows).kept_up_to((LARGEST,) if limited else None)
    found = [one.x for one in dataset.following(first, count, batch)]
    assert all(0 < len(one) <= batch for one in found)
    assert [n for one in found for n in of(one)] == circle[:count]


def test_kept_and_others_are_all(store: ActivationStore) -> None:
    dataset = Dataset.of(store).kept_up_to((LARGEST,))
    others = [one.x for one in dataset.left_out(N, 2)]
    assert all(len(one) <= 2 for one in others)
    far = [n for one in others for n in of(one)]
    kept = [n for one in dataset.in_order(N) for n in of(one.x)]
    assert sorted(far) == list(range(FAR, N + 1, FAR)) and sorted(kept + far) == list(range(1, N + 1))
    everything = dataset.kept_up_to(None)
    assert [n for one in everything.in_order(N) for n in of(one.x)] == of(store.rows(0, N))
    assert not list(everything.left_out(N, 2)) and of(dataset.sample(4, first=CHUNK).x) == kept_after(store, CHUNK)[:4]
    with Loader(store, 16, epochs=1, largest=LARGEST) as loader, Loader(store, 16, epochs=1, outliers=5.0) as same:
        batches = [of(x) for x in loader]
        assert batches == [of(x) for x in same]
        assert sorted(n for one in batches for n in one) == sorted(kept)
        state = loader.state_dict()
    with Loader(store, 16) as other, pytest.raises(SaeError, match=r"of largest = 50000.0, this loader has None"):
        other.load_state_dict(state)


def test_too_few_that_are_kept(store: ActivationStore) -> None:
    kept = N - N // FAR
    dataset = Dataset.of(store).kept_up_to((LARGEST,))
    dataset.expect_kept(kept, "batch")
    with pytest.raises(SaeError, match=rf"batch = {kept + 1}: train.outliers leaves {kept} of the {N} rows of synth"):
        dataset.expect_kept(kept + 1, "batch")
