"""`sae decompose` as it is typed, and what is said of bad input of every kind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.command_line import Answer, done, sae
from support.harvesting import harvest
from support.small_models import CONTEXT, made_up, save_model, small_stages, token_store

from sae.pipeline.decompose import plots
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.runtime.progress import Silent

FEW = [
    "--components",
    4,
    "--steps",
    2,
    "--set",
    "decompose.warmup=2",
    "--set",
    "decompose.judged=1",
    "--device",
    "cpu",
    "--offline",
]


class Place(NamedTuple):
    cache: Path
    model: Path

    def typed(self, runs: Path, *words: object) -> Answer:
        return sae("decompose", "--cache", self.cache, "--runs", runs, *FEW, *words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("cache")
    with small_stages() as patch:
        patch.setattr(plots, "draw", lambda *_: None)
        model = save_model("gpt2", tmp_path_factory.mktemp("model"))
        tokens = [
            token_store(root, made_up(n, seed=n), split=split) for n, split in ((40, "train"), (12, "validation"))
        ]
        config = HarvestConfig(model=str(model), layer=(0, 1), site=("mlp_in", "mlp_out"), codec="float32")
        harvest(config, tokens, root, Silent())
        yield Place(root, model)


@pytest.fixture(scope="module")
def run(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    answer = place.typed(runs, "--input", "1.mlp_in", "--batch", 16, "--name", "one")
    assert answer.code == 0, answer.err
    assert all(word in answer.out for word in ("ci_masked", "h.1.mlp.c_fc", "h.1.mlp.c_proj", "components.png"))
    return runs / "one"


def test_the_kinds_as_json(place: Place, run: Path, tmp_path: Path) -> None:
    again = done("decompose --resume --name one --json", "--cache", place.cache, "--runs", run.parent).json
    assert again["kind"] == "local" and {*again["matrices"]} == {
        f"transformer.h.1.mlp.c_{name}" for name in ("fc", "proj")
    }
    live = ["--live", "--model", place.model, "--batch", 2, "--matrices", "0.mlp.c_fc,1.attn.*", "--json"]
    found = place.typed(tmp_path, *live).json
    assert {*found["matrices"]} == {f"transformer.h.{name}" for name in ("0.mlp.c_fc", "1.attn.qkv", "1.attn.o")}
    assert {"kl", "ce"} == {*found["ci_masked"]}
    toy = place.typed(tmp_path, "--toy", "--identity", "--batch", 16, "--set", "decompose.toy_steps=3", "--json").json
    assert {*toy["matrices"]} == {"in", "hidden", "out"} and len(toy["toy"]["each"]["mmcs"]) == 3
    repeated = place.typed(tmp_path, *live, "--resume").json
    assert repeated == found
    listed = done("list", "--runs", tmp_path, "--json").json["runs"]
    assert [one["help"] for one in listed] == ["finished, a decomposition (live)", "finished, a decomposition (toy)"]
    assert done("cache verify", "--cache", place.cache, "--runs", tmp_path).code == 0


@pytest.mark.parametrize(
    "command",
    [
        "eval one",
        "analyze one",
        "report one",
        "export one --to saelens --out x",
        "train --resume --name one",
    ],
)
def test_what_reads_dictionaries_says_that_it_is_none(place: Place, run: Path, command: str) -> None:
    where = ["--runs", run.parent] + ([] if command.split()[0] == "export" else ["--cache", place.cache])
    answer = sae(command, *where)
    assert answer.code == 2 and "is a decomposition of weights, no dictionary" in answer.complaint


BAD: list[tuple[list[Any], str]] = [
    (["--input", "1.mlp_in", "--batch", 16, "--matrices", "c_fcc"], "--matrices c_fcc: the MLP of layer 1 of "),
    (
        ["--input", "1.mlp_in", "--batch", 16, "--matrices", "0.mlp.c_fc"],
        "no such matrix; there is transformer.h.1.mlp.c_fc",
    ),
    (["--input", "1.mlp_in", "--matrices", "c_fc,c_fc"], "--matrices c_fc,c_fc: c_fc is there twice"),
    (["--input", "1.mlp_in", "--matrices", "a,,b"], "--matrices a,,b: between two commas nothing stands"),
    (["--input", "7.mlp_in"], "--input 7.mlp_in: no store of it"),
    (["--input", "1.mlp_out"], "--input 1.mlp_out: is not what an MLP reads"),
    (["--input", "1.mlp_in", "--target", "0.mlp_out"], "is not what one MLP reads and gives"),
    (["--input", "1.mlp_in", "--target", "0.mlp_in"], "is not what one MLP reads and gives"),
    (["--input", "1.mlp_in", "--batch", 10**6], "--batch 1000000: "),
    (["--input", "1.mlp_in", "--batch", 16, "--model", "nowhere/at-all"], "--model nowhere/at-all"),
    (["--components", 0], "--components 0: "),
    (["--input", "1.mlp_in", "--set", "decompose.p=0"], "decompose.p = 0: "),
    (["--input", "1.mlp_in", "--set", "decompose.stochastic=0", "--set", "decompose.layerwise=0"], "set one of them"),
    (["--input", "1.mlp_in", "--set", "decompose.gate=both"], "decompose.gate = 'both'"),
    (["--input", "1.mlp_in", "--set", "train.lr=1"], "give this one to `sae train`"),
    (["--input", "1.mlp_in", "--features", 3], "features"),
    (["--live"], "none is named; say which"),
    (["--live", "--matrices", "9.mlp.*"], "--matrices 9.mlp.*: "),
    (["--live", "--matrices", "*", "--tokens-from", "nothing"], "--tokens-from nothing: no such store"),
    (["--live", "--matrices", "*", "--model", "nowhere/at-all"], "--model nowhere/at-all"),
    (["--live", "--matrices", "*", "--batch", 41], "--batch 41: "),
    (
        ["--live", "--matrices", "*", "--input", "1.mlp_in"],
        "is of one MLP on stores; leave it out, or --live",
    ),
    (["--live", "--toy"], "--live and --toy: are two things to decompose"),
    (["--toy", "--model", "tiny"], "--model tiny: toys are trained here"),
    (["--toy", "--matrices", "in"], "matrices"),
    (["--toy", "--set", "decompose.probability=2"], "decompose.probability = 2"),
    (["--tokens-from", "x"], "--tokens-from x: tokens are read with --live; add it"),
    (["--toy", "--resume", "--name", "none"], "--resume: no run none in "),
    (["--toy", "--name", "a/b"], "--name a/b: is not the name of a folder"),
]


@pytest.mark.parametrize(("words", "says"), BAD, ids=[" ".join(map(str, words)) for words, _ in BAD])
def test_bad_input_is_one_line(place: Place, tmp_path: Path, words: list[Any], says: str) -> None:
    if "--live" in words and "--model" not in words:
        words = [*words, "--model", place.model]
    answer = place.typed(tmp_path, *words)
    assert answer.code == 2 and says in answer.complaint, answer.err
    assert not [*tmp_path.glob("*")]


def test_other_settings_and_other_runs_are_not_taken_up(place: Place, run: Path) -> None:
    same = ["--input", "1.mlp_in", "--batch", 16, "--name", "one"]
    assert "exists; continue it" in place.typed(run.parent, *same).complaint
    differs = place.typed(run.parent, *same, "--resume", "--set", "decompose.lr=0.5").complaint
    assert differs.startswith("--resume: ") and "was started with other settings (lr)" in differs
    assert "(activations, targets)" in place.typed(run.parent, "--input", "0.mlp_in", *same[2:], "--resume").complaint


def test_stores_that_are_not_the_models_own(place: Place, tmp_path: Path) -> None:
    """A cache of another model of the same shape: its rows are not what these weights give."""
    other = save_model("gpt2", tmp_path / "other", seed=8)
    answer = place.typed(tmp_path / "runs", "--input", "1.mlp_in", "--batch", 16, "--model", other)
    assert answer.code == 2 and "its weights differ from those" in answer.complaint


def test_without_stores_or_tokens_it_says_what_to_run(place: Place, tmp_path: Path) -> None:
    empty = Place(tmp_path / "cache", place.model)
    assert "the last harvest made no store of what an MLP reads" in empty.typed(tmp_path).complaint
    assert "`sae tokenize`" in empty.typed(tmp_path, "--live", "--matrices", "*", "--model", place.model).complaint
    token_store(empty.cache, np.full((4, CONTEXT), 5))
    says = empty.typed(tmp_path, "--live", "--matrices", "*", "--model", place.model, "--batch", 2).complaint
    assert "no validation tokens beside it to judge on" in says


def test_damaged_files_are_said_with_the_code_of_damage(place: Place, run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "one")
    again = ["decompose --resume --name one", "--cache", place.cache, "--runs", tmp_path]
    for name in ("eval/decomposition.json", "config.json"):
        path = tmp_path / "one" / name
        path.write_bytes(path.read_bytes().replace(b"local", b"lokal"))
        answer = sae(again[0], *again[1:])
        assert answer.code == 3 and name in answer.complaint
        shutil.copy(run / name, path)
    (tmp_path / "one" / "sae_weights.safetensors").write_bytes(b"nothing")
    (tmp_path / "one" / "eval" / "decomposition.json").unlink()
    answer = sae(again[0], *again[1:])
    assert answer.code == 3 and "sae_weights.safetensors" in answer.complaint
