"""The feature browser in a headless Chromium: what is shown, found, sorted, opened and linked, and text stays text."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chromium import Chromium, chromium
from support.known_latents import BEGIN, D_SAE, NASTY, known

from sae.cache.disk.durable import write_atomic
from sae.pipeline.interpret.statistics import Statistics
from sae.pipeline.report import page as report
from sae.pipeline.report.browser import Explained, browser_html
from sae.pipeline.report.charts import Series, line_chart

SAID: Explained = {7: ("the word that is there", 0.9, 0.5), 30: ("</script><b>loud", 0.6, None)}
pytestmark = pytest.mark.slow  # a browser takes seconds to start

READY = "document.querySelector('#browser').dataset.ready === 'yes' && !!document.querySelector('#b-detail h3')"
OPENED = "document.querySelector('#b-detail h3').textContent"
LISTED = "[...document.querySelectorAll('.row .number')].map((one) => Number(one.textContent))"
COUNT = "document.querySelector('#b-count').textContent"


def written(path: Path, *runs: tuple[str, Statistics, Explained]) -> Path:
    """A page of a chart and a browser alone."""
    chart = line_chart("Loss", [Series("a", [(1, 2), (2, 1)])], x_label="step")
    body = f'<section id="latents">{chart}{browser_html([(*run, ()) for run in runs])}</section>'
    write_atomic(path, report.whole("t", body).encode())
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def chosen(browser: Chromium, select: str, value: str) -> None:
    browser.run(f"(() => {{ const s = document.querySelector('{select}'); s.value = '{value}';"
                "s.dispatchEvent(new Event('change')); })()")  # fmt: skip


def searched(browser: Chromium, text: str) -> None:
    browser.run(f"(() => {{ const s = document.querySelector('#b-search'); s.value = '{text}';"
                "s.dispatchEvent(new Event('input')); })()")  # fmt: skip


def test_the_whole_way(browser: Chromium, tmp_path: Path) -> None:
    """Search, sort, filter, open, link to, and walk by keyboard, in a page of two runs; nothing goes wrong or out."""
    found = known()
    page = written(tmp_path / "a.html", ("one", found, SAID), ("<two>", found, {}))
    browser.open(page)
    browser.wait(READY)
    first = browser.run(LISTED)
    assert len(first) < D_SAE and browser.run(COUNT) == "64 of 64 latents"
    assert browser.run(OPENED) == f"latent {first[0]}" and browser.run("location.hash") == ""
    assert browser.run(
        "!!document.querySelector('figure.chart canvas') && !!document.querySelector('figure.small canvas')"
    )
    tokens = found.frequent.token[first[:6], 0].tolist()
    assert len(set(tokens)) == 6  # what is shown first is diverse

    chosen(browser, "#b-sort", "often")
    assert browser.run(LISTED)[:3] == [40, 39, 38]
    chosen(browser, "#b-sort", "score")
    assert browser.run(LISTED)[:2] == [7, 30]
    chosen(browser, "#b-filter", "never")
    assert browser.run(COUNT) == f"{D_SAE - 38} of 64 latents" and set(browser.run(LISTED)) <= {0, 1, 2, *range(41, 64)}
    chosen(browser, "#b-filter", "all")
    searched(browser, "WORD THAT")
    assert browser.run(LISTED) == [7]
    searched(browser, "12")
    assert browser.run(LISTED)[0] == 12
    searched(browser, "no such thing")
    assert browser.run(COUNT) == "None of the 64 latents matches."
    searched(browser, "")
    chosen(browser, "#b-sort", "number")

    browser.run("document.querySelector('#row-5').click()")
    browser.wait(f"{OPENED} === 'latent 5' && location.hash === '#latent=5'")
    browser.run("document.querySelector('#b-list').focus()")
    browser.press("ArrowDown")
    browser.wait(f"{OPENED} === 'latent 6' && document.querySelector('.row.open').id === 'row-6'")
    browser.press("k")
    browser.wait(f"{OPENED} === 'latent 5'")
    browser.press("/")
    browser.wait("document.activeElement.id === 'b-search'")
    browser.press("j")  # is a letter there
    assert browser.run("document.querySelector('#b-search').value") == "j" and browser.run(OPENED) == "latent 5"
    browser.press("Escape")
    searched(browser, "")
    browser.run("location.hash = '#latent=39'")
    browser.wait(f"{OPENED} === 'latent 39' && !!document.querySelector('#row-39.open')")
    browser.run("location.hash = '#latent=64'")
    assert browser.wait("document.querySelector('#b-detail .missing')?.textContent") == (
        "There is no latent 64: they are 0 to 63."
    )

    browser.open(page, "#latent=20&run=2", dark=True, width=400)
    browser.wait(f"{READY} && {OPENED} === 'latent 20'")
    assert browser.run("document.querySelector('#b-run').selectedOptions[0].textContent") == "<two>"
    assert browser.run("document.documentElement.scrollWidth") == 400
    assert not browser.said


def test_text_stays_text(browser: Chromium, tmp_path: Path) -> None:
    """Tokens, explanations and names that try to be markup are letters; what is invisible is named."""
    found = known()
    browser.open(written(tmp_path / "a.html", ("one", found, SAID)), "#latent=30")
    browser.wait(f"{READY} && {OPENED} === 'latent 30'")
    assert browser.run("document.querySelector('blockquote').textContent").startswith("</script><b>loud score 0.6")
    contexts = browser.run("[...document.querySelectorAll('.contexts p')].map((one) => one.textContent)")
    assert contexts == [
        f"<|endoftext|>{''.join(NASTY[:3])}", " the↵⇥·⁶é", f"{NASTY[3]}{NASTY[4]}U+202E😀"
    ]  # fmt: skip
    marks = browser.run(
        "[...document.querySelectorAll('.contexts mark')].map((one) => [one.className, one.textContent])"
    )
    assert marks == [["a8 peak", NASTY[1]], ["a4 minus peak", " the"], ["a1 peak", NASTY[4]]]
    kinds = "[...document.querySelectorAll('.contexts i')].map((one) => [one.className, one.textContent])"
    assert browser.run(kinds) == [["begin", found.text(BEGIN).decode()], ["unseen", NASTY[3]]]
    foreign = (
        "document.querySelectorAll('#browser img, #browser script, #browser blockquote b, #browser iframe').length"
    )
    assert browser.run(foreign) == 0 and not browser.said


def test_bytes_become_text(browser: Chromium, tmp_path: Path) -> None:
    """A character split over tokens stands where it is complete, and every byte that is none can be seen."""
    browser.open(written(tmp_path / "a.html", ("one", known(), {})))
    browser.wait(READY)
    for tokens, shown in (
        ([b"caf", b"\xc3", b"\xa9", b"!"], ["caf", "<b>c3</b>", "é", "!"]),
        ([b"\xf0\x9f", b"\x98", b"\x80 ok"], ["<b>f0 9f</b>", "<b>98</b>", "😀 ok"]),
        ([b"\x80\x99t", b"x"], ["<b>80</b><b>99</b>t", "x"]),
        ([b"a\xe2\x80"], ["a<b>e2</b><b>80</b>"]),
        ([b"\xe2(", b"\xed\xa0\x80"], ["<b>e2</b>(", "<b>ed</b><b>a0</b><b>80</b>"]),
        ([b"", b"\x00\x1b"], ["<b>∅</b>", "<b>U+0000</b><b>U+001B</b>"]),
        ([b" a  b", b"\n\r\n", b"\n        "], [" a<s>··</s>b", "<s>↵</s><s>␍</s><s>↵</s>", "<s>↵</s><s>·⁸</s>"]),
        (["\u2028\u200b".encode()], ["<b>U+2028</b><b>U+200B</b>"]),
    ):
        given = [one.decode("latin-1") for one in tokens]
        assert browser.run(f"pieces({given!r}).map((nodes) => {{ const p = document.createElement('p');"
                           " p.append(...nodes); return p.innerHTML; })") == shown  # fmt: skip
    seen = "pieces([String.fromCharCode(byte)])[0].map((node) => node.textContent).join('')"
    shown = browser.run(f"Array.from({{length: 256}}, (_, byte) => {seen})")
    assert all(text and "\n" not in text for text in shown) and shown[65] == "A"
