"""docs/extending.md holds: its six files are found in a copy of the package, and its commands and Python work."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|console)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
FILES = {found[1]: text for _, text in BLOCKS if (found := re.match(r"# (pipeline/\S+)\n", text))}

# What the page says, in order, and then what is to be seen of it: in one process, as importing torch takes a while.
DRIVER = """
import contextlib, io, json, sys
from sae import cli

def typed(*words):
    sys.argv = ["sae", *words]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cli.main()
        except SystemExit as left:
            assert not left.code, (words, left.code)
    return out.getvalue()

for kind, what in json.loads(sys.argv[1]):
    exec(what, {}) if kind == "python" else typed(*what)
found = {
    "list": json.loads(typed("list", "--json")),
    "settings": json.loads(typed("list", "--settings", "--json"))["settings"],
    "compare": json.loads(typed("compare", "--json", "--csv", "all.csv"))["runs"],
    "study": json.loads(open("studies/widths/results.json").read()),
    "eval": json.loads(open("runs/first/eval/eval.json").read()),
    "config": json.loads(open("runs/first/config.json").read()),
    "help": typed("study", "widths", "--help"),
}
open("found.json", "w").write(json.dumps(found))
"""


def extended(folder: Path) -> Path:
    """A package like ours, of links, with the files of the page in it."""
    package = folder / "sae"
    package.mkdir()
    for path in (ROOT / "sae").glob("*.py"):
        (package / path.name).symlink_to(path.resolve())
    for room in ("cache", "configs"):
        (package / room).symlink_to(ROOT / room)
    for path in (ROOT / "pipeline").rglob("*"):  # what is compiled already, too
        if path.is_file():
            link = package / path.relative_to(ROOT)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    for name, text in FILES.items():
        assert not (package / name).exists()
        (package / name).write_text(text, encoding="utf-8")
    return folder


def steps() -> list[tuple[str, Any]]:
    """The commands (as words) and the other Python of the page, in order."""
    found: list[tuple[str, Any]] = []
    for kind, text in BLOCKS:
        if kind == "console":
            found += [("sae", shlex.split(line[2:])[1:]) for line in text.splitlines() if line.startswith("$ sae ")]
        elif not text.startswith("# pipeline/"):
            found.append((kind, text))
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What there is to see after everything on the page was done."""
    package, home = extended(tmp_path_factory.mktemp("package")), tmp_path_factory.mktemp("home")
    environment = {
        "PYTHONPATH": str(package), "SAE_CACHE": str(home / "cache"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin",
        "HOME": str(home), "COLUMNS": "200",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", DRIVER, json.dumps(steps())],
        cwd=home, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((home / "found.json").read_text())
    found["csv"] = next(csv.DictReader((home / "all.csv").read_text().splitlines()))
    found["plot"] = (home / "studies/widths/plot.png").stat().st_size
    return found


def test_there_is_a_whole_file_of_each_kind() -> None:
    assert [str(Path(name).parent) for name in FILES] == [
        "pipeline/harvest/sources", "pipeline/saes", "pipeline/metrics", "pipeline/formats", "pipeline/analyses",
        "pipeline/studies",
    ]  # fmt: skip
    assert len([what for kind, what in steps() if kind == "sae"]) >= 7


@pytest.mark.parametrize(
    ("registry", "name", "help"),
    [
        ("row_sources", "ring", "Points on noisy circles, each circle in a plane of its own"),
        ("architectures", "capped", "ReLU whose values end at a cap, with an L1 penalty"),
        ("metrics", "worst_row", "The row that is reconstructed worst"),
        ("formats", "npz", "Folders with a dictionary.npz of W_enc [d, m], b_enc [m], W_dec [m, d] and b_dec [d]"),
        ("analyses", "lengths", "How long decoder rows are"),
        ("studies", "widths", "The same dictionary with several numbers of latents"),
    ],
)
def test_each_of_them_is_listed(seen: dict[str, Any], registry: str, name: str, help: str) -> None:
    assert {"name": name, "help": help} in seen["list"][registry]


def test_their_settings_can_be_set(seen: dict[str, Any]) -> None:
    listed = {one["name"]: one["default"] for one in seen["settings"]}
    assert listed["harvest.circles"] == "4" and listed["train.sae.cap"] == "4"
    assert listed["study.widths.widths"] == "1024,4096,16384"
    assert seen["config"]["train"]["sae"]["cap"] == 2
    assert "--widths" in seen["help"] and "Numbers of latents" in seen["help"]


def test_they_work_together(seen: dict[str, Any]) -> None:
    """The rows of the source train the architecture, which the metric judges, also in the study."""
    assert seen["config"]["activations"]["key"].startswith("ring-3") and seen["eval"]["worst_row"] > 0
    runs = {row["run"]: row for row in seen["compare"]}
    assert runs["first"]["sae.arch"] == "capped" and runs["first"]["worst_row"] == seen["eval"]["worst_row"]
    assert "worst_row" in seen["csv"] and seen["plot"] > 1000
    assert [row["d_sae"] for row in seen["study"]["runs"]] == [8, 16]
    assert all(row["worst_row"] > 0 for row in seen["study"]["runs"])
