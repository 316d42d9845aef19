"""Tokenizers: exact, reversible, the same through tiktoken and transformers, and clear when they are not there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.cache.errors import SaeError
from sae.pipeline import embedded
from sae.pipeline.runtime import network
from sae.pipeline.tokenize.sources import text_source
from sae.pipeline.tokenizers.spelling import byte_alphabet
from sae.pipeline.tokenizers.tokenizer import Tokenizer, tokenizer

TRICKY = [
    "", " ", "\n", "a", "  two  spaces ", "tab\tnew\nline\r\n", "don't we'll I'M", "12345 1,000.5",
    "naïve café 日本語 🙂", "<|endoftext|>", "x<|endoftext|>y <s>z</s> <unk>", "\u200b\u2028\x00\x7f\ufffd",
    "def f(x):\n    return x ** 2\n\n\n", "a" * 500, " " * 300, "\U0010ffff e\u0301",
]  # fmt: skip


def decode(tok: Tokenizer, ids: np.ndarray) -> str:
    vocabulary = tok.vocabulary()
    return b"".join(vocabulary[i] for i in ids).decode()


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return tokenizer("tiny", offline=True)


@pytest.fixture(scope="module")
def same_through_transformers() -> Tokenizer:
    return tokenizer(str(embedded.MODEL), offline=True)


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "gpt2_bpe" / "tiktoken_cache"))
        return tokenizer("gpt2", offline=True)


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Tokenizer:
    return tokenizer(str(shared_data / "models" / "stories260K" / "hf"), offline=True)


class TestTiny:
    def test_shape(self, tiny: Tokenizer) -> None:
        assert (tiny.slug, tiny.n_vocab, tiny.begin) == ("tiny", 4096, 4095)
        vocabulary = tiny.vocabulary()
        assert len(vocabulary) == len(set(vocabulary)) == 4096
        assert vocabulary[tiny.begin] == b"<|endoftext|>"
        assert {bytes([b]) for b in range(256)} <= set(vocabulary)

    @given(st.text())
    @settings(deadline=None)
    def test_round_trips_and_never_gives_the_begin_token(self, text: str) -> None:
        tok = tokenizer("tiny", offline=True)
        (ids,) = tok.encode_batch([text])
        assert ids.dtype == np.uint32
        assert decode(tok, ids) == text
        assert tok.begin not in ids

    @given(st.lists(st.text() | st.sampled_from(TRICKY), max_size=5))
    @settings(deadline=None)
    def test_is_the_same_function_in_transformers(
        self, tiny: Tokenizer, same_through_transformers: Tokenizer, texts: list[str]
    ) -> None:
        for ours, theirs in zip(tiny.encode_batch(texts), same_through_transformers.encode_batch(texts), strict=True):
            assert ours.tolist() == theirs.tolist()

    def test_is_the_same_function_on_real_text(self, tiny: Tokenizer, same_through_transformers: Tokenizer) -> None:
        texts = list(text_source("python", offline=True).open())[:150:3] + TRICKY
        for ours, theirs in zip(tiny.encode_batch(texts), same_through_transformers.encode_batch(texts), strict=True):
            assert ours.tolist() == theirs.tolist()
        assert same_through_transformers.vocabulary() == tiny.vocabulary()
        assert same_through_transformers.begin == tiny.begin

    def test_shortens_the_text_it_was_made_for(self, tiny: Tokenizer) -> None:
        texts = list(text_source("python", offline=True).open())[::20]
        assert sum(map(len, texts)) / sum(map(len, tiny.encode_batch(texts))) > 3

    def test_the_model_beside_it_has_its_size(self, tiny: Tokenizer) -> None:
        config = json.loads((embedded.MODEL / "config.json").read_text())
        assert config["vocab_size"] == tiny.n_vocab
        assert config["bos_token_id"] == config["eos_token_id"] == tiny.begin
        assert embedded.resolve("tiny") == str(embedded.MODEL)
        assert embedded.resolve("gpt2") == "gpt2"

    def test_the_readme_gives_the_figures_of_the_run(self) -> None:
        figures = json.loads((embedded.MODEL / "training.json").read_text())
        readme = (embedded.MODEL.parent / "README.md").read_text()
        for name in ("parameters", "training_tokens", "tokens_seen", "steps", "held_out_tokens"):
            assert f"{figures[name]:,}" in readme, name
        for name in ("ce_uniform", "ce_unigram", "ce_held_out", "ce_train"):
            assert f"{figures[name]:.4f}" in readme, name
        assert all(command in readme for command in figures["command"].split("; then "))
        assert figures["source"]["digest"] in readme

    def test_the_recipe_is_fixed(self, tiny: Tokenizer) -> None:
        """A change here changes the name of every store made from it."""
        assert tiny.recipe() == {"name": "tiny", "digest": "a7afc517f6242791cebf7872bafdc928"}


class TestGpt2:
    def test_is_gpt2(self, gpt2: Tokenizer) -> None:
        assert (gpt2.slug, gpt2.n_vocab, gpt2.begin) == ("gpt2", 50257, 50256)
        assert gpt2.encode_batch(["Hello world"])[0].tolist() == [15496, 995]

    def test_agrees_with_the_transformers_folder(self, gpt2: Tokenizer, shared_data: Path) -> None:
        folder = tokenizer(str(shared_data / "gpt2_bpe" / "hf_tokenizer"), offline=True)
        texts = [*TRICKY, (shared_data / "text" / "tinystories_sample.txt").read_text()[:20_000]]
        for ours, theirs in zip(gpt2.encode_batch(texts), folder.encode_batch(texts), strict=True):
            assert ours.tolist() == theirs.tolist()
        assert gpt2.vocabulary() == folder.vocabulary()
        assert gpt2.begin == folder.begin

    def test_special_text_is_ordinary_text(self, gpt2: Tokenizer) -> None:
        (ids,) = gpt2.encode_batch(["a<|endoftext|>b"])
        assert gpt2.begin not in ids
        assert decode(gpt2, ids) == "a<|endoftext|>b"

    def test_lone_surrogates_do_not_stop_a_run(self, gpt2: Tokenizer) -> None:
        assert decode(gpt2, gpt2.encode_batch(["x\ud800y"])[0]) == "x\ufffdy"


class TestSentencePiece:
    def test_is_what_it_says(self, stories: Tokenizer) -> None:
        assert (stories.n_vocab, stories.begin) == (512, 1)
        vocabulary = stories.vocabulary()
        assert vocabulary[1] == b"<s>"
        assert vocabulary[3:259] == [bytes([b]) for b in range(256)]
        assert b" the" in vocabulary

    def test_round_trips_real_stories_and_tricky_text(self, stories: Tokenizer, shared_data: Path) -> None:
        texts = [*TRICKY, (shared_data / "text" / "tinystories_sample.txt").read_text()]
        for text, ids in zip(texts, stories.encode_batch(texts), strict=True):
            assert decode(stories, ids) == (" " + text if text else "")  # SentencePiece puts a space first
            assert stories.begin not in ids


class TestRefusals:
    def refused(self, spec: str) -> str:
        with pytest.raises(SaeError) as caught:
            tokenizer(spec, offline=True)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("tokenizer = ")
        return message

    def test_unknown_names(self) -> None:
        for spec in ("nonsense", "", "org/name"):
            message = self.refused(spec)
            assert "tiny" in message
            assert "gpt2" in message

    def test_gpt2_without_cache_or_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        tiktoken.registry.ENCODINGS.pop("r50k_base", None)
        assert "tokenizer = tiny" in self.refused("r50k_base")
        monkeypatch.setattr(network, "reachable", lambda url: False)
        with pytest.raises(SaeError, match="no network"):
            tokenizer("r50k_base", offline=False)

    def test_the_hub_without_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "offline was asked for" in self.refused("hf:org/no-such-name")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(network, "reachable", lambda url: False)
        with pytest.raises(SaeError, match="cannot be reached"):
            tokenizer("hf:org/no-such-name", offline=False)

    def test_a_folder_without_a_tokenizer(self, tmp_path: Path) -> None:
        assert "tokenizer.json" in self.refused(str(tmp_path))

    def test_a_gpt2_folder_without_tokenizer_files_is_not_silently_empty(self, tmp_path: Path) -> None:
        shutil.copy(embedded.MODEL / "config.json", tmp_path)
        assert "holds no tokenizer" in self.refused(str(tmp_path))

    def test_a_tokenizer_that_cannot_begin_a_document(self, tmp_path: Path) -> None:
        shutil.copy(embedded.MODEL / "tokenizer.json", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        assert "bos" in self.refused(str(tmp_path))


def test_truncation_saved_in_a_tokenizer_does_not_cut_documents(tmp_path: Path) -> None:
    saved = json.loads((embedded.MODEL / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    shutil.copy(embedded.MODEL / "tokenizer_config.json", tmp_path)
    text = "word " * 400
    tok = tokenizer(str(tmp_path), offline=True)
    assert decode(tok, tok.encode_batch([text])[0]) == text
    assert tok.recipe()["digest"] == tokenizer(str(embedded.MODEL), offline=True).recipe()["digest"]


def test_the_byte_alphabet_is_gpt2s() -> None:
    table = byte_alphabet()
    assert sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["A"]) == (ord(" "), ord("\n"), ord("A"))


def test_a_worker_can_build_it_again_from_its_name() -> None:
    program = (
        "from sae.pipeline.tokenizers.tokenizer import tokenizer; "
        "print(tokenizer('tiny', offline=True).recipe()['digest'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert run.stdout.strip() == tokenizer("tiny", offline=True).recipe()["digest"], run.stderr
