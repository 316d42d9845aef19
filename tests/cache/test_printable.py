"""What others wrote moves no cursor, turns no line, runs no script and computes no cell."""

import csv
import io
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import some

from sae.cache.printable import printable
from sae.pipeline.commands import console
from sae.pipeline.commands.bars import Bars
from sae.pipeline.report.compare import as_csv
from sae.pipeline.report.escaping import escape

HOSTILE = [
    "\x1b[2J\x1b[31mred", "\x9b31m", "a\rb", "a\nb", "a\x08b", "a\x7f", "\u202ecod.exe", "\u2066a", "a\u200bb",
    "a\u2028b", "\ufeffa", "\x85", "\udcff", "\x1b]8;;http://x\x07y", "[red]a[/red]", "[/nothing]", "\U000e0041",
]  # fmt: skip


@some
@given(st.text(st.characters()))
def test_every_text_is_one_line_that_can_be_seen(text: str) -> None:
    said = printable(text)
    assert said.encode() is not None and len(said.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", said)
    assert printable(said) == said


def test_what_can_be_seen_stays() -> None:
    for text in ("", "plain", "é ü 漢字 😀 · → …", "[red]a[/red]", "a\\b"):
        assert printable(text) == text
    assert printable("\x1b[2J\u202e") == "\\x1b[2J\\u202e"


@pytest.mark.parametrize("text", HOSTILE)
def test_the_terminal_obeys_nothing_of_others(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables (title, columns, cells), lines, outlines, notes, bars, questions, errors."""
    console.table(text, [text, "n"], [[text, 1], ["b", [text]]])
    console.say(text)
    console.outline({text: {"inner": text, "list": [text, {"a": text}]}})
    console.evaluation({"fvu": 0.5}, text)
    bars = Bars()
    bars.start(text, 2, "rows")
    bars.advance(1, **{text: text})
    bars.finish()
    bars.note(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    console.agreed(text)
    console.complain(text)
    said = "".join(capsys.readouterr())
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e\u2066\ufeff\udcff\U000e0041]", said)
    visible = printable(text)
    assert said.count(visible) >= 8 or "\n" in text or "\x85" in text or "\u2028" in text


def test_html_of_names() -> None:
    assert escape("<a href=\"x\" on='y'>&\u202e") == "&lt;a href=&quot;x&quot; on=&#x27;y&#x27;&gt;&amp;\\u202e"
    assert escape("</script><!--\u2028\nb") == "&lt;/script&gt;&lt;!--\\u2028\nb"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =cmd|' /C calc'!A0", "＝1", "'=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    rows = list(csv.reader(io.StringIO(as_csv([{"run": text, "lr": -0.5, "k": -3, "none": None, text: [text]}]))))
    assert rows[1][1:4] == ["-0.5", "-3", ""]
    for cell in (rows[0][4], rows[1][0], rows[1][4]):
        assert not cell.lstrip().startswith(("=", "+", "-", "@", "＝"))
        assert cell.isprintable()
