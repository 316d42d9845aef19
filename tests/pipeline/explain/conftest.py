"""A run whose latents' tokens are known."""

import pytest
from support.planted_text import planted

from sae.cache.runs import Run
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.runtime.workplace import Workplace


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def run(planted_run: Run) -> Run:
    """The same, with nothing explained yet."""
    for path in [*planted_run.path.glob("explain/*"), *planted_run.path.glob("eval/explanations.json")]:
        path.unlink()
    return planted_run


@pytest.fixture
def place(run: Run) -> Workplace:
    return Workplace(run.path.parents[1] / "cache", run.path.parent, Silent(), "cpu")
