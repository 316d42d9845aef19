"""The small cache that studies are tried on, and where they are carried out."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_studies import first_layer, lab_in, planted_cache, small_stores

from sae.cache.activations import ActivationStore
from sae.pipeline.studies.lab import Lab


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with small_stores():
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    return planted_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def store(cache: Path) -> ActivationStore:
    return first_layer(cache)


@pytest.fixture(scope="module")
def lab(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab_in(cache, tmp_path_factory.mktemp("runs"))
