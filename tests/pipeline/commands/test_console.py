"""What a person sees, and what a program reads: tables, outlines and JSON on stdout, bars and errors on stderr."""

import io
import json
import re

import pytest
from rich.console import Console

from sae.pipeline.commands import bars as bars_module
from sae.pipeline.commands import console
from sae.pipeline.commands.bars import Bars
from sae.pipeline.metrics.figures import evaluation_table

KEY = "gpt2-6.mlp_out-fineweb-10BT-gpt2-128-validation-int8-0a1b2c3d"  # as long as keys become


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> io.StringIO:
    """A terminal in place of stdout ("out") or stderr ("err")."""
    file = io.StringIO()
    monkeypatch.setattr(console, name, Console(file=file, force_terminal=True, width=width, highlight=False))
    return file


def plain(text: str) -> str:
    """What a terminal shows, without its control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_a_table_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut or folded, no frames, no trailing blanks, and columns line up."""
    rows = [[KEY, 5, "yes"], ["short", 12_345, "no"]]
    console.table("stores", ["key", "rows", "complete"], rows)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "stores"
    assert [line.split() for line in lines] == [
        ["key", "rows", "complete"],
        [KEY, "5", "yes"],
        ["short", "12,345", "no"],
    ]
    assert lines[1].index("5  yes") + 1 == lines[2].index("12,345") + len("12,345")
    assert all(line == line.rstrip() and line.isascii() for line in lines)


@pytest.mark.parametrize("width", [30, 80, 200])
def test_a_table_on_a_terminal_never_cuts_a_name(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    seen = on_a_terminal(monkeypatch, "out", width)
    console.table("stores", ["key", "rows"], [[KEY, 5], ["b", 12_345_678]])
    shown = plain(seen.getvalue())
    assert KEY in shown and "12.35M" in shown and "…" not in shown
    assert ("──" in shown) == (width > len(KEY) + 10)  # the frame is for tables that fit


def test_a_word_of_prose_wider_than_the_terminal_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["folder"] * 30)
    console.table("runs", ["name", "what it is"], [["none yet", f"{path} is where they would be"]], prose=True)
    assert path in capsys.readouterr().out


def test_only_prose_folds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{' '.join(f'word{i}' for i in range(30))} {KEY}"
    console.table("list", ["name", "what it is"], [["one", words]], prose=True)
    in_a_pipe = capsys.readouterr().out.splitlines()
    seen = on_a_terminal(monkeypatch, "out", 70)
    console.table("list", ["name", "what it is"], [["one", words]], prose=True)
    for lines, width in ((in_a_pipe, 80), (plain(seen.getvalue()).splitlines(), 70)):
        assert max(map(len, lines)) <= width and KEY in lines[-1]
        assert " ".join(" ".join(lines[2:]).split()) == f"one {words}"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_too_wide_for_the_screen_comes_in_blocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    """Every cell is there once, in the line with its row's number; nothing is wider than 80 columns."""
    seen = on_a_terminal(monkeypatch, "out", 80) if terminal else None
    columns = ["run", *(f"figure_{i}" for i in range(20))]
    rows = [[f"{KEY}-{row}", *(f"value_{row}_{i}" for i in range(20))] for row in range(11)]
    console.table("runs", columns, rows)
    lines = (plain(seen.getvalue()) if seen else capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    words = [line.split() for line in lines[1:]]
    for row, cells in enumerate(rows, 1):
        assert [cell for line in words if line[0] == str(row) for cell in line[1:]] == cells
    assert [word for line in words if line[0] == "#" for word in line[1:]] == columns


def test_markup_in_data_is_data(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console.table("[b]", ["[i]x"], [["[red]key[/red]"]])
    console.say("[bold]")
    assert capsys.readouterr().out == "[b]\n[i]x\n[red]key[/red]\n[bold]\n"
    seen = on_a_terminal(monkeypatch, "out", 60)
    console.table("t", ["x"], [["[red]key[/red]"]])
    assert "[red]key[/red]" in plain(seen.getvalue())


def test_an_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("stores", ["key", "rows"], [])
    assert capsys.readouterr().out == "stores\nkey  rows\n"


def test_json_is_one_value(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not finite has no JSON and becomes null."""
    console.as_json({"a": float("nan"), "b": [float("inf"), 1.5, (2, "x")], "c": {"d": None, "e": True}})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": None, "b": [None, 1.5, [2, "x"]], "c": {"d": None, "e": True}}
    assert captured.err == ""


def test_an_outline(capsys: pytest.CaptureFixture[str]) -> None:
    console.outline({"key": KEY, "recipe": {"split": "train", "files": [{"name": "a"}], "d": 5}, "none": {}, "x": None})
    assert capsys.readouterr().out.splitlines() == [
        f"key: {KEY}", "recipe:", "  split: train", '  files: {"name": "a"}', "  d: 5", "none: {}", "x: null",
    ]  # fmt: skip


def test_a_complaint_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("--x [1]: wrong\nin two lines " + "long " * 50)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sae: error: --x [1]: wrong in two lines long") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), ("x", "x"), (0, "0"),
        (12_345, "12,345"), (1_234_567, "1.23M"), (2e9, "2.00G"), (0.0123456, "0.01235"),
        (1234.5, "1,234"), (-3_000_000, "-3.00M"),
    ],
)  # fmt: skip
def test_short_numbers(value: float | str | None, text: str) -> None:
    assert console.short(value) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")]
)
def test_sizes(n: float, text: str) -> None:
    assert console.size(n) == text


def test_bars_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line now and then, and one at the end; nothing where there was nothing to do."""
    clock = [0.0]
    monkeypatch.setattr(bars_module.time, "monotonic", lambda: clock[0])
    bars = Bars()
    bars.start("nothing", 100, "rows", done=100)
    bars.finish()
    assert capsys.readouterr().err == "" and not bars.worked
    bars.start("harvest", 1000, "rows", done=200)
    for _ in range(4):
        clock[0] += 10
        bars.advance(100, loss=0.5)
    bars.finish()
    bars.note("a [note]")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "harvest: 400 of 1,000 rows, 10 rows/s, 60 s left, loss 0.5",
        "harvest: 600 of 1,000 rows, 10 rows/s, 40 s left, loss 0.5",
        "harvest: 600 of 1,000 rows in 40.0 s (10 rows/s)",
        "a [note]",
    ]
    assert captured.out == "" and bars.worked


def test_the_last_figures_stay_in_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they come with one step in many; no line ends in a comma, and another task begins without them."""
    clock = [0.0]
    monkeypatch.setattr(bars_module.time, "monotonic", lambda: clock[0])
    bars = Bars()
    for title, fields in (("train", {"loss": 0.5, "fvu": 0.25}), ("eval", {})):
        bars.start(title, None if title == "eval" else 10, "steps")
        for step in range(2):
            clock[0] += 20
            bars.advance(1, **(fields if step == 0 else {}))
    assert capsys.readouterr().err.splitlines() == [
        "train: 1 of 10 steps, 0.05 steps/s, 180 s left, loss 0.5  fvu 0.25",
        "train: 2 of 10 steps, 0.05 steps/s, 160 s left, loss 0.5  fvu 0.25",
        "eval: 1 steps, 0.05 steps/s",
        "eval: 2 steps, 0.05 steps/s",
    ]


def test_steps_of_minutes_have_a_rate_and_a_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich forgets what came more than half a minute ago; the time left runs on between two steps."""
    seen = on_a_terminal(monkeypatch, "err", 120)
    clock = [1000.0]
    monkeypatch.setattr(bars_module.time, "monotonic", lambda: clock[0])
    bars = Bars()
    bars.start("harvest train", 10_000, "rows")
    assert bars._bar is not None
    for seconds, n in ((90, 1000), (100, 0)):
        clock[0] += seconds
        if n:
            bars.advance(n)
        bars._bar.refresh()
    bars._bar.stop()
    shown = plain(seen.getvalue())
    assert "11.11 rows/s" in shown and "0:13:30" in shown and "0:11:50" in shown


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("title", ["train", f"verify {KEY}"])
def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int, title: str) -> None:
    """One line, with the rate and the time left; the values beside it are whole or absent."""
    seen = on_a_terminal(monkeypatch, "err", width)
    clock = [0.0]
    monkeypatch.setattr(bars_module.time, "monotonic", lambda: clock[0])
    bars = Bars()
    bars.start(title, 200_000_000, "tokens")
    for _ in range(2):  # a rate takes two
        clock[0] += 10
        bars.advance(25_000_000, loss=0.12345678, fvu=0.5, l0=32.0, dead=0.0123)
    assert bars._bar is not None
    bars._bar.refresh()
    bars.finish()
    drawn = [line for line in re.split(r"[\r\n]", plain(seen.getvalue())) if "tokens/s" in line]
    assert len(drawn) > 1
    *lines, last = drawn
    for line in lines:
        assert title[:8] in line and "M/200.00M" in line and len(line.rstrip()) <= width
        assert re.search(r"\d:\d\d:\d\d|-:--:--", line), line
        assert re.fullmatch(r".*(?:-|\d)(?:  ?loss 0\.1235(?:  fvu 0\.5(?:  l0 32(?:  dead 0\.0123)?)?)?)?\s*", line), (
            line
        )
    assert last.startswith(f"{title}: 50,000,000 of 200,000,000 tokens in")


@pytest.mark.parametrize(("width", "encoding"), [(100, "utf-8"), (100, "ascii"), (40, "utf-8"), (21, "utf-8")])
def test_the_courses_of_values_are_drawn_below_the_bar(
    monkeypatch: pytest.MonkeyPatch, width: int, encoding: str
) -> None:
    """A line each, within the terminal and in its letters; beside the bar where there is no room for them below."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(console, "err", Console(file=file, force_terminal=True, width=width, highlight=False))
    bars = Bars()
    bars.start("train", 3000, "steps")
    for step in range(3000):
        bars.advance(1, **({} if step % 2 else {"loss": 2.0 - step / 2000, "dead": float("nan"), "note": "a"}))
    assert bars._bar is not None
    file.seek(0)
    file.truncate()
    bars._bar.refresh()
    file.seek(0)
    lines = plain(file.read()).splitlines()
    drawn = [line.rstrip() for line in lines if line.startswith("  loss 0.501 ")]
    sparks = {"utf-8": "█▇▆▅▄▃▂▁", "ascii": "#%*+=-._"}[encoding]
    bars._bar.stop()
    if width == 21:
        assert not drawn
        return
    (line,) = drawn
    course = line.removeprefix("  loss 0.501 ")
    assert len(line) <= width and len(course) == min(60, width - 14)
    assert [*dict.fromkeys(course)] == [*sparks], "it falls evenly, and all of it is there"
    assert not any("dead" in one and sparks[0] in one for one in lines)


def test_a_course_keeps_a_bounded_number_of_values_and_the_last() -> None:
    course = bars_module.Course()
    for value in range(10_000):
        course.tell(float(value))
    assert len(course._samples) < bars_module.KEPT
    assert course.drawn(8, plain=True) == "_.-=+*%#" and course.last == 9999


def test_what_a_terminal_has_no_letter_for_is_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setattr(console, "out", Console(highlight=False))
    console.spell_what_has_no_letter()
    console.say("café")
    file.seek(0)
    assert file.read() == "caf\\xe9\n"


def test_the_table_of_an_evaluation_over_two_sets_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    kept = {"fvu": 0.125, "largest_norm": 321.5}
    console.evaluation({"fvu": 0.5, "duplicates": 3, "kept": kept}, "run x")
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.split() for line in lines if line}
    assert found["figure"][1:3] == ["value", "kept"] and found["fvu"][1:3] == ["0.5", "0.125"]
    assert found["duplicates"][1:3] == ["3", "learned"]
    assert lines[-1] == "kept: over rows of a norm up to 321.5; the others lie far out"
    console.evaluation(
        {"fvu": 0.5, "kept": kept | {"largest_norm": None, "largest_norm_target": 7.5}}, "of a transcoder"
    )
    assert "kept: over rows of a norm up to 7.5; the others lie far out" in capsys.readouterr().out


def test_the_table_of_an_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure with what it means; an undefined one is a dash."""
    every = evaluation_table()
    console.evaluation({one.key: 0.25 for one in every} | {"ce_recovered_zero": None}, "run x")
    lines = capsys.readouterr().out.splitlines()
    figures = [line for line in lines[2:] if not line.startswith(" ")]
    assert [line.split()[0] for line in figures] == [one.key for one in every]
    text = " ".join(" ".join(lines).split())
    assert all(one.meaning in text for one in every)
    assert max(map(len, lines)) <= 80
    assert "-" in next(line for line in lines if line.startswith("ce_recovered_zero")).split()


STEERING = {  # what a name may hold that steers a terminal, hides from the eye or is markup: how it is shown
    "\x1b[2J\x1b]0;owned\x07": r"\x1b[2J\x1b]0;owned\x07",
    "\x9b31m\x90\x9c": r"\x9b31m\x90\x9c",
    "a\rb\bc\x00\x7f": r"a\rb\x08c\x00\x7f",
    "\u202egnp.exe\u2066\u200f": r"\u202egnp.exe\u2066\u200f",
    "zero\u200bwidth\ufeff\U000e0041": r"zero\u200bwidth\ufeff\U000e0041",
    "half \udc1b": r"half \udc1b",
    "[/red] [bold]x[/bold] [link=file:///x]y": "[/red] [bold]x[/bold] [link=file:///x]y",
    ":warning: naïve 日本語 e\u0301": ":warning: naïve 日本語 e\u0301",
}


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", STEERING, ids=range(len(STEERING)))
def test_nothing_that_is_shown_steers_the_terminal(monkeypatch: pytest.MonkeyPatch, terminal: bool, name: str) -> None:
    """In tables, outlines, notes, errors, questions and bars; markup is shown as it is written."""
    seen = io.StringIO()
    for stream in ("out", "err"):
        drawn = Console(file=seen, force_terminal=terminal, width=200, highlight=False, color_system=None)
        monkeypatch.setattr(console, stream, drawn)
    monkeypatch.setattr("sys.stdin", io.StringIO("no\n"))
    console.table(name, [name, "n"], [[name, 1]])
    console.table(name, [name, "n"], [[name, name]], prose=True)
    console.outline({name: {name: name, "list": [name, 1]}, "empty": {}})
    console.say(name)
    console.complain(name)
    assert not console.agreed(name)
    bars = Bars()
    bars.note(name)
    bars.start(name, 2, "rows")
    bars.advance(1, **{name: name})
    bars.finish()
    shown = plain(seen.getvalue()).replace("\n", "")
    if not terminal:
        assert seen.getvalue().count(STEERING[name]) == 16 - ("\r" in name)  # the lines of an error are one
    assert not {c for c in shown if not c.isprintable()} - ({"\r"} if terminal else set())


def test_json_holds_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    console.as_json({name: [name] for name in STEERING})
    printed = capsys.readouterr().out
    assert printed.isascii() and all(c.isprintable() or c == "\n" for c in printed)
    assert json.loads(printed) == {name: [name] for name in STEERING}
