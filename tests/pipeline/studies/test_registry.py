"""The registry of studies: a study is one class, and its command, options, YAML and results come of it."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, PositiveInt
from support.command_line import done, sae

from sae.cache.errors import SaeError
from sae.pipeline.commands.described import studies as described
from sae.pipeline.commands.voice import DECLARED
from sae.pipeline.studies.lab import Trial
from sae.pipeline.studies.study import STUDIES, Setup, Study, register, settings, studies, variant

MAKE = "synthesize --rows 20k --d 16 --features 24 --groups 3 --active 2 --set synthesize.validation_rows=100"
SMALL = "--steps 4 --k 2 --set train.batch=64 --set train.initial_rows=64 --set eval.dead_rows=64"


class Widths(Study):
    """The same dictionary with several numbers of latents. It says more.

    Example: `sae study widths --widths 8,16`.
    """

    name = "widths"
    labels = ("width", "order")
    shown = ("fvu", "l0", "dead_fraction")
    decides = ("sae.d_sae",)
    dictionary = ("arch", "k")

    widths: tuple[PositiveInt, ...] = Field((8, 16), description="numbers of latents")
    order: Literal["up", "down"] = Field("up", description="the narrowest first, or last")
    twice: bool = Field(False, description="with twice as many latents")
    scale: float = Field(1.0, gt=0, description="what the learning rate is times the base's")

    def trials(self, setup: Setup) -> list[Trial]:
        base = setup.base.model_copy(update={"lr": setup.base.rate * self.scale})
        return [
            setup.trial({"width": width, "order": self.order}, variant(base, base.sae.arch, d_sae=width))
            for width in sorted((m * (1 + self.twice) for m in self.widths), reverse=self.order == "down")
        ]


@pytest.fixture
def widths() -> Iterator[None]:
    """A study written in a test, known while the test runs."""
    before = dict(DECLARED)
    register(Widths)
    yield
    del STUDIES["widths"]
    DECLARED.clear()
    DECLARED.update(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of synthetic rows, which take no language model."""
    folder = tmp_path_factory.mktemp("cache")
    done(MAKE, "--cache", folder)
    return folder


@pytest.fixture
def home(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_a_study_of_a_file_of_its_own_is_seen_everywhere(home: Path, widths: None) -> None:
    """In `sae list`, its `--help`, options, YAML and `--set`, its runs, its table, plot and JSON, and in compare."""
    entry = {"name": "widths", "help": "The same dictionary with several numbers of latents"}
    assert entry in done("list --json").json["studies"]
    listed = {one["name"]: one for one in done("list --settings --json").json["settings"]}
    assert listed["study.widths.widths"] == {
        "name": "study.widths.widths", "type": "list of int", "default": "8,16", "help": "numbers of latents",
    }  # fmt: skip
    shown = " ".join(done("study widths --help").out.split())
    assert "--widths N,... Numbers of latents. Default: 8,16." in shown
    assert "--order NAME The narrowest first, or last. Default: up." in shown
    assert "--twice With twice as many latents." in shown and "--scale X What the learning rate" in shown
    assert "--arch" in shown and "--d-sae" not in shown
    assert "widths The same dictionary" in " ".join(done("study --help").out.split())

    found = done(f"study widths {SMALL} --json").json
    assert found["study"] == "widths" and [row["width"] for row in found["runs"]] == [8, 16]
    assert all(row["fvu"] > 0 and row["true_to_learned"] is not None for row in found["runs"])
    assert json.loads((home / "studies/widths/results.json").read_text())["runs"] == found["runs"]
    assert len(list(csv.DictReader((home / "studies/widths/table.csv").read_text().splitlines()))) == 2
    assert (home / "studies/widths/plot.png").stat().st_size > 1000
    names = " ".join(row["run"] for row in found["runs"])
    assert [row["fvu"] for row in done(f"compare {names} --json").json["runs"]] == [row["fvu"] for row in found["runs"]]

    (home / "mine.yaml").write_text("study:\n  widths:\n    widths: [4]\n    order: down\n")
    in_file = done(f"study widths {SMALL} --config mine.yaml --json").json
    assert [(row["width"], row["order"]) for row in in_file["runs"]] == [(4, "down")]
    said = done(f"study widths {SMALL} --config mine.yaml --widths 4-6 --set study.widths.twice=true --json").json
    assert [row["width"] for row in said["runs"]] == [12, 10, 8]
    flags = done(f"study widths {SMALL} --widths 4 --twice --scale 0.5 --json").json
    config = json.loads((home / "runs" / flags["runs"][0]["run"] / "config.json").read_text())
    assert (config["train"]["sae"]["d_sae"], config["train"]["lr"]) == (8, pytest.approx(0.35e-3 * 2**0.5))


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--widths 4,x", "--widths x: is not a whole number"),
        ("--widths 0,4", "--widths 0,4: input should be greater than 0"),
        ("--order sideways", "--order sideways: input should be 'up' or 'down'"),
        ("--scale 0", "--scale 0: input should be greater than 0"),
        ("--d-sae 8", "no such option: --d-sae"),
        ("--set study.widths.width=3", "study.widths.width: unknown key; did you mean 'widths'?"),
        ("--set study.widths.widths=[3,3]", "study.widths.widths = [3, 3]: 3 is there twice"),
        ("--set study.rates.ratios=[3]", "--set study.rates.ratios=[3]: `sae study widths` reads study.widths.*"),
        ("--set study.width.widths=[3]", "--set study.width.widths=[3]: `sae study widths` reads study.widths.*"),
        ("--set study.widths.widths=[]", "study.widths: there is nothing to train"),
        ("--set harvest.layer=3", "`sae study` reads train.* and eval.*, and study.widths.*; give this one to"),
        ("--set train.sae.d_sae=8", "this study decides sae.d_sae itself"),
        ("--widths 4 --set study.widths.widths=[5]", "says otherwise; give one of the two"),
    ],
)
def test_what_is_wrong_with_its_settings_is_one_line(home: Path, widths: None, typed: str, says: str) -> None:
    answer = sae(f"study widths {SMALL} {typed}")
    assert answer.code == 2 and says in answer.complaint
    assert not (home / "runs").exists()


def test_a_setting_of_a_stage_in_the_section_of_the_studies(home: Path) -> None:
    (home / "mine.yaml").write_text("study:\n  rates: 3\n")
    assert "study.rates" in sae("study rates --config mine.yaml").complaint
    (home / "mine.yaml").write_text("study:\n  ratios: [3]\n")
    assert (
        "mine.yaml: study.ratios: unknown key; did you mean 'rates'?" in sae("study rates --config mine.yaml").complaint
    )
    assert (
        "--set study.rates.ratios=[3]: `sae train` reads train.*" in sae("train --set study.rates.ratios=[3]").complaint
    )


def test_the_text_of_the_studies_says_what_importing_them_does() -> None:
    read, imported = described(), studies()
    assert list(read) == list(imported) and len(read) >= 5
    for name, kind in imported.items():
        assert read[name].values.get("dictionary", Study.dictionary) == kind.dictionary and (
            kind.__doc__ or ""
        ).startswith(read[name].help[:40])
        assert {*read[name].settings} == {*kind.model_fields}
    assert {*settings().model_fields} == {*imported}


def test_what_no_study_can_be() -> None:
    class Again(Widths):
        name = "rates"

    class Asking(Widths):
        name = "asking"
        more: int = Field(description="without a default")

    with pytest.raises(ValueError, match="study rates: there is one of that name"):
        register(Again)
    with pytest.raises(ValueError, match="study asking: more has no default"):
        register(Asking)
    with pytest.raises(SaeError, match=r"Widths\.widths = .*8 is there twice"):
        Widths(widths=(8, 8))
