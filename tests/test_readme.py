"""The commands of the pages do what they say: every block is typed as it stands, on what README's first five leave.

Stand-ins are only what cannot be here: the hub's model gpt2 and its encoding (a GPT-2 of twelve narrow layers and the
embedded encoding go by that name), data sets of the hub (a local file), the folder /models. Amounts are cut: windows,
the steps of a training, the demo. Everything else, the network's absence included, is as it would be.
"""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import torch
from pyarrow import parquet
from support.command_line import SMALL_DEMO, sae
from support.pages import PAGES, README, blocks, typed
from support.small_models import small_stages
from support.small_tokenizers import write_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from sae.cache import activations, tokens
from sae.cache.store.manifest import Windows
from sae.pipeline.tokenize import repair
from sae.pipeline.tokenize import stage as tokenize
from sae.pipeline.tokenize.sources import TextSource, text_source
from sae.pipeline.tokenizers.tokenizer import embedded_encoding
from sae.pipeline.train.stage import TrainConfig

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS, TOKENS = 2048, 8192  # of a chunk
STEPS = 2  # of a training, at most
CHARACTERS = 260_000
ON_THE_HUB = ("fineweb", "org/dataset")
FIRST = next(block for block in blocks(README) if typed(block, "sae"))  # GPT-2 on FineWeb, from text to report
TYPED = (
    README,
    *(PAGES[f"docs/{name}.md"] for name in ("stages", "places", "upkeep", "howto/reproduce", "howto/coming-from")),
)
BLOCKS = [block for page in TYPED for block in blocks(page) if typed(block, "sae")]
HOUR = PAGES["docs/first-hour.md"].partition("## On to a real model")[0]
OWN_TESTS = {  # words of commands that take what is not here, or long, and have tests of their own
    "--devices",  # several processes
    "s1.edf",  # MNE
    "push", "pull",  # the hub
    "probe", "explain",  # labelled texts, other models
    "match", "steer", "topk-k16",  # runs that no page makes
    "study", "decompose",  # train many, or for long
}  # fmt: skip
# What makes a command small: the demo at its full size is tests/pipeline/commands/test_demo.py's.
SMALL = {
    "demo": " ".join(SMALL_DEMO),
    "synthesize toy": "synthesize.steps=5 synthesize.rows=4096 synthesize.validation_rows=4096",
}


def saved(config: Any, folder: Path) -> Path:
    """A random model of that shape."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def texts() -> list[str]:
    """Some real text in documents of a few thousand characters."""
    found: list[str] = []
    for document in text_source("python", offline=True).open():
        found += [str(document)[at : at + 3000] for at in range(0, min(len(document), 12_000), 3000)]
        if len(found) * 3000 > CHARACTERS:
            return found
    return found


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where README's first commands were typed; `cache` and `runs` in it are what they left."""
    folder = tmp_path_factory.mktemp("readme")
    vocabulary = embedded_encoding()
    shape = {"vocab_size": vocabulary.n_vocab, "n_positions": 256, "bos_token_id": None, "eos_token_id": None}
    hub = folder / "hub" / "models--gpt2"
    saved(GPT2Config(n_embd=32, n_layer=12, n_head=4, **shape), hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(COMMIT)
    llama = write_tokenizer(folder / "models" / "my-llama", "Llama 2")
    size = len(json.loads((llama / "tokenizer.json").read_text())["model"]["vocab"])
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    saved(LlamaConfig(vocab_size=size, num_key_value_heads=1, **narrow), llama)
    (folder / "texts").mkdir()
    table = pyarrow.table({"text": texts()})
    pyarrow.parquet.write_table(table, folder / "texts" / "a.parquet")
    (folder / "mine.yaml").write_text("train:\n  batch: 2048\n")

    def source(spec: str, **options: Any) -> TextSource:
        return text_source(str(folder / "texts" / "a.parquet") if spec in ON_THE_HUB else spec, **options)

    def encoding(name: str) -> tiktoken.Encoding:
        assert name == "gpt2"
        known = vocabulary
        return tiktoken.Encoding(
            name, pat_str=known._pat_str, mergeable_ranks=known._mergeable_ranks, special_tokens=known._special_tokens
        )

    whole = TrainConfig.total_steps
    with small_stages() as patch:
        patch.setattr(activations, "CHUNK_ROWS", ROWS)
        patch.setattr(activations, "WINDOWS", Windows(ROWS, 4 * ROWS))
        patch.setattr(tokens, "CHUNK_TOKENS", TOKENS)
        for stage in (tokenize, repair):
            patch.setattr(stage, "text_source", source)
        patch.setattr(tiktoken, "get_encoding", encoding)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr(TrainConfig, "total_steps", lambda self, rows: min(STEPS, whole(self, rows)))
        patch.setattr(os, "cpu_count", lambda: 1)  # worker processes would know nothing of the stand-ins
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        patch.setenv("SAE_RUNS", str(folder / "runs"))
        patch.chdir(folder)
        for arguments in typed(FIRST, "sae"):
            run(arguments, folder)
        yield folder


def run(arguments: list[str], folder: Path) -> None:
    """Type a command of a page. It must succeed, with JSON on stdout where that was asked for."""
    if set(arguments) & OWN_TESTS:
        return
    words = [word.replace("/models/", f"{folder}/models/") for word in arguments]
    cut = SMALL.get(" ".join(words[:2]), SMALL.get(words[0], ""))
    answer = sae(shlex.join(words), *(f"--set={small}" for small in cut.split()))
    assert answer.code == 0, f"{shlex.join(arguments)}\n{answer.err}"
    assert "Traceback" not in answer.err
    if "--json" in words:
        assert answer.json


def test_the_first_hour_from_beginning_to_end(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setitem(SMALL, "tokenize", "tokenize.tokens=60000 tokenize.validation_tokens=4096")
    monkeypatch.setitem(SMALL, "harvest", "harvest.tokens=10000 harvest.validation_tokens=4096")
    monkeypatch.setitem(SMALL, "eval", "eval.tokens=2048 eval.dead_rows=0")
    monkeypatch.setitem(SMALL, "report", "report.top=2")
    for arguments in typed(HOUR, "sae"):
        run(arguments, begun)
    for written in ("runs/first/report.html", "runs/compare.png", "for-saelens/cfg.json"):
        assert (tmp_path / written).is_file()
    found: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```", HOUR, re.MULTILINE | re.DOTALL)[0], found)
    assert found["coder"].W_dec.shape == (1024, 128) and found["latents"].l0().shape == (512,)
    assert int(found["latents"].l0().max()) == 16


def names(block: str) -> str:
    return typed(block, "sae")[0][0] + f" and {len(typed(block, 'sae')) - 1} more"


@pytest.mark.parametrize("block", BLOCKS[1:], ids=names)
def test_the_commands_of_a_block_run_as_written(
    block: str, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cache", "runs", "texts"):
        shutil.copytree(begun / name, tmp_path / name)
    shutil.copy(begun / "mine.yaml", tmp_path)
    columns = {f"x{i}": np.random.default_rng(i).normal(size=4096).astype(np.float32) for i in range(8)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "embeddings.parquet")
    signal = np.random.default_rng(0).normal(size=(4096, 5)).cumsum(0).round(3)
    lines = [",".join(map(str, row)) for row in signal]
    (tmp_path / "eeg.csv").write_text("\n".join(["f3,f4,o1,o2,class", *lines]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_RUNS", str(tmp_path / "runs"))
    for arguments in typed(block, "sae"):
        run(arguments, begun)
