"""The report of a run: whole, well-formed, self-contained, and safe whatever the text says."""

import html
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_stores import activation_recipe

from sae.cache.errors import DamagedStore
from sae.cache.printable import printable
from sae.cache.runs import Run
from sae.pipeline.interpret.examples import Band, Bin, Example, Feature, Features, TokenCount
from sae.pipeline.report import page as report
from sae.pipeline.report.charts import MOST_POINTS, Scale, Series, histogram, ladder, line_chart, number, steady
from sae.pipeline.report.contexts import LEVELS, context_html, pieces
from sae.pipeline.report.page import write_report
from sae.pipeline.report.scores import density_html

VOID = {"meta", "br", "input", "link", "img", "hr", "base"}
NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "&amp;", "$body ${style}"]
VOCABULARY = [*NASTY, " the", "\n", "\t", "      ", "é", "plain", "\u202e", "<|endoftext|>"]
BEGIN = len(VOCABULARY) - 1


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


def example(value: float, peak: int, tokens: list[int]) -> Example:
    around: list[float | None] = [None, *([0.0] * (len(tokens) - 1))]
    around[peak] = value
    return Example(position=128 + peak, document=7, value=value, peak=peak, tokens=tokens, activations=around)


def feature(latent: int, group: Any, density: float) -> Feature:
    top = [example(4.0, 2, [BEGIN, 0, 1, 2]), example(2.0, 0, [5, 6, 7, 8, 9])]
    return Feature(
        latent=latent, group=group, fired=12, density=density, max=4.0, mean=1.5,
        histogram=[Bin(low=1, high=2, count=9), Bin(low=2, high=4.1, count=3)],
        sampled=12, frequent=[TokenCount(token=1, count=9), TokenCount(token=6, count=3)],
        top=top, bands=[Band(low=0.25, high=0.5, examples=[example(0.4, 1, [3, 4, 11])])],
    )  # fmt: skip


def features() -> Features:
    made = [feature(3, "strongest", 0.2), feature(1000, "sampled", 0.02), feature(5, "sampled", 0.00002)]
    vocabulary = {i: text.encode().decode("latin-1") for i, text in enumerate(VOCABULARY)}
    return Features(
        store="gpt2-6.mlp_out-ab12", split="train", rows=4096, d_sae=64, live=50, begin=BEGIN, vocabulary=vocabulary,
        features=made,
    )  # fmt: skip


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
        run.write_json("eval/features.json", features().model_dump(mode="json"))
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
    assert {f"#{name}" for name in ("numbers", "training", "density", "latents", "settings")} <= set(links)
    assert {str(link)[1:] for link in links} <= set(ids)
    assert [text for _, text in page.all("h1")] == ["gpt2 · layer 6 · mlp_out"]
    assert len(page.all("section", "part")) == 5 and len(page.all("div", "card")) == 4
    assert len(page.all("svg")) == 1 + 6 + 1 + 3  # cross-entropies, curves, density, one for each latent
    assert all(a["role"] == "img" and a["aria-label"] for a, _ in page.all("svg"))
    assert [text for _, text in page.all("h3") if "%" in text] == [
        "1 to 10 % of rows 1", "Less than 0.1 % of rows 1"
    ]  # fmt: skip
    assert [a["id"] for a, _ in page.all("article", "feature")] == ["latent-3", "latent-1000", "latent-5"]


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
    shown = Page(report.page(report.read(make(tmp_path, recipe=recipe))))
    assert shown.all("p", "lede")[0][1].endswith(f", from the text of {said}.")


def test_figures_say_on_how_much_and_over_which_rows(tmp_path: Path) -> None:
    run = make(tmp_path)
    plain = Page(report.page(report.read(run)))
    assert plain.all("section", "part")[0][1].startswith(
        "How good it isJudged on 4,096 rows and 65,536 predictions of docu"
    )
    run.write_json("eval/eval.json", {**EVALUATION, "kept": {**EVALUATION, "fvu": 0.0456, "largest_norm": 512.5}})
    both = Page(report.page(report.read(run)))
    assert "Rows of a norm above 512.5 lie far out" in both.all("section", "part")[0][1]
    assert "FVU 0.1234; 0.0456 without rows that lie far out" in both.all("section", "part")[0][1]
    rows = [text for _, text in both.all("tr")]
    assert "all rowskept" in rows[0] and any(row.startswith("FVU") and "0.12340.0456" in row for row in rows)


def test_the_marked_token_is_the_one_that_fired(page: Page) -> None:
    found = features()
    shown = [e for f in found.features for e in [*f.top, *f.bands[0].examples]]
    marks = page.all("mark", "peak")
    lines = page.all("p")
    contexts = [text for (a, text) in lines if not a][-len(shown) :]
    assert len(marks) == len(shown) == len(contexts)
    for (attributes, marked), line, one in zip(marks, contexts, shown, strict=True):
        texts = [html.unescape(re.sub("<[^>]*>", "", piece)) for piece in pieces(
            [found.bytes_of(token) for token in one.tokens]
        )]  # fmt: skip
        assert marked == texts[one.peak] and line == "".join(texts)
        assert attributes["title"] == number(one.value)
        assert attributes["class"] == f"a{ {4.0: 8, 2.0: 4, 0.4: 1}[one.value] } peak"
    assert [text for _, text in page.all("i", "begin")] == ["<|endoftext|>"] * 3
    assert {text for _, text in page.all("i", "unseen")} == {VOCABULARY[3]}


def test_a_negative_activation_is_shaded_as_strongly_and_underlined() -> None:
    shown = Page(context_html(example(-2.0, 2, [3, 5, 6]), 4.0, features()))
    ((attributes, _),) = [mark for mark in shown.all("mark") if "peak" in mark[0]["class"]]
    assert (attributes["class"], attributes["title"]) == ("a4 minus peak", "-2")
    assert "mark.minus" in (Path(report.__file__).parent / "page.css").read_text("utf-8")


def test_untrusted_text_stays_text(text: str, page: Page) -> None:
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not {tag for tag, _ in page.elements} & {"img", "iframe", "object", "embed", "link", "u", "base", "form"}
    assert not [name for _, a in page.elements for name in a if name.startswith("on") or name == "style"]
    assert all(nasty in "".join(t for _, t in page.all("article")) for nasty in NASTY)
    assert "<fineweb>" in page.all("p", "lede")[0][1] and page.all("title")[0][1].endswith("topk<&>")
    assert "\u202e" not in text and "U+202E" in text


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
    assert found.evaluation is not None and found.features is not None
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
        features=found.features.model_copy(update={"store": FOREIGN, "split": FOREIGN}),
    )
    found.config["train"]["sae"] = found.config["train"].pop(f"sae{FOREIGN}")
    text = report.page(found)
    page = Page(text)
    assert text.count("<script") == text.count("</script") == 1 and "<!--" not in text
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    shown = printable(FOREIGN)
    assert shown in page.all("title")[0][1] and shown in page.all("footer")[0][1]
    assert all(shown in text for _, text in [*page.all("figcaption")[1:2], *page.all("dl", "tree")])
    hover = [json.loads(str(a["data-hover"])) for a, _ in page.all("svg") if "data-hover" in a]
    assert any(FOREIGN in label for points in hover for _, label in points)


def test_nothing_is_requested(text: str, page: Page) -> None:
    """No address of anything outside, and a content policy that would refuse one."""
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    assert not [a for _, a in page.elements if {"src", "srcset", "data", "action", "poster"} & a.keys()]
    assert all(str(a["href"]).startswith("#") for a, _ in page.all("a"))
    policies = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv")]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'; style-src 'unsafe-inline'; script")


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_its_ground(dark: bool) -> None:
    """WCAG 2 contrast of at least 4.5 for every text colour, in both schemes."""
    style = (Path(report.__file__).parent / "page.css").read_text("utf-8")
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
        "This run has not been judged yet: sae eval topk<&>", "Not counted yet: sae eval topk<&>", "Not looked up yet."
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
    lines = page.all("polyline")
    assert all(len(str(a["points"]).split()) <= MOST_POINTS for a, _ in lines)
    assert bool(page.all("polygon", "spread")) == (steps > MOST_POINTS)
    hover = json.loads(str(next(a["data-hover"] for a, _ in page.all("svg") if "data-hover" in a)))
    assert hover[-1][1].startswith(f"step {steps:,} · total")


def test_nothing_defined(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.write_json("eval/eval.json", dict.fromkeys(EVALUATION) | {"details": EVALUATION["details"]})
    run.save_latents({"density": torch.zeros(64)})
    page = Page(write_report(run, tmp_path / "a.html").read_text("utf-8"))
    assert page.all("div", "card")[0][1] == "Variance explained–FVU –"
    assert len(page.all("rect", "apart")) == 1


@pytest.mark.parametrize("name", ["eval/features.json", "eval/latents.safetensors", "eval/eval.json"])
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    run = make(tmp_path)
    (run.path / name).write_bytes(b'{"store": 1}' if "features" in name else b"{")
    with pytest.raises(DamagedStore, match=re.escape(Path(name).name)):
        write_report(run, tmp_path / "a.html")


def test_density_bins_hold_every_latent() -> None:
    density = np.array([1.0, 0.1, 1e-6, 0.0, 3e-4])
    page = Page(density_html(density, None))
    counts = [int(text.split()[0]) for _, text in page.all("rect") if text]
    assert sum(counts) == 5


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ([b"caf", b"\xc3", b"\xa9", b"!"], ["caf", "<b>c3</b>", "é", "!"]),
        ([b"\xf0\x9f", b"\x98", b"\x80 ok"], ["<b>f0 9f</b>", "<b>98</b>", "😀 ok"]),
        ([b"\x80\x99t", b"x"], ["<b>80</b><b>99</b>t", "x"]),
        ([b"a\xe2\x80"], ["a<b>e2</b><b>80</b>"]),
        ([b"", b"\x00\x1b"], ["<b>∅</b>", "<b>U+0000</b><b>U+001B</b>"]),
        ([b" a  b", b"\n\r\n", b"\t", b"\n        "], [
            " a<s>··</s>b", "<s>↵</s><s>␍</s><s>↵</s>", "<s>⇥</s>", "<s>↵</s><s>·⁸</s>"
        ]),
        (["\u2028\u200b".encode()], ["<b>U+2028</b><b>U+200B</b>"]),
    ],
)  # fmt: skip
def test_bytes_become_text(tokens: list[bytes], shown: list[str]) -> None:
    assert pieces(tokens) == shown


def test_every_byte_can_be_shown() -> None:
    for byte in range(256):
        (shown,) = pieces([bytes([byte])])
        assert shown and "\n" not in shown


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


@pytest.mark.parametrize("low", [1e-9, 0.003, 0.9, 7.0])
@pytest.mark.parametrize("ratio", [1.001, 1.5, 10.0, 1e7])
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_and_inside(low: float, ratio: float, log: bool) -> None:
    scale = Scale(low, low * ratio, 200, 10, log)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 6 and ticks == sorted(ticks)
    assert all(9.99 <= scale(t) <= 200.01 for t in ticks)


def test_charts_of_odd_data() -> None:
    for points in ([(1.0, 5.0)], [(1.0, 0.0), (2.0, 0.0)], [(0.0, -3.0), (9.0, 1e9)], [(1.0, 1.0), (2.0, 1e-9)]):
        for ratios in (False, True):
            drawn = line_chart([Series("<x>", points)], label='"l"', x_label="step", ratios=ratios)
            assert "nan" not in drawn and "inf" not in drawn and "<x>" not in drawn
            Page(drawn)
    Page(histogram([], label="none", apart=("never", 3)))
    page = Page(ladder([("a", 1.0, ""), ("b", 2.0, "+1")], label="l", reference=("r", 3.0)))
    widths = [float(str(a["width"])) for a, _ in page.all("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)


def test_charts_of_numbers_out_of_any_sense() -> None:
    """Metrics of strangers may be any numbers: those no axis could reckon with are drawn at its ends, or as zero."""
    sizes = (1.7976931348623157e308, -1.7976931348623157e308, 5e-324, 1e39, -1e39, 1e-300, 0.0, 1.0, -1.0)
    for first, second, third in itertools.product(sizes, repeat=3):
        for points in ([(1.0, first), (2.0, second), (3.0, third)], [(abs(first), 1.0), (abs(first), second)]):
            drawn = line_chart([Series("x", points)], label="l", x_label="step", ratios=third > 0)
            assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', drawn)
    for value in sizes:
        assert "nan" not in ladder([("a", value, ""), ("b", -value, "")], label="l", reference=("r", 0.0))


def test_a_share_smaller_than_any_row_is_none(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.save_latents({"density": torch.full((64,), 5e-324, dtype=torch.float64)})
    with pytest.raises(DamagedStore, match="latents"):
        write_report(run, tmp_path / "a.html")


def test_the_axis_of_densities_is_that_of_what_there_is() -> None:
    """No empty half to the left of the first bar, nor one to the right of the last."""
    density = np.array([0.0, 2e-3, 3e-3, 0.02])
    bars = re.findall(r'<rect class="bar" x="([\d.]+)"[^>]*width="([\d.]+)"', density_html(density, None))
    starts = [float(x) for x, _ in bars]
    assert min(starts) < 200 and max(float(x) + float(w) for x, w in bars) > 700


def test_a_search_has_a_place_to_say_that_nothing_matches(text: str, page: Page) -> None:
    """Hidden at first; the script of the page fills it."""
    (said,) = [attributes for attributes, _ in page.all("p") if attributes.get("id") == "nothing"]
    assert "hidden" in said and 'querySelector("#nothing")' in text
