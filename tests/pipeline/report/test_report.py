"""The report of a run: whole, well-formed, self-contained, and safe whatever the text says."""

import base64
import gzip
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.known_latents import LEVELS, NASTY, known
from support.small_stores import activation_recipe

from sae.cache.errors import DamagedStore
from sae.cache.printable import printable
from sae.cache.runs import EXPLANATIONS, Run
from sae.pipeline.interpret.explanations import Explained, Explanations
from sae.pipeline.report import browser
from sae.pipeline.report import page as report
from sae.pipeline.report.charts import MOST_POINTS, Series, bars, histogram, line_chart, scatter
from sae.pipeline.report.numbers import number, steady
from sae.pipeline.report.page import write_report
from sae.pipeline.report.scores import density_html

VOID = {"meta", "br", "input", "link", "img", "hr", "base"}


class Page(HTMLParser):
    """Elements in document order with their attributes and own text; asserts that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[tuple[str, int]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append((tag, len(self.elements) - 1))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, index in self.open:
            self.texts[index] += data

    def all(self, tag: str, kind: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        """(attributes, text) of the elements of a tag, of a class where one is given."""
        found = zip(self.elements, self.texts, strict=True)
        return [
            (a, text) for (name, a), text in found
            if name == tag and (kind is None or kind in (a.get("class") or "").split())
        ]  # fmt: skip


def charts(page: Page) -> list[dict[str, Any]]:
    """What every chart of a page says is on it."""
    return [json.loads(str(a["data-chart"])) for a, _ in page.all("figure") if "data-chart" in a]


EVALUATION: dict[str, Any] = {
    "fvu": 0.1234, "explained_variance": 0.8766, "l0": 31.9, "dead_fraction": 0.25, "ce_clean": 3.1, "ce_spliced": 3.3,
    "ce_zero": 9.5, "ce_mean": 6.1, "ce_recovered_zero": 0.97, "ce_recovered_mean": None, "kl": 0.2, "rows": 4096,
    "tokens": 65536, "details": {"dead_rows": 8192, "<i>": [1, 2.5, None, "<u>"], "many": list(range(99)), "on": True},
}  # fmt: skip


def make(folder: Path, *, steps: int = 40, judged: bool = True, recipe: dict[str, Any] | None = None) -> Run:
    given = activation_recipe(16) | {"model": {"model": "gpt2"}, "layer": 6}
    given["tokens"] |= {"source": {"source": "hub", "dataset": "<fineweb>"}, "context_length": 128}
    run = Run.create(
        folder / "topk<&>",
        {
            "train": {"sae": {"arch": "topk", "d_sae": 64, "k": 32}, "lr": 1e-4, "steps": None},
            "activations": {"key": "gpt2-6.mlp_out-ab12", "rows": 4096, "recipe": given if recipe is None else recipe},
        },
    )
    for step in range(1, steps + 1):
        late = 0.01 if step > 4 else 0.0
        run.log(
            {
                "step": step, "rows": 64 * step, "loss": 100 / step + late, "loss_reconstruction": 100 / step,
                "loss_auxk": late, "fvu": 1 / step, "l0": 32.0, "dead": 0.0, "lr": 1e-4, "threshold": 0.5,
                "seconds": 0.5 * step,
            }
        )  # fmt: skip
    if judged:
        run.write_json("eval/eval.json", EVALUATION)
        known().write(run)
        density = np.geomspace(1e-5, 0.5, 64).astype(np.float32)
        density[:16] = 0
        fired = density > 0
        fired[:3] = True
        run.save_latents({"density": torch.from_numpy(density), "fired": torch.from_numpy(fired)})
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    out = write_report(make(folder), folder / "new" / "report.html")
    return out.read_text("utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_structure(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a, _ in page.all("a")]
    assert {f"#{name}" for name in ("numbers", "training", "density", "geometry", "latents", "settings")} <= set(links)
    assert {str(link)[1:] for link in links} <= set(ids)
    assert [text for _, text in page.all("h1")] == ["gpt2 · layer 6 · mlp_out"]
    assert len(page.all("section", "part")) == 6 and len(page.all("div", "card")) == 4
    assert [one["kind"] for one in charts(page)] == [
        "bars",
        *["lines"] * 6,
        "bars",
        "bars",
    ]  # CE, curves, density, cosines
    plots = page.all("div", "plot")
    assert len(plots) == 9 and all(a["role"] == "img" and a["aria-label"] for a, _ in plots)


def test_numbers(page: Page) -> None:
    rows = re.findall(r"(?m)^(.+?)$", "\n".join(text for _, text in page.all("tr")))
    told = {name: next(row for row in rows if row.startswith(name)) for name in ("FVU", "L0", "dead", "KL")}
    assert "0.1234" in told["FVU"] and "31.9" in told["L0"] and "25.0 %" in told["dead"] and "0.2" in told["KL"]
    assert any(row.startswith("CE recovered, of mean–") for row in rows)  # undefined is shown as such, not as 0
    cards = [text for _, text in page.all("div", "card")]
    assert cards[0].startswith("Variance explained87.7 %") and "+0.200 nats" in cards[2]
    assert "never fired on 8,192 rows" in cards[3]
    about = page.all("section", "part")[2][1]
    assert "16 never do (3 of them do on training rows)" in about
    details = page.all("details")[0][1]
    assert "<i>" in details and "1, 2.5, –, <u>" in details and "… 75 more" in details and "true" in details


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"source": "hub", "dataset": "HuggingFaceFW/fineweb"}, "HuggingFaceFW/fineweb"),
        ({"source": "files", "files": [{"name": f"{n}.txt"} for n in "abcde"]}, "a.txt, b.txt, c.txt and 2 more"),
        ({"source": "python"}, "python"),
    ],
)
def test_where_the_text_came_from(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    recipe = activation_recipe(16)
    recipe["tokens"] = {**recipe["tokens"], "source": source}
    shown = Page(report.page([report.read(make(tmp_path, recipe=recipe))]))
    assert shown.all("p", "lede")[0][1].endswith(f", from the text of {said}.")


def test_figures_say_on_how_much_and_over_which_rows(tmp_path: Path) -> None:
    run = make(tmp_path)
    plain = Page(report.page([report.read(run)]))
    assert plain.all("section", "part")[0][1].startswith(
        "How good it isJudged on 4,096 rows and 65,536 predictions of docu"
    )
    run.write_json("eval/eval.json", {**EVALUATION, "kept": {**EVALUATION, "fvu": 0.0456, "largest_norm": 512.5}})
    both = Page(report.page([report.read(run)]))
    assert "Rows of a norm above 512.5 lie far out" in both.all("section", "part")[0][1]
    assert "FVU 0.1234; 0.0456 without rows that lie far out" in both.all("section", "part")[0][1]
    rows = [text for _, text in both.all("tr")]
    assert "all rowskept" in rows[0] and any(row.startswith("FVU") and "0.12340.0456" in row for row in rows)


def unpacked(page: Page, name: str) -> Any:
    """A part of the browser's data."""
    (data,) = [text for a, text in page.all("script") if a.get("id") == name]
    return json.loads(gzip.decompress(base64.b64decode(data, validate=True)))


def test_what_the_browser_is_given(page: Page) -> None:
    """Every latent in the list once, those in full in parts; a latent's record says what the statistics say."""
    found = known()
    index = unpacked(page, "index-0")
    assert sorted(index["order"]) == list(range(64)) and index["order"][-1] not in found.live
    words = dict(zip(index["ids"], index["words"], strict=True))
    assert all(words[token].encode("latin-1") == found.text(token) for token in words)
    part = unpacked(page, "part-0-0")
    assert len(part) == 64
    for latent in (3, 5, 9):
        feature, told = found.feature(latent), part[latent]
        assert (told["f"], index["density"][latent], index["max"][latent]) == (
            feature.fired, feature.density, feature.max
        )  # fmt: skip
        shown = [*feature.top, *(e for band in feature.bands for e in band.examples)]
        for one, (band, value, peak, position, document, tokens, values) in zip(shown, told["t"], strict=True):
            assert (value, peak, position, document, tokens) == (
                one.value, one.peak, one.position, one.document, one.tokens
            )  # fmt: skip
            assert values == one.activations and (band == 0) == (one in feature.top)
        assert [token for token, _ in told["u"]] == [one.token for one in feature.promoted]


def test_untrusted_text_stays_text(text: str, page: Page) -> None:
    scripts = page.all("script")
    assert [a for a, _ in scripts][-2:] == [{}, {}] and all(a["type"] == "text/plain" for a, _ in scripts[:-2])
    assert all(re.fullmatch("[A-Za-z0-9+/=]+", data) for _, data in scripts[:-2])
    assert not {tag for tag, _ in page.elements} & {"img", "iframe", "object", "embed", "link", "u", "base", "form"}
    assert not [name for _, a in page.elements for name in a if name.startswith("on") or name == "style"]
    assert not any(nasty in text for nasty in NASTY if nasty != "&amp;")
    assert "<fineweb>" in page.all("p", "lede")[0][1] and page.all("title")[0][1].endswith("topk<&>")
    assert "\u202e" not in text


FOREIGN = "</script><!--<script>\"'onerror=x\x1b[2J\x00\x9b\u2028\u202e&lt;${body}"


def foreign(value: Any) -> Any:
    """JSON with FOREIGN in the place of every text and at the end of every name."""
    if isinstance(value, dict):
        return {f"{name}{FOREIGN}": foreign(inner) for name, inner in value.items()}
    return (
        [foreign(inner) for inner in value] if isinstance(value, list) else FOREIGN if isinstance(value, str) else value
    )


def test_every_text_of_a_run_stays_text(tmp_path: Path) -> None:
    """Its name, its settings and their names, what it was trained on, metrics, figures, features."""
    found = report.read(make(tmp_path))
    (source,) = found.seen.inputs
    recipe = source.recipe
    assert found.evaluation is not None and found.statistics is not None
    found = found._replace(
        name=FOREIGN,
        config={"train": foreign(found.config["train"]), "activations": foreign(recipe)} | {"more": foreign(recipe)},
        seen=found.seen._replace(
            inputs=(
                source._replace(
                    key=FOREIGN,
                    recipe={**recipe, "model": {"model": FOREIGN}, "site": FOREIGN}
                    | {"tokens": {**recipe["tokens"], "source": {"source": "hub", "dataset": FOREIGN}}},
                ),
            )
        ),
        metrics=[{**line, FOREIGN: 0.5, f"loss_{FOREIGN}": 0.25} for line in found.metrics],
        evaluation={**found.evaluation, "details": foreign(found.evaluation["details"])},
        statistics=found.statistics.said_of({"stores": [FOREIGN], "split": FOREIGN}),
    )
    found.config["train"]["sae"] = found.config["train"].pop(f"sae{FOREIGN}")
    text = report.page([found])
    page = Page(text)
    assert text.count("<script") == text.count("</script") == len(page.all("script")) and "<!--" not in text
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    shown = printable(FOREIGN)
    assert shown in page.all("title")[0][1] and shown in page.all("footer")[0][1]
    assert all(shown in text for _, text in [*page.all("figcaption")[1:2], *page.all("dl", "tree")])
    assert any(FOREIGN in one["name"] for chart in charts(page) for one in chart["series"])


def test_nothing_is_requested(text: str, page: Page) -> None:
    """No address of anything outside, and a content policy that would refuse one."""
    library = page.all("script")[-2][1]
    assert library.startswith("/*! https://github.com/leeoniya/uPlot (v1.6.32) */\n") and report.UPLOT == "1.6.32"
    own = text.replace(library, "").replace(page.all("pre")[-1][1], "")
    assert not re.search(r"https?:|(?<!\w)//\w|@import|url\(", own)
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|innerHTML|eval\(", own)
    assert not [a for _, a in page.elements if {"src", "srcset", "data", "action", "poster"} & a.keys()]
    assert all(str(a["href"]).startswith("#") for a, _ in page.all("a"))
    policies = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv")]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'; style-src 'unsafe-inline'; script")


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_its_ground(dark: bool) -> None:
    """WCAG 2 contrast of at least 4.5 for every text colour, in both schemes."""
    style = (Path(report.__file__).parent / "web" / "page.css").read_text("utf-8")
    light, at_night = style.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", at_night if dark else light))

    def luminance(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(text, ground) for text in ("ink", "soft", "faint", "accent") for ground in ("paper", "card")]
    for text, ground in [*pairs, *(("on", f"a{level}") for level in range(1, LEVELS + 1))]:
        high, low = sorted((luminance(text), luminance(ground)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_same_run_same_bytes(tmp_path: Path) -> None:
    run = make(tmp_path)
    first = write_report(run, tmp_path / "a.html").read_bytes()
    assert write_report(Run(run.path), tmp_path / "b.html").read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_a_run_that_was_not_judged(tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path, judged=False), tmp_path / "a.html").read_text("utf-8"))
    assert [t for _, t in page.all("p", "missing")] == [
        "This run has not been judged yet: sae eval topk<&>", "Not counted yet: sae eval topk<&>",
        "Not looked up yet: sae report topk<&>",
    ]  # fmt: skip
    assert len(page.all("figure", "chart")) == 6


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """Rows that come from no model, nothing logged."""
    rows = {"source": {"source": "synthetic"}, "split": "train", "d": 3, "codec": activation_recipe()["codec"]}
    page = Page(write_report(make(tmp_path, steps=0, judged=False, recipe=rows), tmp_path / "a").read_text("utf-8"))
    assert page.all("h1")[0][1] == "gpt2-6.mlp_out-ab12" and "21.3 for each" in page.all("p", "lede")[0][1]
    assert "No step has been logged yet." in page.all("section", "part")[1][1]


@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_curves_of_any_length(tmp_path: Path, steps: int) -> None:
    page = Page(write_report(make(tmp_path, steps=steps), tmp_path / "a.html").read_text("utf-8"))
    lines = [one for one in charts(page) if one["kind"] == "lines"]
    assert len(lines) == 6 and all(len(one["x"]) <= MOST_POINTS and one["x"][-1] == steps for one in lines)
    assert all(len(each["y"]) == len(one["x"]) for one in lines for each in one["series"])
    assert [each["name"] for each in lines[0]["series"]] == ["total", "reconstruction", "auxk"]


def test_nothing_defined(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.write_json("eval/eval.json", dict.fromkeys(EVALUATION) | {"details": EVALUATION["details"]})
    run.save_latents({"density": torch.zeros(64)})
    page = Page(write_report(run, tmp_path / "a.html").read_text("utf-8"))
    assert page.all("div", "card")[0][1] == "Variance explained–FVU –"
    assert charts(page)[-2]["series"][1]["y"][0] == 64  # none of them ever fires


@pytest.mark.parametrize("name", ["eval/statistics.safetensors", "eval/latents.safetensors", "eval/eval.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    run = make(tmp_path)
    (run.path / name).write_bytes(b"{")
    with pytest.raises(DamagedStore, match=re.escape(Path(name).name)):
        write_report(run, tmp_path / "a.html")


def test_density_bins_hold_every_latent() -> None:
    density = np.array([1.0, 0.1, 1e-6, 0.0, 3e-4])
    (chart,) = charts(Page(density_html(density, None)))
    assert sum(count or 0 for one in chart["series"] for count in one["y"]) == 5
    assert chart["names"][0] == "never" and chart["series"][1]["y"][0] == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1, "1"), (12345, "12,345"), (1234.56, "1,235"), (1.5e6, "1.5M"), (2.5e9, "2.5G"), (0.012, "0.012"),
        (3e-7, "3e-7"), (-0.5, "-0.5"), (100.0, "100"), (1e-12, "1e-12"),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text


def test_steady_digits() -> None:
    assert [steady(v) for v in (51.04, 5, 123.4, 999.9, 1234, 0.0012)] == [
        "51.0", "5.00", "123", "1,000", "1,234", "0.00120"
    ]  # fmt: skip


@pytest.mark.parametrize(("l0s", "log"), [((8.0, 8.01), False), ((8.0, 64.0), True), ((0.0, 64.0), False)])
def test_few_l0s_have_an_axis_without_decades(l0s: tuple[float, ...], log: bool) -> None:
    """Between the ticks 1 and 10 of a logarithmic axis, dictionaries of an L0 of 8 would lie on the edge."""
    (chart,) = charts(Page(scatter("s", [("r", "k", l0, 0.1) for l0 in l0s], x_label="L0")))
    assert chart["x_log"] is log


def test_letters_of_charts_are_of_whole_pixels() -> None:
    """uPlot takes the digits before `px`: of 11.5px it makes 11.10px on a screen with two pixels a pixel."""
    script = report._web("charts.js")
    assert re.search(r"const SIZE = \d+, ", script) and not re.search(r"\d\.\d+px", script)


def test_charts_of_odd_data() -> None:
    """Numbers out of any sense, single points, nothing at all: JSON without NaN, nothing unescaped."""
    sizes = (1.7976931348623157e308, -1.7976931348623157e308, 5e-324, 1e-300, 0.0, 1.0)
    drawn = "".join(
        line_chart("<t>", [Series("<x>", [(1.0, a), (2.0, b), (3.0, c)])], x_label="step", ratios=c > 0)
        for a, b, c in itertools.product(sizes, repeat=3)
    )
    drawn += line_chart("one", [Series('"', [(1.0, 5.0)])], x_label="step") + bars("b", ["<a>"], [1e308])
    drawn += histogram("h", [], [0.1, 1.0], never=3) + scatter("s", [("<r>", "k", 0.0, 1.0)], x_label="L0")
    assert not line_chart("none", [Series("x", [])], x_label="step")
    for chart in charts(Page(drawn)):
        values = [y for one in chart["series"] for y in one["y"] if y is not None]
        assert all(abs(y) <= 1e30 for y in values) and (not chart.get("y_log") or min(values) > 0)


def test_a_share_smaller_than_any_row_is_none(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.save_latents({"density": torch.full((64,), 5e-324, dtype=torch.float64)})
    with pytest.raises(DamagedStore, match="latents"):
        write_report(run, tmp_path / "a.html")


def test_the_axis_of_densities_is_that_of_what_there_is() -> None:
    """No empty half to the left of the first bar, nor one to the right of the last."""
    (chart,) = charts(Page(density_html(np.array([0.0, 2e-3, 3e-3, 0.02]), None)))
    counts = [y for y in chart["series"][0]["y"] if y is not None]
    assert counts[0] and counts[-1] and sum(counts) == 3


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    """A table and points for all, a line a run, each one's own parts to unfold, and a browser that knows them all."""
    runs = [make(tmp_path / "a"), make(tmp_path / "b", steps=5)]
    runs[1].path.rename(tmp_path / "b" / "other")
    runs[1] = Run(tmp_path / "b" / "other")
    page = Page(write_report(runs, tmp_path / "a.html").read_text("utf-8"))
    found = charts(page)
    assert [one["kind"] for one in found[:2]] == ["scatter"] * 2 and found[0]["names"] == ["topk<&>", "other"]
    assert [one["name"] for one in next(c for c in found if c["kind"] == "lines")["series"]] == ["topk<&>", "other"]
    assert len(page.all("details", "run")) == 6 and [text for _, text in page.all("option")] == ["topk<&>", "other"]
    assert unpacked(page, "index-1")["order"] == unpacked(page, "index-0")["order"]


def test_of_very_many_latents_fewer_contexts_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    found = known()
    monkeypatch.setattr(browser, "MOST_CONTEXTS", 3)
    monkeypatch.setattr(browser, "FEW", 1)
    part = unpacked(Page(browser.browser_html([("one", found, {}, ())])), "part-0-0")
    assert [[context[0] for context in part[latent]["t"]] for latent in (3, 5)] == [[0, 2], [0, 2]]


def test_explanations_are_shown_where_there_are_any(tmp_path: Path) -> None:
    run = make(tmp_path)
    one = Explained(
        feature=3, explanation="</script> the", score=0.9, control=None, scores=[], control_feature=None, density=0.1,
        backend="tokens", model=None, errors=[],
    )  # fmt: skip
    run.write_json(EXPLANATIONS, Explanations(features=[one], made={}).model_dump(mode="json"))
    page = Page(write_report(run, tmp_path / "a.html").read_text("utf-8"))
    assert unpacked(page, "index-0")["said"] == {"3": ["</script> the", 0.9, None]}


def test_latents_asked_for_come_first(tmp_path: Path) -> None:
    page = Page(write_report(make(tmp_path), tmp_path / "a.html", first=(40, 2)).read_text("utf-8"))
    order = unpacked(page, "index-0")["order"]
    assert order[:2] == [40, 2] and sorted(order) == list(range(64))
