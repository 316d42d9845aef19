"""What is said where an optional package is absent, or does not work."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from sae.cache.errors import SaeError, needing

ROOT = Path(__file__).resolve().parents[2]


def said(what: str, extra: str, imported: str) -> str:
    with pytest.raises(SaeError) as raised, needing(what, extra):
        __import__(imported)
    return str(raised.value)


def test_a_package_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'log = wandb: needs the package nowhere, which is not installed; `pip install "sae-cache[wandb]"`'
    assert said("log = wandb", "wandb", "nowhere") == text
    monkeypatch.setitem(sys.modules, "umap", None)
    assert "needs the package umap, which" in said("x", "umap", "umap.parametric")


def test_a_package_that_is_there_and_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_build.py").write_text("raise ImportError('libx.so.1: cannot open')")
    (tmp_path / "half_installed.py").write_text("import nowhere_else")
    monkeypatch.syspath_prepend(tmp_path)
    assert said("x", "eeg", "broken_build").startswith("x: needs a package that fails (libx.so.1: cannot open); `pip")
    assert "needs the package nowhere_else, which" in said("x", "eeg", "half_installed")


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), needing("x", "eeg"):
        _ = 1 / 0
    with needing("x", "eeg"):
        pass


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [path.read_text(encoding="utf-8") for room in ("cache", "pipeline") for path in (ROOT / room).rglob("*.py")]
    named = {name for text in texts for name in re.findall(r"needing\([^\n]*?(?:, |extra=)\"(\w+)\"\)", text)}
    assert {"s3", "eeg"} <= named <= set(extras)
    loggers = {path.stem for path in (ROOT / "pipeline" / "loggers").glob("*.py")} - {"__init__", "base"}
    assert loggers <= set(extras)
