"""The command line as a newcomer and as a careless user types it."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import done, sae
from support.small_models import small_stages
from transformers import GPT2Config, GPT2LMHeadModel

from sae import configs
from sae.cache import activations, catalogue, tokens
from sae.cache.disk import durable
from sae.cache.runs import STATISTICS, Run
from sae.cache.store.manifest import MANIFEST, Windows
from sae.pipeline.commands import bars
from sae.pipeline.metrics.figures import available
from sae.pipeline.metrics.figures import figures as figures_of

PROJECT = Path(__file__).resolve().parents[3]
TOKENIZE = "tokenize --source text.txt --tokenizer tiny --context 16 --tokens all --validation 0.3 --workers 1"
HARVEST = "harvest --model model --config small.yaml"
TRAIN = "train --batch 64 --steps 6 --d-sae 24 --k 4 --set train.log_every=2 --set train.checkpoint_every=3"


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[pytest.MonkeyPatch]:
    with small_stages() as patch:
        patch.setattr(tokens, "CHUNK_TOKENS", 1024)
        patch.setattr(activations, "CHUNK_ROWS", 512)
        patch.setattr(activations, "WINDOWS", Windows(512, 2048))
        patch.setattr(bars, "QUIET_SECONDS", float("inf"))
        yield patch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small: pytest.MonkeyPatch) -> Path:
    """A folder with text, a small model, everything the four commands make of them, and things that are wrong."""
    home = tmp_path_factory.mktemp("world")
    small.chdir(home)
    small.setenv("SAE_CACHE", str(home / "cache"))
    small.setenv("SAE_RUNS", str(home / "runs"))
    small.setenv("TIKTOKEN_CACHE_DIR", str(home / "no-encodings"))
    words = Path(__file__).read_text(encoding="utf-8").split()
    documents = [" ".join(words[i : i + 60]) for i in range(0, 1800, 60)]
    (home / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    save_model(home / "model")
    (home / "small.yaml").write_text("harvest: {layer: [1], site: [mlp_out]}\n")
    wrong(home)
    done(TOKENIZE)
    done(HARVEST)
    done(TRAIN, "--name", "one")
    return home


def save_model(folder: Path, vocabulary: int = 4096) -> None:
    """An untrained GPT-2 of two layers, for the embedded tokenizer."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(folder)


def wrong(home: Path) -> None:
    """Files that a careless user might name."""
    (home / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (home / "empty.txt").touch()
    (home / "short.txt").write_text("one two")
    (home / "notes.md").write_text("words")
    (home / "numbers.jsonl").write_text('{"text": 3}\n')
    (home / "other.jsonl").write_text('{"body": "a"}\n')
    (home / "cut.jsonl").write_text('{"text": "a"\n')
    (home / "cut.parquet").write_bytes(b"PAR1 and no more")
    (home / "empty").mkdir()
    (home / "no-tokenizer").mkdir()
    shutil.copy(home / "model" / "config.json", home / "no-tokenizer")
    (home / "misspelt.yaml").write_text("train:\n  lrr: 3\n")
    (home / "section.yaml").write_text("trian:\n  lr: 3\n")
    (home / "list.yaml").write_text("- a\n: :\n")
    (home / "flat.yaml").write_text("train: 5\n")
    (home / "cache.file").touch()


@pytest.fixture
def copy(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The world, to change as one likes."""
    shutil.copytree(world, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "copy" / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "copy" / "runs"))
    return tmp_path / "copy"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the cable pulled: nobody said so, and every connection is refused."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("unreachable")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)


def store_of(home: Path, beginning: str) -> Path:
    (found,) = [p for p in (home / "cache").glob("*/*") if p.name.startswith(beginning) and "valid" not in p.name]
    return found


def contents(home: Path) -> set[str]:
    """Every store and run."""
    paths = [*home.glob("cache/*/*/recipe.json"), *home.glob("runs/**/config.json")]
    return {path.parent.relative_to(home).as_posix() for path in paths}


# what is typed -> what the one line says: the option or file, the value, what to try
WRONG = [
    # nothing that can be run
    ("trian", "no such command 'trian'; did you mean 'train'?"),
    ("xyzzy", "no such command 'xyzzy'; `sae --help` tells more"),
    ("cache xyzzy", "no such command 'xyzzy'; `sae cache --help` tells more"),
    ("train --stepps 5", "no such option: --stepps; did you mean --steps"),
    ("train --xyzzy", "no such option: --xyzzy; `sae train --help` tells more"),
    ("train --lr", "option '--lr' requires an argument"),
    ("eval one two", "two: no such run in "),
    ("list now", "got unexpected extra argument(s) (now); `sae list --help` tells more"),
    ("cache rm", "missing argument 'STORE'"),
    ("cache verify --model there", "--model there: is read with --repair; add it"),
    ("cache verify --source there", "--source there: is read with --repair; add it"),
    ("cache verify --tokenizer there", "--tokenizer there: is read with --repair; add it"),
    ("train --steps five", "--steps five: input should be a valid integer"),
    ("tokenize --tokens many", "--tokens many: is not a number of rows or tokens; write 500, 300k, 10M, 1e8 or all"),
    ("tokenize --tokens 1.5", "--tokens 1.5: is not a number of rows or tokens"),
    ("tokenize --workers 0", "--workers 0: input should be greater than or equal to 1"),
    # text
    (f"{TOKENIZE} --source nothing.txt", "--source nothing.txt: no such file or folder"),
    (f"{TOKENIZE} --source nothing", "--source nothing: no such file, and not a source; try a file, a folder"),
    (f"{TOKENIZE} --source 'no/*.txt'", "--source no/*.txt: no file matches"),
    (f"{TOKENIZE} --source ''", "--source is empty; say what is meant, or leave it out"),
    (f"{TOKENIZE} --source empty.txt", "--source empty: holds no text"),
    (f"{TOKENIZE} --source empty", "--source empty: no parquet, arrow, jsonl, json, csv, tsv or txt"),
    (f"{TOKENIZE} --source latin.txt", "--source latin.txt: not UTF-8 text (byte 0xe9 at offset 3); convert it"),
    (f"{TOKENIZE} --source short.txt", "holds less than one context of 16 tokens; try a smaller --context"),
    (f"{TOKENIZE} --source notes.md", "notes.md is not parquet, arrow, jsonl, json, csv, tsv or txt"),
    (f"{TOKENIZE} --source numbers.jsonl", "--source numbers.jsonl: column 'text' holds int (the line at offset 0)"),
    (f"{TOKENIZE} --source other.jsonl", "no column 'text'; it has body; try --set tokenize.column=NAME"),
    (f"{TOKENIZE} --source cut.jsonl", "--source cut.jsonl: not JSON in the line at offset 0"),
    (f"{TOKENIZE} --source cut.parquet", "--source cut.parquet: damaged, or not what its name says"),
    (f"{TOKENIZE} --tokenizer nothing", "--tokenizer nothing: no such folder or tokenizer; try tiny,"),
    (f"{TOKENIZE} --tokenizer no-tokenizer", "no-tokenizer: holds no tokenizer; it needs a tokenizer.json"),
    (f"{TOKENIZE} --tokenizer empty", "--tokenizer empty: holds no tokenizer; it needs a tokenizer.json"),
    (f"{TOKENIZE} --context 1", "--context 1: input should be greater than or equal to 2"),
    (f"{TOKENIZE} --context 1000000", "holds less than one context of 1000000 tokens; try a smaller --context"),
    (f"{TOKENIZE} --packing loose", "--packing loose: input should be 'concat' or 'document'"),
    (f"{TOKENIZE} --tokens 0", "--tokens 0: input should be greater than or equal to 1"),
    (f"{TOKENIZE} --validation 1", "--validation 1: input should be less than 1"),
    # no network
    ("tokenize --offline", "--source HuggingFaceFW/fineweb: not a local file, and the network is switched off"),
    ("tokenize --source nobody/nothing --offline", "not a local file, and the network is switched off"),
    ("tokenize --source text.txt --tokenizer p50k_edit --offline", "--tokenizer p50k_edit: not in tiktoken's cache"),
    ("tokenize --source text.txt --tokenizer hf:nobody/nothing --offline", "hf:nobody/nothing: not in the local"),
    ("harvest --model nobody/nothing --offline", "offline was asked for; give a local Hugging Face folder"),
    # settings
    (f"{TOKENIZE} --set tokenize.contxt=3", "tokenize.contxt: unknown key; did you mean 'context'?"),
    (f"{TOKENIZE} --set tokenise.context=3", "unknown section 'tokenise'; did you mean 'tokenize'?"),
    (f"{TOKENIZE} --set train.lr=3", "--set train.lr=3: `sae tokenize` reads tokenize.*; give this one to `sae train`"),
    (f"{TOKENIZE} --set context=3", "--set context=3: write it as section.key=value, for example train.lr=3e-4"),
    ("tokenize --set tokenize.context=x", "tokenize.context = 'x': input should be a valid integer"),
    ("train --preset large", f"--preset large: no such preset; there are {', '.join(configs.presets())}"),
    ("train --config nothing.yaml", "--config nothing.yaml: cannot be read (No such file or directory)"),
    ("train --config empty", "--config empty: cannot be read (Is a directory)"),
    ("train --config latin.txt", "--config latin.txt: is not UTF-8 text"),
    ("train --config misspelt.yaml", "train.lrr: unknown key; did you mean 'lr'?"),
    ("train --config section.yaml", "section.yaml: unknown section 'trian'; did you mean 'train'?"),
    ("train --config list.yaml", "--config list.yaml: is not YAML"),
    ("train --config flat.yaml", "flat.yaml: section train should hold settings, not 5"),
    ("demo --set eval.tokkens=3", "eval.tokkens: unknown key; did you mean 'tokens'?"),
    # models
    ("harvest --model ./nothing", "--model ./nothing: no such folder; give a Hugging Face model folder"),
    ("harvest --model empty", "--model empty: the folder has no config.json"),
    ("harvest --model no-tokenizer", "--model no-tokenizer: no model.safetensors in it"),
    ("harvest --model 'a b'", "--model a b: neither a folder nor a hub name"),
    (f"{HARVEST} --layer 14", "--layer 14: model has layers 0 to 1"),
    (f"{HARVEST} --layer 1,-1", "--layer -1: is not a whole number from 0 on, nor a range; write 4,6 or 0-3"),
    (f"{HARVEST} --layer 6,6", "--layer 6,6: 6 is there twice"),
    (f"{HARVEST} --layer 0-3", "--layer 2: model has layers 0 to 1"),
    (f"{HARVEST} --layer 1-0", "--layer 1-0: goes down; write 0-1"),
    (f"{HARVEST} --layer x", "--layer x: is not a whole number from 0 on"),
    (f"{HARVEST} --site everywhere", "--site everywhere: the sites are resid_pre, resid_mid, resid_post"),
    (f"{HARVEST} --codec int4", "--codec int4: no such codec; there are int8, bfloat16, float16, float32"),
    (f"{HARVEST} --codec int8:steps=1", "--codec int8:steps=1: int8 has no setting 'steps'; it has step, zstd"),
    (f"{HARVEST} --tokens-from nothing", "--tokens-from nothing: no such store in"),
    (f"{HARVEST} --tokens-from text-tiny-16-validation", "holds documents kept for judging; name the store of"),
    (f"{HARVEST} --tokens-from {{rows}}", "holds activations, not tokens; `sae cache ls` lists the stores"),
    # training
    ("train --arch topp", "--arch topp: unknown architecture; did you mean 'topk'?"),
    ("train --arch xyzzy", "--arch xyzzy: unknown architecture; there are "),
    ("train --arch l1 --k 5", "--k 5: arch l1 has no k; it is of batchtopk, topk, clt, crosscoder, matryoshka"),
    ("train --k 100 --d-sae 64", "k: 100 latents per input, but d_sae: 64 in all; lower k or raise d_sae"),
    ("train --k 0", "--k 0: input should be greater than or equal to 1"),
    ("train --align enc --seeds 2", "--align enc: input should be 'dec', 'hid' or 'x_hat'"),
    ("train --align dec", "--align: takes dictionaries of two or more seeds; say how many with --seeds"),
    ("train --align hid --seeds 1", "--align: takes dictionaries of two or more seeds; say how many with --seeds"),
    ("train --lr 0", "--lr 0: input should be greater than 0"),
    ("train --steps 5 --rows 5", "--steps 5: --rows 5 says otherwise; give one of the two"),
    ("train --batch 1000000", "--batch 1000000: "),
    (f"{TRAIN} --device gpu", "--device gpu: not usable here (no such device); try auto"),
    (f"{TRAIN} --name a/b", "--name a/b: is not the name of a folder"),
    (f"{TRAIN} --name ..", "--name ..: is not the name of a folder"),
    (f"{TRAIN} --name ''", "--name is empty; say what is meant, or leave it out"),
    (f"{TRAIN} --name one", "--name one: "),
    (f"{TRAIN} --name ' x'", "--name ' x': take a name of at most 200 letters, no blanks around them"),
    (f"{TRAIN} --name 'a\nb'", "--name 'a\\nb': take a name"),
    (f"{TRAIN} --name {'x' * 201}", "xx': take a name of at most 200 letters"),
    ("train --d-sae 9000000000000000000", "input should be less than or equal to 1000000000000"),
    ("cache gc --older-than ٣d", "--older-than ٣d: is not a length of time; write 12h, 30d or 2w"),
    ("cache gc --older-than 9999999d", "--older-than 9999999d: is not a length of time"),
    (f"{TRAIN} --activations nothing", "--activations nothing: no such store in"),
    (f"{TRAIN} --activations model-1.mlp_out-text-tiny-16-validation", "holds documents kept for judging"),
    (f"{TRAIN} --activations {{tokens}}", "holds tokens, not activations"),
    ("train --resume --name nothing", "--name nothing: no such run in"),
    ("train --resume --lr 3", "--resume: no run topk-8192-k32-lr3-s0-1.mlp_out-"),
    ("train --resume --name one --lr 3", "was started with other settings (batch, "),
    ("train --resume", "--resume: no unfinished run in"),
    ("demo --device gpu", "--device gpu: not usable here (no such device)"),
    (f"{TRAIN} --steps 7 --set train.rows=50", "steps = 7 and rows = 50: give one of them"),
    ("train --steps 7 --set train.steps=8", "--steps 7: --set train.steps=8 says otherwise; give one of the two"),
    ("train --rows all --set train.rows=8", "--rows all: --set train.rows=8 says otherwise; give one of the two"),
    ("train --lr inf", "--lr inf: input should be a finite number"),
    ("train --lr nan", "--lr nan: input should be a finite number"),
    ("train --lr 1e308", "--lr 1e+308: input should be 0, or between 1e-30 and 1e+30"),
    ("train --seed 9223372036854775808", "--seed 9223372036854775808: input should fit into 64 bits"),
    ("train --d-sae 99999999999999999999999", "--d-sae 99999999999999999999999: input should be less than"),
    ("train --seeds 2 --seed 9223372036854775807", "--seeds 2: from seed 9223372036854775807 on they do not fit"),
    ("train --arch l1 --set train.sae.nonsense=3", "train.sae.nonsense: unknown key"),
    ("train --arch l1 --sweep sae.nonsense=3,4", "--sweep sae.nonsense=3: these settings have no nonsense"),
    ("train --sweep arch=topk,l1 --sweep k=2,4", "--sweep sae.k=2: arch l1 has no k; it is of batchtopk, "),
    ("train --sweep arch=topk,l1 --arch l1", "--arch l1: --sweep sae.arch=topk says otherwise; give one of the two"),
    # looking
    ("eval one --rows 10 --set eval.rows=5", "--rows 10: --set eval.rows=5 says otherwise; give one of the two"),
    ("report one --latents 3,3", "--latents 3,3: 3 is there twice"),
    ("report one --latents 0-24", "the dictionary has latents 0 to 23"),
    ("compare one --csv t.npy", "--csv t.npy: is written as CSV, not as .npy; name a .csv file"),
    ("cache export {rows} x.npy", "DEST x.npy: would be a folder, and .npy is the name of a file; name another"),
    ("list --runs x.json", "--runs x.json: would be a folder, and .json is the name of a file"),
    ("eval nothing", "nothing: no such run in"),
    ("eval one --rows 0", "--rows 0: input should be greater than or equal to 1; or input should be 'all'"),
    ("eval one --activations nothing", "--activations nothing: no such store in"),
    ("eval one --model empty", "--model empty: the folder has no config.json"),
    ("report nothing", "nothing: no such run in"),
    ("report one --latents 24", "the dictionary has latents 0 to 23"),
    ("report one --latents x", "--latents x: is not a whole number from 0 on"),
    ("report one --device gpu", "--device gpu: not usable here (no such device)"),
    ("cache inspect nothing", "nothing: no such store in"),
    ("cache inspect ''", "STORE is empty; say what is meant, or leave it out"),
    ("cache rm nothing", "nothing: no such store in"),
    ("cache rm text", "not confirmed, so nothing was removed; --yes does not ask"),
    # places
    (f"{TOKENIZE} --cache cache.file", "--cache cache.file: is a file, not a folder; name another"),
    (f"{TOKENIZE} --cache cache.file/in", "cannot write here ("),
    ("cache ls --cache cache.file", "--cache cache.file: is a file, not a folder; name another"),
    (f"{TRAIN} --runs cache.file", "--runs cache.file: is a file, not a folder; name another"),
    (f"{TRAIN} --runs cache.file/in", "cannot write here ("),
    ("list --runs cache.file", "--runs cache.file: is a file, not a folder; name another"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "says"), WRONG, ids=[re.sub(" --source text.* 1 ", " ", c) for c, _ in WRONG])
def test_bad_input(world: Path, command: str, says: str) -> None:
    """One line on stderr, nothing on stdout, exit code 2, and everything as it was."""
    before = contents(world)
    command = command.format(rows=store_of(world, "model-1"), tokens=store_of(world, "text-"))
    answer = sae(command)
    assert (answer.code, answer.out) == (2, "")
    assert says in answer.complaint
    assert contents(world) == before


@pytest.mark.usefixtures("no_network", "world")
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("tokenize", "https://huggingface.co cannot be reached; without a network use --source python or local files"),
        ("tokenize --source text.txt --tokenizer p50k_edit", "cannot be fetched (no network); try --tokenizer tiny"),
        (
            "tokenize --source text.txt --tokenizer hf:nobody/nothing",
            "cannot be reached; try --tokenizer tiny",
        ),
        (
            "harvest --model nobody/nothing",
            "cache, and https://huggingface.co cannot be reached; give a local Hugging Face folder",
        ),
    ],
)
def test_no_network(command: str, says: str) -> None:
    answer = sae(command)
    assert (answer.code, answer.out) == (2, "")
    assert says in answer.complaint


@pytest.mark.usefixtures("no_network", "world")
def test_offline_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_OFFLINE", "1")
    assert "the network is switched off" in sae("tokenize").complaint
    monkeypatch.setenv("SAE_OFFLINE", "perhaps")
    answer = sae("tokenize")
    assert answer.code == 2
    assert answer.complaint.startswith("--offline (or SAE_OFFLINE) perhaps: input should be a valid boolean")


def test_what_the_model_cannot_read(copy: Path) -> None:
    """A context longer than the model's, and another vocabulary; then nothing is left behind."""
    before = contents(copy)
    done(TOKENIZE, "--context", 64)
    answer = sae(HARVEST)
    assert answer.code == 2
    assert answer.complaint == "--context 64: model reads at most 32 tokens; tokenize again with a smaller --context"
    save_model(copy / "other", vocabulary=2048)
    answer = sae("harvest --model other --layer 1 --tokens-from", store_of(copy, "text-tiny-16").name)
    assert answer.code == 2
    assert "its tokenizer has 4,096 tokens, other 2,048; tokenize with the model's own tokenizer" in answer.complaint
    assert {path.rpartition("-")[0] for path in contents(copy) - before} == {
        "cache/tokens/text-tiny-64", "cache/tokens/text-tiny-64-validation",
    }  # fmt: skip


def test_no_document_for_the_validation(copy: Path) -> None:
    """The training tokens are made all the same; a note says why nothing is held out."""
    answer = done(TOKENIZE, "--validation", "1e-9", "--json")
    assert "no validation store: the documents of --source text.txt that fell to it (1e-09 of all)" in answer.err
    assert len(answer.json["stores"]) == 1


def test_more_than_there_is_is_said(copy: Path) -> None:
    """Before it is judged or written; and that without validation documents nothing can be."""
    answer = done("eval one --rows 1G --tokens 99999999999")
    assert re.search(r"--rows 1,000,000,000: \S+ has [0-9,]+, all of which are judged", answer.err)
    assert re.search(r"--tokens 99,999,999,999: \S+ has [0-9,]+, all of which are judged", answer.err)
    assert "all of which" not in done("eval one --rows 100").err
    key = store_of(copy, "model-1").name
    answer = done(f"cache export {key} x.zarr --rows 1G")
    assert re.search(r"--rows 1,000,000,000: \S+ has [0-9,]+, all of which are written", answer.err)
    answer = done(TOKENIZE, "--validation", "0")
    assert "no validation store: --validation 0 keeps no documents, so what is trained cannot be judged" in answer.err
    answer = done(TOKENIZE.replace("all", "1M"))
    assert re.search(
        r"train: 1,000,000 tokens wanted, [0-9,]+ are kept: --source text.txt has no more documents", answer.err
    )
    assert answer.err.splitlines()[-1] == "nothing to do: all that the source has was there already"


def test_the_four_commands_and_what_they_say(world: Path) -> None:
    """Each says what it picked; repeated, that there was nothing to do; --json is one value with what is promised."""
    tokenized = done(TOKENIZE, "--json")
    assert [store["tokens"] for store in tokenized.json["stores"]] == [16 * s["rows"] for s in tokenized.json["stores"]]
    assert tokenized.err.splitlines()[-1] == "nothing to do: the tokens asked for were there already"
    key = store_of(world, "text-").name
    harvested = done(HARVEST, "--json")
    assert {store["width"] for store in harvested.json["stores"]} == {16}
    assert harvested.err.splitlines()[0] == f"tokens: {key}"
    assert harvested.err.splitlines()[-1] == "nothing to do: the rows asked for were there already"
    planned = done(HARVEST, "--site", "resid_pre", "--dry-run", "--json")
    assert [plan["split"] for plan in planned.json["plans"]] == ["train", "validation"]
    assert all(plan["rows_to_do"] == plan["rows"] > 0 for plan in planned.json["plans"])
    trained = done(TRAIN, "--name", "one", "--resume", "--json")
    assert trained.json["run"] == str(world / "runs" / "one") and trained.json["step"] == 6
    assert trained.err.splitlines() == [
        f"activations: {store_of(world, 'model-1').name}",
        f"run: {world / 'runs' / 'one'}; nothing to do, it is finished",
    ]
    judged = done("eval --json")
    assert judged.err.splitlines()[0] == f"run: {world / 'runs' / 'one'}"
    figures = [
        "fvu", "explained_variance", "explained_variance_features", "cosine", "l2_ratio", "relative_bias",
        "normalised_mse", "mse", "row_error", "bits", "active_parameters", "codebook_usage", "perplexity",
        "active_units", "l0", "sparsity", "l0_relative", "l1", "hoyer", "dense_share", "rate_q25",
        "rate_median", "rate_q75", "dead_fraction", "ce_clean", "ce_spliced", "ce_degradation", "ce_zero",
        "ce_mean", "ce_recovered_zero", "ce_recovered_mean", "kl", "kl_score", "orthogonality", "jl",
        "largest_cosine", "mean_largest_cosine", "mean_largest_cosine_chance", "orthogonality_chance",
        "welch_bound", "encoder_decoder_cosine", "rows", "dead_rows", "tokens",
    ]  # fmt: skip
    assert [*judged.json] == [*figures, "details"]
    assert {*figures} == {one.key for one in figures_of(needs=available(model=True, truth=False))}
    assert "run: " in (told := done("report one --json")).err
    assert Path(told.json["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_shows_what_its_settings_say(world: Path, tmp_path: Path) -> None:
    """From a file and `--set`, as for every other stage."""
    file = tmp_path / "page.yaml"
    file.write_text("report: {count: 2, top: 3, weaker: 0}\n", encoding="utf-8")
    done(f"report one --config {file} --set report.before=1 --set report.after=0 --rows 500 --json")
    found = json.loads((world / "runs" / "one" / "eval" / "features.json").read_text())
    shown = [example for feature in found["features"] for example in feature["top"]]
    assert len(found["features"]) == 2 and not any(feature["bands"] for feature in found["features"])
    assert max(len(feature["top"]) for feature in found["features"]) == 3
    assert {len(example["tokens"]) for example in shown} <= {1, 2}
    for words, says in (
        ("--set report.tops=3", "report.tops: unknown key; did you mean 'top'?"),
        ("--set report.top=0", "report.top = 0: input should be greater than or equal to 1"),
        ("--set eval.rows=3", "--set eval.rows=3: `sae report` reads report.*; give this one to `sae eval`"),
        ("--rows 5 --set report.rows=6", "--rows 5: --set report.rows=6 says otherwise"),
    ):
        answer = sae(f"report one {words}")
        assert answer.code == 2 and says in answer.complaint


def test_results_for_people(world: Path) -> None:
    """Whole keys on stdout, and no progress there."""
    key = store_of(world, "model-1").name
    for command in (HARVEST, "cache ls", f"cache inspect {key}"):
        assert key in done(command).out
    assert "fvu" in done("eval one").out
    assert done("report one").out.startswith("report: ")
    assert done(HARVEST, "--dry-run").out.splitlines()[1].split() == [
        "split",
        "rows",
        "rows",
        "to",
        "write",
        "size",
        "seconds",
    ]
    assert done("train --resume --name one").out.splitlines()[0] == f"run {world / 'runs' / 'one'}"
    assert done("cache verify").out == "4 stores and 1 run, every byte as committed\n"


def test_lists(world: Path) -> None:
    found = done("list --json").json
    assert list(found) == [
        "runs",
        "architectures",
        "codecs",
        "formats",
        "sites",
        "metrics",
        "studies",
        "analyses",
        "sources",
        "row_sources",
        "presets",
    ]
    assert found["runs"][0]["name"] == "one" and "finished, on model-1" in found["runs"][0]["help"]
    assert all(entry["name"] in done("list").out for entries in found.values() for entry in entries)
    entries = done("cache ls --json").json
    assert all([*entry] == ["key", "kind", "slug", "rows", "bytes", "path", "complete", "written"] for entry in entries)
    assert [(entry["kind"], entry["complete"]) for entry in entries] == [("tokens", True)] * 2 + [
        ("activations", True)
    ] * 2
    described = done("cache inspect --json", store_of(world, "model-1").name).json
    assert described["recipe"]["site"] == "mlp_out" and described["rows"] == entries[2]["rows"]
    keys = [entry["key"] for entry in entries]
    assert done("cache verify --json").json == {"stores": keys, "runs": ["one"], "damage": []}


def test_nothing_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    assert "no stores yet; `sae tokenize` makes the first" in done("cache ls").out
    assert done("cache ls --json").json == []
    assert done("cache verify").out == "0 stores, every byte as committed\n"
    assert done("list --json").json["runs"] == []
    for command, step in (("harvest", "`sae tokenize`"), ("train", "`sae harvest`"), ("eval", "`sae train`")):
        answer = sae(command)
        assert answer.code == 2 and step in answer.complaint
    assert not list(tmp_path.iterdir())


def test_several_layers_are_listed_not_guessed(copy: Path) -> None:
    done(HARVEST, "--layer", "0,1")
    answer = sae(TRAIN, "--name", "two")
    keys = [store_of(copy, f"model-{layer}").name for layer in (0, 1)]
    assert (answer.code, answer.complaint) == (2, f"--activations: ambiguous; matches {', '.join(keys)}")
    done(TRAIN, "--name", "two", "--activations", "model-0.mlp_out-text-tiny-16-int8")
    assert f"run: {copy / 'runs' / 'two'}" in done("eval").err
    done(HARVEST)
    assert f"activations: {keys[1]}" in done(TRAIN, "--name", "three").err


def test_rows_take_the_place_of_a_presets_steps(world: Path, tmp_path: Path) -> None:
    answer = done("train --preset tiny --rows 640 --batch 64 --d-sae 24 --k 4 --json --runs", tmp_path)
    assert answer.json["step"] == 10
    answer = done("train --rows all --batch 256 --d-sae 24 --k 4 --json --runs", tmp_path)
    assert answer.json["step"] == json.loads((store_of(world, "model-1") / "request.json").read_text())["rows"] // 256


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C at a step of training, once."""
    advance, left = bars.Bars.advance, [step]

    def counted(told: bars.Bars, n: int, **fields: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        advance(told, n, **fields)

    monkeypatch.setattr(bars.Bars, "advance", counted)


def test_ctrl_c_and_resume(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training writes a checkpoint; --resume alone continues the one unfinished run, with its own settings."""
    interrupted_at(monkeypatch, 2)
    answer = sae(TRAIN, "--name", "two")
    assert answer.code == 130 and answer.out == ""
    assert answer.complaint == "interrupted; checkpoint at step 2; continue with `sae train --resume --name two`"
    assert "not finished" in done("list").out
    assert "`sae train --resume --name two`" in sae("eval two").complaint
    done(HARVEST, "--layer", "0")  # the run knows its store
    answer = done("train --resume --json")
    assert answer.json["step"] == 6 and answer.json["run"] == str(copy / "runs" / "two")
    assert "two: continuing at step 2 of 6" in answer.err
    expected = Run(copy / "runs" / "one").load_weights()[0]
    assert all(
        torch.equal(expected[name], found) for name, found in Run(copy / "runs" / "two").load_weights()[0].items()
    )


def test_which_run_to_resume(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("two", "three"):
        interrupted_at(monkeypatch, 2)
        assert sae(TRAIN, "--name", name).code == 130
    answer = sae("train --resume")
    assert (answer.code, answer.complaint) == (2, "--resume: ambiguous; give --name: two, three")
    assert done("train --resume --name three --json").json["run"].endswith("three")
    assert done("train --resume --json --name", copy / "runs" / "two").json["run"].endswith("two")


def test_ctrl_c_elsewhere(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was committed stays, and the command repeated ends with the same bytes."""
    whole = {path.name: path.read_bytes() for path in store_of(copy, "model-1").glob("rows/c/*/*")}
    done("cache rm --yes", *[path.name for path in (copy / "cache" / "activations").iterdir()])
    interrupted_at(monkeypatch, 3)
    answer = sae(HARVEST)
    assert answer.code == 130 and answer.complaint.startswith("interrupted")
    (entry,) = [entry for entry in done("cache ls --json").json if entry["kind"] == "activations"]
    assert entry["rows"] > 0 and not entry["complete"]
    half = done(TRAIN, "--name", "half")
    assert f"(unfinished: {entry['rows']:,} rows; the command that made it continues it)" in half.err
    done("cache verify")
    done(HARVEST)
    assert {path.name: path.read_bytes() for path in store_of(copy, "model-1").glob("rows/c/*/*")} == whole


def test_a_run_that_fails_at_once_is_not_in_the_way(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = sae(TRAIN, "--d-sae", 10**12, "--name", "big", "--runs", tmp_path)
    assert (answer.code, answer.out) == (2, "")
    assert answer.complaint == (
        "not enough memory; ask for less at once, as with --batch, --d-sae, --devices or --device cpu"
    )
    assert not list(tmp_path.iterdir())
    answer = sae(TRAIN, "--lr", "1e30", "--name", "hot", "--runs", tmp_path)
    assert answer.code == 2 and "try a smaller --lr" in answer.complaint


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_chunks(copy: Path) -> None:
    """Exit code 3 and the file's name, from whoever reads it; verify finds them all."""
    store = store_of(copy, "model-1")
    first, second, *_ = sorted(store.glob("rows/c/*/*"))
    spoil(first)
    (copy / "runs" / "one" / STATISTICS).unlink(missing_ok=True)  # from before the damage
    for command in (f"{TRAIN} --name two", "eval one", "report one", "cache verify", f"cache verify {store}"):
        answer = sae(command)
        assert answer.code == 3 and answer.out == "", command
        assert f"{first}: damaged (its checksum differs); " in answer.complaint
    assert "`sae cache rm`" in answer.complaint
    assert not (copy / "runs" / "two").exists()
    second.unlink()
    answer = sae("cache verify --json")
    assert answer.code == 3 and store.name in answer.json["stores"]
    assert [line.split(":")[0] for line in answer.json["damage"]] == [str(first), str(second)]
    assert [line.split(":")[2].strip() for line in answer.err.splitlines()[-2:]] == [str(first), str(second)]


@pytest.mark.parametrize("name", ["recipe.json", MANIFEST])
def test_a_store_that_cannot_be_opened(copy: Path, name: str) -> None:
    """The others are listed all the same, and it can be removed and made again."""
    store = store_of(copy, "model-1")
    (store / name).write_text("{\n")
    for command in (
        "cache ls",
        "cache ls --json",
        "cache verify --json",
        f"cache inspect {store.name}",
        f"{TRAIN} --name two",
    ):
        answer = sae(command)
        assert answer.code == 3 and str(store / name) in answer.complaint
    assert len(sae("cache ls --json").json) == 3
    assert store.name in done("cache rm --yes --json", store.name).json["removed"]
    done(HARVEST)
    done("cache verify")


def test_a_damaged_run(copy: Path) -> None:
    spoil(copy / "runs" / "one" / "sae_weights.safetensors")
    answer = sae("eval one")
    assert answer.code == 3 and "sae_weights.safetensors: " in answer.complaint
    (copy / "runs" / "one" / "config.json").write_text("{")
    answer = sae("eval one")
    assert answer.code == 3 and "config.json: is not what was written (not JSON); a run keeps" in answer.complaint


def test_removing(copy: Path) -> None:
    """Only with a yes."""
    key = store_of(copy, "model-1").name
    for typed in ("n\n", "\n", "", "yesterday\n"):
        answer = sae("cache rm", key, typed=typed)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err.startswith(f"Remove {key} (") and " kB)? [y/N] " in answer.err
        assert answer.err.endswith("sae: error: not confirmed, so nothing was removed; --yes does not ask\n")
    assert key in done("cache ls").out
    answer = sae("cache rm", key, key, typed="y\n")
    assert answer.code == 0 and re.fullmatch(f"removed {re.escape(key)}, [0-9.]+ kB\n", answer.out)
    assert key not in done("cache ls").out


def test_the_disk_is_full(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the middle of a harvest; what was committed is there."""
    done("cache rm --yes", *[path.name for path in (copy / "cache" / "activations").iterdir()])
    replace, left = os.replace, [20]

    def full(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "replace", full)
        answer = sae(HARVEST)
    assert answer.code == 2 and "no space left on the disk; what was committed is safe" in answer.complaint
    done(HARVEST)
    done("cache verify")
    assert all(entry["complete"] for entry in done("cache ls --json").json)


def test_files_may_not_grow(world: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        answer = sae(TOKENIZE, "--cache", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.code == 2 and "files may not grow that large here" in answer.complaint
    done(TOKENIZE, "--cache", tmp_path)


def test_a_folder_that_cannot_be_written(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    for command in (f"{TOKENIZE} --cache {tmp_path}", f"{TRAIN} --runs {tmp_path}"):
        answer = sae(command)
        assert (
            answer.code == 2 and "cannot write here (Read-only file system); choose another folder" in answer.complaint
        )


def test_our_own_mistakes(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("oh")

    monkeypatch.setattr(catalogue, "readable", fail)
    answer = sae("cache ls")
    assert answer.code == 1 and answer.out == ""
    assert "Traceback" in answer.err and "RuntimeError: oh" in answer.err
    assert answer.err.splitlines()[-1].startswith("sae: error: this is a bug; please report the lines above")


def test_version_and_help() -> None:
    assert done("--version").out.startswith("sae")
    for command in ("--help", "-h", "cache --help", "train --help"):
        assert "Usage: sae" in done(command).out
    for command in ("", "cache"):
        answer = sae(command)
        assert answer.code == 2 and "Usage: sae" in answer.out + answer.err and "error" not in answer.err


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sae har", {"harvest"}),
        ("sae cache ", {"ls", "inspect", "du", "verify", "gc", "export", "rm"}),
        ("sae train --st", {"--steps"}),
        ("sae train --preset ", set(configs.presets())),
        ("sae eval ", {"one"}),
        ("sae cache inspect model", {"model-1.mlp_out"}),
    ],
)
def test_completion(world: Path, monkeypatch: pytest.MonkeyPatch, typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    monkeypatch.setenv("_SAE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    assert {line.split("-text")[0] for line in done("").out.split()} == offered


def test_help_comes_at_once() -> None:
    """Without torch, and without anything else that takes seconds to import."""
    code = (
        "import sys, cli\n"
        "sys.argv = ['sae', 'train', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'zarr', 'datasets', 'numpy'} & set(sys.modules)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_leaves_early(world: Path) -> None:
    """As in `sae cache ls --json | head -1`: no traceback."""
    command = f"{sys.executable} -m sae.cli list --json | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.stdout == "{\n" and found.returncode in (0, 1) and found.stderr == ""
