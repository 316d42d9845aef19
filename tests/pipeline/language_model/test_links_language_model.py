"""Symbolic links in the place of what the demo left: no stage that reads text or runs a model writes through them."""

from pathlib import Path

import pytest
from support.command_line import SMALL_DEMO, done
from support.linking import How, expect_untouched, in_files, in_folders, in_some_files, its_parent, itself

LANGUAGE = (
    "tokenize --preset tiny --workers 1 --set tokenize.tokens=200000", "harvest --preset tiny --device cpu --offline",
    "report demo", "eval demo --device cpu --offline", "demo --device cpu", "cache verify --repair --offline",
)  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `sae demo` leaves."""
    home = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(home / "cache"))
        patch.setenv("SAE_RUNS", str(home / "runs"))
        done("demo --device cpu", *(word for setting in SMALL_DEMO for word in ("--set", setting)))
    return home


@pytest.mark.slow
@pytest.mark.parametrize("how", [in_some_files, in_folders, itself, in_files, its_parent])
def test_nothing_outside_is_touched_by_stages_of_a_language_model(how: How, shown: Path, tmp_path: Path) -> None:
    expect_untouched(how, LANGUAGE, shown, "demo", tmp_path)
