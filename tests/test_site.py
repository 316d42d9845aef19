"""The site: mkdocs builds it without a warning, it loads nothing from elsewhere, its reference says what is there."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import PAGES

import sae
from sae.configs import SECTIONS
from sae.pipeline.commands.registry_listing import every_setting
from sae.pipeline.metrics.figures import declared
from sae.pipeline.saes import ARCHITECTURES
from scripts import docs_reference

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["'](?:https?:)?//""")


def rows(page: str, heading: str) -> Iterator[list[str]]:
    """The cells of the tables below a heading."""
    section = re.split(r"^## ", page.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    for line in section.splitlines():
        if line.startswith("| ") and "---" not in line:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_a_command_has_its_options_and_examples() -> None:
    page = docs_reference.commands()
    options = dict(rows(page, "sae cache verify"))
    assert "`--repair`" in options and options["`--cache DIR` `SAE_CACHE`"].startswith("Folder of the cache")
    assert "$ sae cache verify --repair" in page and "\n## sae study alignment\n" in page


def test_a_setting_has_type_default_and_meaning() -> None:
    page = docs_reference.settings()
    assert {one["name"].partition(".")[0] for one in every_setting()} == {*SECTIONS}, "as `--config` promises"
    assert ["`train.batch`", "int, at least 1"] in [row[:2] for row in rows(page, "train")]
    (packing,) = (row for row in rows(page, "tokenize") if row[0] == "`tokenize.packing`")
    assert packing[1:3] == ["concat or document", "`concat`"] and packing[3].startswith("concat: documents end to end")
    assert ["`train.betas`", "list of float"] in [row[:2] for row in rows(page, "train")]


def test_architectures_have_their_name_in_python_and_their_own_settings() -> None:
    page = docs_reference.architectures()
    for name, kind in ARCHITECTURES.items():
        assert f"\n## {name}\n" in page and f"`sae.{kind.__name__}`" in page
    named = set(re.findall(r"`sae\.(\w+)`", page))
    assert named <= set(dir(sae))
    assert "`k`" in [row[0] for row in rows(page, "topk")] and "`k`" not in [row[0] for row in rows(page, "l1")]


def test_figures_have_meaning_and_direction() -> None:
    page = docs_reference.metrics()
    for metric in declared():
        found = {row[0]: row for row in rows(page, metric.name)}
        for figure in metric.figures:
            assert found[f"`{figure.key}`"][3] == {"low": "lower", "high": "higher", None: ""}[figure.better]


def test_what_else_can_be_chosen_is_all_there() -> None:
    from sae.pipeline.commands.registry_listing import choices

    assert set(docs_reference.HEADINGS) == set(choices([])) - {"runs", "architectures", "metrics"}
    assert "`gpt2`" in [row[0] for row in rows(docs_reference.choices(), "Presets")]


def test_the_python_door_has_every_public_name() -> None:
    page = docs_reference.python()
    listed = set(re.findall(r"^## `sae\.(\w+)`", page, re.MULTILINE))
    assert set(dir(sae)) - listed == {kind.__name__ for kind in ARCHITECTURES.values()} | {"__version__"}


def test_text_is_escaped() -> None:
    assert docs_reference._plain("a_b * `c_d` <x> | y") == r"a\_b \* `c_d` \<x> \| y"
    assert docs_reference._table(["a"], [["one\ntwo | three"]]).splitlines()[2] == r"| one two \| three |"


@pytest.mark.slow
def test_the_site_is_built_and_stands_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict: a link or an anchor that leads nowhere, a page in no menu, a docstring that is not found ends it."""
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config("mkdocs.yml", site_dir=str(tmp_path), strict=True))
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.html")}
    wanted = {name.removeprefix("docs/") for name in PAGES} | set(docs_reference.PAGES)
    assert set(pages) == {name.removesuffix(".md") + ".html" for name in wanted} | {"404.html"}
    for name, text in pages.items():
        assert not OUTSIDE.search(text), name
    assert "exact resumption" in pages["index.html"]  # taken in from the README
    assert "the stages are its methods" in pages["reference/python.html"]  # a docstring
    assert "fonts.googleapis" not in "".join(path.read_text("utf-8") for path in tmp_path.rglob("*.css"))


def test_everything_that_is_there_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    named = re.findall(r": ([\w/-]+\.md)$", menu, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {name.removeprefix("docs/") for name in PAGES} | set(docs_reference.PAGES)


def test_extras_on_the_page_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = PAGES["docs/places.md"].split("## Extras")[1].split("## ")[0]
    listed = {
        name
        for line in table.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert listed == set(extras) - {"dev"}
