"""The library speaks of settings and calls, the command line of options and commands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from sae.cache.errors import SaeError
from sae.cache.store.codecs import codec
from sae.pipeline.commands.app import app, less_at_once
from sae.pipeline.commands.voice import options, typed

ROOT = Path(__file__).resolve().parents[3]
OTHER_PROGRAMS = ("dask worker", "torchrun")  # their options are called as they call them
LIBRARY = [
    path
    for top in ("cache", "configs", "pipeline", "sae")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "commands" not in path.parts
]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("codec = int9: no such codec", "--codec int9: no such codec"),
        ("d_sae = 8: a = b: too few", "--d-sae 8: a = b: too few"),
        ("overrides = train.lr: write it as x", "--set train.lr: write it as x"),
        ("resume = True: no such run", "--resume: no such run"),
        ("sweep = ...: that is 5,000", "--sweep: that is 5,000"),
        ("outliers = 1: has no option", "outliers = 1: has no option"),
        ("train.lr = x: of a file, as it stands there", "train.lr = x: of a file, as it stands there"),
        ("a.yaml: codec = int9: as it stands there", "a.yaml: codec = int9: as it stands there"),
        ("try a smaller `context`, or `tokenize.context = 8`", "try a smaller --context, or --context 8"),
        ("`train.align.by`", "--align"),
        ("`harvest.dtype = bfloat16` halves it", "--set harvest.dtype=bfloat16 halves it"),
        ("or `tokenize.min_tokens`", "or tokenize.min_tokens"),
        ("leave it out with `cross_entropy = False`", "leave it out with --no-ce"),
        ("`harvest()` again", "`sae harvest` again"),
        ("`verify(key-1, repair=True)`", "`sae cache verify key-1 --repair`"),
        ("`evaluate(RUN)` does; `choices()` shows", "`sae eval RUN` does; `sae list` shows"),
        ("`train(sweep=...)`", "`sae train --sweep`"),
        ("`harvest(model=my llama, layer=0,4)`", "`sae harvest --model 'my llama' --layer 0,4`"),
        ("`sae cache ls` and `x y` stay", "`sae cache ls` and `x y` stay"),
        ("", ""),
    ],
)
def test_what_the_library_says_in_the_words_of_the_command_line(line: str, said: str) -> None:
    assert typed(line) == said


def test_a_study_says_how_it_takes_what_it_has_no_option_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sae", "study", "denoise"])
    assert typed("batch = 4096: too many; lower it") == "--set train.batch=4096: too many; lower it"
    assert typed("past = 3: too few") == "--past 3: too few"
    monkeypatch.setattr("sys.argv", ["sae", "train"])
    assert typed("batch = 4096: too many") == "--batch 4096: too many"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("harvest --layer 3", ", as with --workers or --device cpu"), ("tokenize", ", as with --workers"),
        ("eval", ", as with --device cpu"), ("cache verify --json", ", as with --device cpu"), ("cache ls", ""),
        ("study rates", ", as with --d-sae or --device cpu"), ("synthesize --rows 3", ""), ("xyzzy", ""),
    ],
)  # fmt: skip
def test_where_memory_runs_out_the_command_has_what_is_to_be_tried(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["sae", *words.split()])
    assert less_at_once() == f"ask for less at once{said}"


def test_an_error_names_the_setting_in_python() -> None:
    with pytest.raises(SaeError, match=r"^codec = int9: no such codec; there are int8") as error:
        codec("int9")
    assert typed(str(error.value)).startswith("--codec int9: no such codec")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a module but for docstrings and asserts; `{}` stands for the value in an f-string."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    silent |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.Assert) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in silent:
            silent |= {id(part) for part in node.values}
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_library_names_no_options_and_no_commands(path: Path) -> None:
    for line, text in texts(path):
        if not any(program in text for program in OTHER_PROGRAMS):
            assert not re.search(r"(?<![\w-])--[a-z]|\bsae (?:cache |study )?[a-z]+`", text), (line, text)


def test_what_the_library_names_can_be_typed() -> None:
    """What stands in backticks is an option there is, a call a command; most messages begin with an option's value."""
    known, group = options(), typer.main.get_command(app)
    paths = {f"sae {name}" for name in group.commands}  # type: ignore[attr-defined]
    paths |= {f"sae cache {name}" for name in group.commands["cache"].commands}  # type: ignore[attr-defined]
    said = [(path.name, line, text) for path in LIBRARY for line, text in texts(path)]
    heads = [place for place in said if re.match(r"[a-z][a-z0-9_]* = [^ ]+: ", place[2])]
    marked = [(*place, part) for place in said for part in re.findall("`([a-z][^`]*)`", place[2])]
    marked = [place for place in marked if not place[3].startswith(OTHER_PROGRAMS)]
    assert len(heads) > 100 and len(marked) > 50
    settings = {"outliers", "recordings", "revision"}  # that have no option
    for place in heads:
        option = re.match(r"--[a-z0-9-]+", typed(place[2]))
        assert (option and option[0] in known) or place[2].partition(" ")[0] in settings, place
    for *place, part in marked:
        told = typed(f"`{part}`").strip("`")
        for option in re.findall(r"--[a-z0-9-]+", told):
            assert option in known, (place, told)
        assert not told.startswith("sae ") or any(f"{told} ".startswith(f"{path} ") for path in paths), (place, told)
