"""The local backend: a tiny random model whose answers are of the right form all the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import sae
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from sae.cache.runs import Run
from sae.pipeline.explain.backend import Surroundings
from sae.pipeline.explain.backends.local import Backend
from sae.pipeline.explain.config import ExplainConfig
from sae.pipeline.explain.prompts import Form, Request
from sae.pipeline.explain.stage import explain
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.runtime.workplace import Workplace


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**letters, "<s>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<s>"}))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in made.parameters():  # large enough that what was said before matters
            weight.add_(torch.randn_like(weight))
    made.save_pretrained(folder)
    return folder


def backend(model: Path, folder: Path, **settings: Any) -> Backend:
    config = ExplainConfig(backend="local", model=str(model), **settings)
    return Backend(config, Surroundings(folder, "cpu", True, Silent()))


@pytest.mark.slow
def test_answers_are_those_of_the_greatest_probability(model: Path, tmp_path: Path) -> None:
    one = backend(model, tmp_path)
    plain = LlamaForCausalLM.from_pretrained(model).eval()
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

    def ids(text: str) -> list[int]:
        return [256, *(letters[{" ": "Ġ", "\n": "Ċ"}.get(c, c)] for c in text)]

    for form in (Form(3, 1), Form(2, 10)):
        answer = one.send(Request("sys", "user", form))
        found = form.read(answer.text)
        said = "sys\n\nuser\n\n{"
        for i, key in enumerate(form.keys):
            said += f'{" " if i else ""}"{key}":'
            left = [f" {choice}{'}' if i + 1 == form.numbers else ','}" for choice in form.choices]
            at = 0
            while len(left) > 1:
                with torch.no_grad():
                    logits = plain(torch.tensor([ids(said + left[0][:at])])).logits[0, -1]
                best = max({option[at] for option in left}, key=lambda c: float(logits[ids(c)[1]]))
                left = [option for option in left if option[at] == best]
                at += 1
            said += left[0]
            assert isinstance(found, list) and form.choices[found[i]] == left[0][1:-1]
        assert said.endswith(answer.text)
    assert answer.asked_tokens == len(ids("sys\n\nuser\n\n"))


@pytest.mark.slow
def test_a_run_is_explained_and_nothing_is_computed_twice(run: Run, place: Workplace, model: Path) -> None:
    config = ExplainConfig(
        backend="local", model=str(model), latents=(20, 21), scoring=("detection",), examples=4, active=4, silent=4,
        window=8,
    )  # fmt: skip
    found = explain(run, place, config)
    assert found is not None and found.made["errors"] == 0
    for one in found.features:
        assert one.explanation and 0 <= (one.score or 0) <= 1 and one.model == str(model)
    again = explain(run, place, config)
    assert again is not None and again.features == found.features and again.made["sent"] == 0
    long = config.model_copy(update={"examples": 60, "window": 32})
    where = ["--cache", place.cache, "--runs", place.runs]
    set_ = f"--set explain.examples={long.examples} --set explain.window=32"
    answer = sae(f"explain planted --backend local --model {model} --latents 20,21 {set_}", *where)
    assert answer.code == 2 and "more than the 4096 tokens that the model reads" in answer.complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("", "--backend local: needs a causal language model"), ("--model /nowhere", "no such folder"),
        ("--model no-such/model --offline", "no-such/model"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(run: Run, place: Workplace, said: str, complaint: str) -> None:
    answer = sae(f"explain planted --backend local {said}", "--cache", place.cache, "--runs", place.runs)
    assert answer.code == 2 and complaint in answer.complaint
