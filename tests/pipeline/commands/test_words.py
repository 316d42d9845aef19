"""Words of the command line that could be taken for something else: each is refused, or means what it looks like."""

import re

import pytest
import typer
from support.command_line import sae
from typer.main import get_command

from sae.cache.errors import SaeError
from sae.pipeline.commands.app import app
from sae.pipeline.commands.words import MOST, amount, several, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [("500", 500), ("300k", 300_000), ("1.5k", 1500), ("10M", 10**7), ("10m", 10**7), ("1e8", 10**8), ("2G", 2 * 10**9),
     ("1,000", 1000), ("1_000", 1000), ("0", 0), ("1,000,000", 10**6), ("12_345_678", 12_345_678), ("1.000k", 1000),
     ("1.5e3", 1500), ("1,000k", 10**6), ("0010", 10)],
)  # fmt: skip
def test_counts(text: str, value: int) -> None:
    assert amount(text) == str(value)


@pytest.mark.parametrize(
    "text",
    ["", "k", "-1", "1.5", "0.5", "1e", "1e60", "9" * 40, "1 0", "ten", "٣", "nan", "inf", "All", "1,2,3", "1,00",
     "1,0000", "1,000_000", "1__000", "1_0", "1,000,", ",100", "1.0", "1.000", "1.000.000", "0x10", "1e-3", "10-20",
     "10MB", "1²"],
)  # fmt: skip
def test_no_counts(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a number of rows or tokens; write 500, 300k, 10M, 1e8 or all"):
        amount(text)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3", [3]), ("0-3", [0, 1, 2, 3]), ("0-3,7", [0, 1, 2, 3, 7]), ("7, 0-1", [7, 0, 1]), ("4-4", [4]), ("08", [8]),
     ("0-10", list(range(11))), (f"0-{MOST - 1}", list(range(MOST)))],
)  # fmt: skip
def test_numbers_and_ranges(text: str, numbers: list[int]) -> None:
    assert whole("--layer", text) == numbers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3-0", "--layer 3-0: goes down; write 0-3"),
        ("-1", "--layer -1: is not a whole number from 0 on, nor a range"),
        ("0--3", "--layer 0--3: is not a whole number"),
        ("0-3-5", "--layer 0-3-5: is not a whole number"),
        ("0-", "--layer 0-: is not a whole number"),
        ("1.0", "--layer 1.0: is not a whole number"),
        ("٣", "--layer ٣: is not a whole number"),
        ("0x1", "--layer 0x1: is not a whole number"),
        ("6,6", "--layer 6,6: 6 is there twice"),
        ("0-3,2", "--layer 0-3,2: 2 is there twice"),
        ("1,,2", "--layer 1,,2: between two commas nothing stands"),
        ("1,", "--layer 1,: between two commas nothing stands"),
        (f"0-{MOST}", f"--layer 0-{MOST}: that is more than 10,000 numbers; name fewer"),
        ("0-999999999", "that is more than 10,000 numbers"),
        ("99999999999999999999", "is not a whole number"),
    ],
)
def test_no_numbers(text: str, says: str) -> None:
    with pytest.raises(SaeError, match=re.escape(says)):
        whole("--layer", text)


def test_lists() -> None:
    assert several("--site", None) is None and whole("--layer", None) is None
    assert several("--site", "a, b") == ["a", "b"]
    with pytest.raises(SaeError, match="--site a,b,a: a is there twice"):
        several("--site", "a,b,a")


def commands(group: typer.core.TyperGroup, name: str = "") -> dict[str, typer.core.TyperCommand]:
    found = {}
    for key, one in group.commands.items():
        inner = isinstance(one, typer.core.TyperGroup)
        found |= commands(one, f"{key} ") if inner else {f"{name}{key}": one}
    return found


COMMANDS = commands(get_command(app))  # type: ignore[arg-type]
OPTIONS = [
    pytest.param(name, param, id=f"{name} {param.opts[0]}")
    for name, command in COMMANDS.items()
    for param in command.params
    if not getattr(param, "is_flag", False)
]


def typed(name: str, param: typer.core.TyperOption, word: str) -> str:
    """The words of a command in which one has an odd value, and what it cannot do without has one."""
    needed = [
        (other.opts[0] if other.opts[0].startswith("--") else "", "x")
        for other in COMMANDS[name].params
        if other.required and other is not param
    ]
    option = max(param.opts, key=len) if param.opts[0].startswith("-") else ""
    return " ".join([name, *(f"{one} {value}" for one, value in needed), option, f"'{word}'"])


@pytest.mark.parametrize("word", ["", " "])
@pytest.mark.parametrize(("name", "param"), OPTIONS)
def test_an_empty_word_is_nothing_that_could_be_meant(name: str, param: typer.core.TyperOption, word: str) -> None:
    """Every option and argument of every command."""
    answer = sae(typed(name, param, word))
    assert (answer.code, answer.out) == (2, "")
    assert answer.complaint.endswith(" is empty; say what is meant, or leave it out")


WHOLE = [case for case in OPTIONS if case.values[1].type_descriptor.annotation is int]  # type: ignore[union-attr]


@pytest.mark.parametrize("word", ["0-5", "1.0", "٣", "1,2"])
@pytest.mark.parametrize(("name", "param"), WHOLE)
def test_what_is_no_whole_number(name: str, param: typer.core.TyperOption, word: str) -> None:
    """pydantic, which reads them, takes 0-5 for -5 and 1.0 for 1."""
    answer = sae(typed(name, param, word))
    assert (answer.code, answer.out) == (2, "")
    assert f"{word}: input should be a valid integer" in answer.complaint


def test_there_are_options_to_try() -> None:
    assert len(OPTIONS) > 150 and len(WHOLE) > 30


@pytest.mark.parametrize("variable", ["SAE_CACHE", "SAE_RUNS"])
def test_variables(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one is none, as everywhere; one of blanks is a mistake."""
    command = "cache ls" if variable == "SAE_CACHE" else "list"
    monkeypatch.setenv(variable, "  ")
    assert f"(or {variable}) is empty" in sae(command).complaint


def test_an_option_twice() -> None:
    """Of a list the user may mean both; of another the last counts, which is said."""
    answer = sae("harvest --layer 4 --layer 6")
    assert (answer.code, answer.complaint) == (2, "--layer is there twice; give it once, with commas: 4,6")
    answer = sae("train --lr 1 --lr 0")
    assert answer.err.splitlines()[0] == "--lr: is there 2 times; 0 counts" and answer.code == 2
    assert "times" not in sae("train --set train.lr=0 --set train.sae.k=0 --sweep a=1 --sweep b=1").err
