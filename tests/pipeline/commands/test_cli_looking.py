"""`sae show` and `sae steer` as they are typed, on runs in the embedded model."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.command_line import Answer, done, sae
from support.small_models import small_stages

import sae as package
from sae.pipeline.commands import bars
from sae.pipeline.commands.passages import passage, spelled

PROMPT = "def read(self, path):"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache and runs: of an autoencoder, a transcoder, and what is neither."""
    root = tmp_path_factory.mktemp("looking")
    with small_stages() as patch:
        patch.setattr(bars, "QUIET_SECONDS", float("inf"))
        patch.setenv("SAE_CACHE", str(root / "cache"))
        patch.setenv("SAE_RUNS", str(root / "runs"))
        lab = package.Session(root / "cache", root / "runs", device="cpu", offline=True, progress=False)
        lab.tokenize(preset="tiny", tokens=6_000, validation_tokens=2_000, validation=0.3)
        found = lab.harvest(preset="tiny", layer=1, site=["mlp_in", "mlp_out"], tokens=2_000, validation_tokens=500)
        short = {"steps": 10, "batch": 64, "lr": 1e-3}
        lab.train(package.TopK(k=4, d_sae=32), found["1.mlp_out"], name="coder", **short)
        pair = lab.dataset(found["1.mlp_in"].inputs[0], found["1.mlp_out"].inputs[0])
        lab.train(package.TopK(k=4, d_sae=32), pair, name="transcoder", **short)
        once = {"steps": 1, "batch": 16}
        done("train --arch vae --steps 1 --batch 16 --name vae --device cpu", "--activations", found["1.mlp_out"].key)
        both = [*found["1.mlp_in"].inputs, *found["1.mlp_out"].inputs]
        lab.train(package.Crosscoder(k=4, d_sae=32), lab.dataset(both), name="two", **once)
        lab.train(package.TopK(k=2, d_sae=8), np.random.default_rng(0).normal(size=(64, 4)), name="of-nothing", **once)
        yield root


def steering(run: str, *words: object) -> Answer:
    return done("steer --offline --device cpu", run, "--prompt", PROMPT, *words)


@pytest.mark.parametrize("run", ["coder", "transcoder"])
def test_what_steering_says(home: Path, run: str) -> None:
    rest = ("--feature", 3, "--unit", "norm", "--length", 3, "--strength")
    told = steering(run, *rest, 0, "--json").json
    assert told["kl"] == 0 and {**told["steered"], **told["baseline"]} == told["steered"] and len(told["doses"]) == 1
    assert not (home / "runs" / run / "steering").exists()
    told = steering(run, *rest, "-2,0,2", "--target", " self", "--json").json
    assert [dose["strength"] for dose in told["doses"]] == [-2, 0, 2] and told["kl"] > 0
    assert Path(told["plot"]).stat().st_size > 1000 and json.loads(Path(told["json"]).read_text())["doses"]
    shown = steering(run, *rest, "-2,0,2", "--target", " self").out
    assert "latent 3: add 2 x the site's mean norm" in shown and "target_change" in shown
    assert all(line.isprintable() for line in shown.splitlines())


def test_topics_are_set_against_other_text(home: Path, tmp_path: Path) -> None:
    for name, line in (("topic", "import os, sys\n"), ("general", "the cat sat down. ")):
        (tmp_path / name).write_text(line * 100)
    words = ("--topic", tmp_path / "topic", "--general", tmp_path / "general", "--set", "steer.context=16")
    told = done("steer coder --top 1 --json", *words).json
    assert told["ablations"][0]["top"] == 1 and 0.5 < told["latents"][0]["auroc"] <= 1
    shown = done("steer coder --top 1", *words).out
    assert "at random" in shown and "with their AUROC" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("coder --feature 32 --strength 1", "--feature 32: coder has latents 0 to 31"),
        ("coder --feature -1 --strength 1", "--feature -1: coder has latents 0 to 31"),
        ("coder --feature 1.5 --strength 1", "--feature 1.5: input should be a valid integer"),
        ("coder --strength 1", "--feature: is not given"),
        ("coder --feature 1", "--strength: how much is not said"),
        ("coder --feature 1 --strength nan", "--strength nan: is not a finite number"),
        ("coder --feature 1 --strength 1,,2", "--strength 1,,2: between two commas nothing stands"),
        ("coder --feature 1 --strength 1 --mode ablate", "--strength 1: --mode ablate takes none"),
        ("coder --feature 1 --strength 1 --mode clmap", "--mode clmap: input should be 'add', 'clamp' or 'ablate'"),
        ("coder --feature 1 --strength 1 --positions 3-1", "--positions 3-1: goes down"),
        ("coder --feature 1 --strength 1 --positions 900", "--positions 900: the prompt and what is generated have"),
        ("coder --feature 1 --strength 1 --length 9999", "--length 9999: with the prompt: is"),
        ("coder --feature 1 --strength 1 --target 'two words'", "--target 'two words': is"),
        ("coder --feature 1 --strength 1 --top 3", "--top: is of --topic and --general"),
        ("coder --topic x", "--topic: needs --general FILE as well"),
        ("coder --topic x --general y", "--prompt: steers one latent, --topic zeroes"),
        ("coder --feature 1 --strength 1 --target \udcff", "--target: is not text in UTF-8"),
        ("coder --feature 1 --strength 1e30", "--strength 1e+30: is not a finite number below 1e30"),
        ("coder --feature 1 --strength 1 --model nowhere", "--model nowhere: "),
        ("vae --feature 1 --strength 1", "trained a vae, not a sparse dictionary; only `sae eval` reads it"),
        ("two --feature 1 --strength 1", "two: is of several places of the model at once; `sae eval` splices it"),
        ("of-nothing --feature 1 --strength 1", "of-nothing: its rows come from no language model"),
        ("none --feature 1 --strength 1", "none: no such run in "),
    ],
)
def test_what_cannot_be_steered_is_one_line(home: Path, words: str, says: str) -> None:
    answer = sae(f"steer --offline --device cpu {words}", "--prompt", PROMPT)
    assert answer.code == 2 and says in answer.complaint


def test_an_empty_prompt_is_none(home: Path) -> None:
    assert "--prompt is empty" in sae("steer coder --feature 1 --strength 1 --prompt ''").complaint


def test_a_latent_in_the_terminal(home: Path) -> None:
    told = done("show coder --feature 3 --json").json
    assert told["feature"] == 3 and told["rows"] > 0 and told["fired"] == sum(b["count"] for b in told["histogram"])
    assert all("feature" in other and "latent" not in other for other in [*told["nearest"], *told["partners"]])
    mentioned = {str(token) for example in told["top"] for token in example["tokens"]}
    assert mentioned and mentioned <= {*told["vocabulary"]}
    shown = done("show coder --feature 3").out
    for part in ("latent 3 of coder", "strongest, one a document:", "fires on: ", "makes likelier: ", "nearest: "):
        assert part in shown
    assert "[[" in shown and all(line.isprintable() for line in shown.splitlines())
    assert "32: coder has latents 0 to 31" in sae("show coder --feature 32").complaint
    assert "-1: coder has latents 0 to 31" in sae("show coder --feature -1").complaint
    assert "latent 0 of of-nothing" in done("show of-nothing --feature 0").out, "rows without text have latents, too"


@pytest.mark.parametrize("run", ["coder", "transcoder"])
def test_the_latents_of_a_text(home: Path, run: str) -> None:
    text = "import os\n\x1b[31m\u202e\u05d0"
    told = done(f"show {run} --top 2 --offline --json --text", text).json
    assert "".join(one["token"] for one in told["tokens"][1:] if "\ufffd" not in one["token"]).startswith("import os\n")
    assert not told["tokens"][0]["learned"] and all(one["learned"] for one in told["tokens"][1:])
    for one in told["tokens"]:
        sizes = [abs(latent["value"]) for latent in one["latents"]]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 2 and one["fired"] <= 4
    shown = done(f"show {run} --top 2 --offline --text", text).out
    assert all(line.isprintable() and "\u202e" not in line for line in shown.splitlines())
    assert "\\x1b" in shown and "\\n" in shown and "not learned of tokens such as those at 0" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("coder", "--feature: is not given; say --feature 123, or --text"),
        ("coder --feature 1 --text x", "--text: is of all latents, --feature of one"),
        ("coder --feature 1 --top 3", "--top 3: is of --text; leave it out"),
        ("coder --feature 1 --model there", "--model there: is of --text; leave it out"),
        ("coder --text ''", "--text is empty"),
        ("coder --text a\udcff", "--text: is not text in UTF-8"),
        ("coder --top 0 --text x", "--top 0: "),
        (f"coder --text '{'word ' * 300}'", "tokens; tiny reads at most 256"),
        ("of-nothing --text x", "of-nothing: its rows come from no language model"),
        ("vae --feature 1", "trained a vae, whose codes are no latents"),
        ("none --feature 1", "none: no such run"),
    ],
)
def test_what_cannot_be_shown_is_one_line(home: Path, words: str, says: str) -> None:
    answer = sae(f"show --offline {words}")
    assert answer.code == 2 and says in answer.complaint


def test_tokens_are_spelled_and_marked() -> None:
    tokens = [b"\xd7", b"\x90", b"\x1b[2J", b"\n", b"\xff", "\u202e".encode(), b" dog"]
    assert spelled(tokens) == ["\\xd7", "\u05d0", "\\x1b[2J", "\\n", "\\xff", "\\u202e", " dog"]
    line = passage(tokens[3:], [0.5, None, 0.0, 2.0], 3, 2.0)
    assert line.plain == "[\\n]\\xff\\u202e[[ dog]]"
