"""`sae steer` as it is typed, on a run in the embedded model."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.command_line import Answer, done, sae
from support.small_models import small_stages

import sae as package
from sae.pipeline.commands import bars

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
    assert "feature 3: add 2 x the site's mean norm" in shown and "target_change" in shown
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
