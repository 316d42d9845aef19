"""Ids are those of tokenizer.json in every kind of folder; a stranger's file is refused in one line, and never run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.small_tokenizers import KINDS, TEXTS, saved, write_tokenizer
from tokenizers import Tokenizer as Backend

from sae.cache.errors import SaeError
from sae.pipeline.tokenizers.huggingface import function_digest
from sae.pipeline.tokenizers.tokenizer import Tokenizer, tokenizer

Saved = dict[str, Any]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    folder = write_tokenizer(tmp_path / "folder", kind)
    tok = tokenizer(str(folder), offline=True)
    truth = Backend.from_file(str(folder / "tokenizer.json"))
    truth.no_truncation()
    truth.no_padding()
    recipe = {"name": "folder", "digest": function_digest(truth)}
    ordinary = [text for text in TEXTS if "<s>" not in text]
    for text, ids in zip(ordinary, tok.encode_batch(ordinary), strict=True):
        assert ids.tolist() == truth.encode(text, add_special_tokens=False).ids, text
    truth.encode_special_tokens = True
    for text, ids in zip(TEXTS, tok.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == truth.encode(text, add_special_tokens=False).ids, text
        # SentencePiece's files of this kind have even "</s>" among the pieces of text
        assert kind in ("T5", "XLNet") or tok.begin not in ids
    assert tok.begin == KINDS[kind][-1]
    assert tok.n_vocab == truth.get_vocab_size()
    assert tok.recipe() == recipe


@pytest.mark.parametrize("kind", ["SmolLM", "Qwen2", "Llama 3", "Llama 2", "Mistral", "Gemma", "T5", "BERT"])
def test_the_bytes_of_ids_are_the_text(tmp_path: Path, kind: str) -> None:
    tok = tokenizer(str(write_tokenizer(tmp_path, kind)), offline=True)
    table = tok.vocabulary()
    assert len(table) == tok.n_vocab
    text = "a dog and a cat went out"
    assert b"".join(table[i] for i in tok.encode_batch([text])[0]).decode().strip() == text


def test_a_decoder_is_not_needed_to_know_the_bytes(tmp_path: Path) -> None:
    changed(tmp_path, decoder=None)
    tok = tokenizer(str(tmp_path), offline=True)
    table = tok.vocabulary()
    assert b"".join(table[i] for i in tok.encode_batch(["a café"])[0]).decode() == "a café"


class TestBegin:
    def found(self, folder: Path, config: Saved, model: Saved | None = None, special: Saved | None = None) -> Tokenizer:
        (folder / "tokenizer.json").write_text(saved("llama2"))
        for name, content in (
            ("tokenizer_config.json", config), ("config.json", model), ("special_tokens_map.json", special),
        ):  # fmt: skip
            if content is not None:
                (folder / name).write_text(json.dumps(content))
        return tokenizer(str(folder), offline=True)

    def test_names_may_be_objects_and_lie_in_another_file(self, tmp_path: Path) -> None:
        tok = self.found(tmp_path, {}, special={"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
        assert (tok.begin, tok.has_begin, tok.end) == (1, True, 2)

    def test_null_is_none_and_the_end_stands_in(self, tmp_path: Path) -> None:
        tok = self.found(tmp_path, {"bos_token": None, "eos_token": "</s>"}, {"bos_token_id": 1})
        assert (tok.begin, tok.has_begin, tok.end) == (2, False, 2)

    def test_a_class_stands_for_its_tokens(self, tmp_path: Path) -> None:
        tok = self.found(tmp_path, {"tokenizer_class": "LlamaTokenizer"})
        assert (tok.begin, tok.has_begin, tok.end) == (1, True, 2)

    def test_the_model_has_the_last_word(self, tmp_path: Path) -> None:
        tok = self.found(tmp_path, {}, {"model_type": "nobodys", "bos_token_id": 1, "eos_token_id": [2, 0]})
        assert (tok.begin, tok.has_begin, tok.end) == (1, True, 2)

    def test_a_name_that_is_no_token_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SaeError, match=r"its bos_token \[BOS\] is not in its tokenizer.json"):
            self.found(tmp_path, {"bos_token": "[BOS]", "eos_token": "</s>"})


def changed(folder: Path, **parts: Any) -> None:
    """A folder whose tokenizer.json has other parts."""
    write_tokenizer(folder, "SmolLM")
    whole = json.loads(saved("digits"))
    (folder / "tokenizer.json").write_text(json.dumps({**whole, **parts}))


def model(folder: Path, **parts: Any) -> None:
    """A folder whose tokenizer.json has another model."""
    changed(folder, model={**json.loads(saved("digits"))["model"], **parts})


def text(folder: Path, content: str) -> None:
    write_tokenizer(folder, "SmolLM")
    (folder / "tokenizer.json").write_text(content)


def instead(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Something else in the place of a file."""
    write_tokenizer(folder, "SmolLM")
    (folder / name).unlink()
    make(folder / name)


VOCABULARY: dict[str, int] = json.loads(saved("digits"))["model"]["vocab"]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
HOSTILE: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda folder: text(folder, "<!doctype html><html>"),
    "empty": lambda folder: text(folder, ""),
    "cut short": lambda folder: text(folder, saved("digits")[:5000]),
    "not UTF-8": lambda folder: instead(folder, "tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe{}\x00")),
    "a list": lambda folder: text(folder, "[1, 2]"),
    "a number": lambda folder: text(folder, "1" * 5000),
    "deep": lambda folder: text(folder, '{"a":' * 200_000 + "1" + "}" * 200_000),
    "deep list": lambda folder: text(folder, "[" * 200_000),
    "deep inside": lambda folder: text(folder, saved("digits")[:-1] + ', "x": ' + "[" * 900 + "]" * 900 + "}"),
    "a key twice": lambda folder: text(folder, '{"version": "1.0", ' + saved("digits")[1:]),
    "NaN": lambda folder: model(folder, dropout=float("nan")),
    "infinity": lambda folder: text(folder, '{"version": 1e999, "model": {"vocab": {"a": Infinity}}}'),
    "huge number": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": 10**400}),
    "id beyond 32 bits": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": 1 << 32}),
    "id beyond sense": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": 1 << 31}),
    "negative id": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": -1}),
    "fraction": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": 1.5}),
    "true": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": True}),
    "an id as text": lambda folder: model(folder, vocab={**VOCABULARY, "\x1b[31mzzz": "\x1b[31m7"}),
    "one id for two": lambda folder: model(folder, vocab={**VOCABULARY, "zzz": 5}),
    "no vocabulary": lambda folder: model(folder, vocab={}),
    "no model": lambda folder: changed(folder, model=None),
    "a model of text": lambda folder: changed(folder, model="BPE"),
    "an unknown model": lambda folder: model(folder, type="Other"),
    "merges of nothing": lambda folder: model(folder, merges=[["no such", "pair"]]),
    "merges to nothing": lambda folder: model(folder, vocab={"a": 0, "b": 1}, merges=[["a", "b"]]),
    "merges of numbers": lambda folder: model(folder, merges=[[1, 2]]),
    "dropout": lambda folder: model(folder, dropout=0.1),
    "half a character": lambda folder: model(folder, vocab={**VOCABULARY, "\ud800": len(VOCABULARY)}),
    "a pattern that is none": lambda folder: changed(
        folder, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    ),
    "a damaged map of characters": lambda folder: changed(
        folder, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "an added token elsewhere": lambda folder: changed(
        folder, added_tokens=[{"id": 9999, "content": "<z>", **SPECIAL}]
    ),
    "an added token on another": lambda folder: changed(folder, added_tokens=[{"id": 3, "content": "<z>", **SPECIAL}]),
    "added tokens of text": lambda folder: changed(folder, added_tokens="all"),
    "added tokens of numbers": lambda folder: changed(folder, added_tokens=[1, 2]),
    "a pipe": lambda folder: instead(folder, "tokenizer.json", os.mkfifo),
    "a folder": lambda folder: instead(folder, "tokenizer.json", Path.mkdir),
    "a device": lambda folder: instead(folder, "tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": lambda folder: instead(folder, "tokenizer.json", lambda path: path.symlink_to("gone")),
    "a link to itself": lambda folder: instead(folder, "tokenizer.json", lambda path: path.symlink_to(path.name)),
    "too large": lambda folder: instead(
        folder, "tokenizer.json", lambda path: (path.touch(), os.truncate(path, 1 << 40))
    ),
    "its configuration a pipe": lambda folder: instead(folder, "tokenizer_config.json", os.mkfifo),
    "its configuration a list": lambda folder: instead(
        folder, "tokenizer_config.json", lambda path: path.write_text("[]")
    ),
    "its configuration deep": lambda folder: instead(
        folder, "tokenizer_config.json", lambda path: path.write_text('{"bos_token":' * 100_000)
    ),
    "its model's configuration a pipe": lambda folder: instead(folder, "config.json", os.mkfifo),
    "a begin token of numbers": lambda folder: instead(
        folder, "tokenizer_config.json", lambda path: path.write_text('{"bos_token": {"content": [1, "\\u001b[2J"]}}')
    ),
    "a begin token of control characters": lambda folder: instead(
        folder, "tokenizer_config.json", lambda path: path.write_text('{"bos_token": "\\u001b[2J\\n"}')
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_folders_are_refused_in_one_line(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    HOSTILE[kind](tmp_path)
    with pytest.raises(SaeError) as caught:
        tokenizer(str(tmp_path), offline=True)
    message = str(caught.value)
    assert message.startswith(f"tokenizer = {tmp_path}: ")
    assert message.isprintable()
    assert len(message) < 500
    assert capfd.readouterr() == ("", "")


def test_control_characters_in_a_vocabulary_are_bytes_like_others(tmp_path: Path) -> None:
    model(tmp_path, vocab={**VOCABULARY, "\x1b[2J\x00\n": len(VOCABULARY)})
    assert tokenizer(str(tmp_path), offline=True).vocabulary()[-1] == b"\x1b[2J\x00\n"


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    """As in the cache of the hub's library."""
    write_tokenizer(tmp_path / "blobs", "SmolLM")
    (tmp_path / "folder").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "folder" / name).symlink_to(f"../blobs/{name}")
    assert tokenizer(str(tmp_path / "folder"), offline=True).n_vocab == 480


class TestCode:
    """A folder's own Python, which would leave a mark."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
        folder = write_tokenizer(tmp_path / "folder", "SmolLM")
        (folder / "own.py").write_text(
            f"open({str(tmp_path / 'mark')!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
        )
        code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **code}))
        (folder / "config.json").write_text(
            json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": "own.Own"}})
        )
        return folder

    def test_is_not_needed_where_there_is_a_file(self, folder: Path) -> None:
        tok = tokenizer(str(folder), offline=True)
        assert tok.begin == 0
        assert not (folder.parent / "mark").exists()

    @pytest.mark.parametrize("left", ["auto_map", "nothing"])
    def test_is_never_run(self, folder: Path, left: str) -> None:
        (folder / "tokenizer.json").unlink()
        shutil.copy(folder / "own.py", folder / "vocab.json")
        if left == "nothing":
            (folder / "tokenizer_config.json").unlink()
        with pytest.raises(SaeError, match=r"needs a tokenizer\.json"):
            tokenizer(str(folder), offline=True)
        assert not (folder.parent / "mark").exists()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("pieces")
    (folder / "corpus.txt").write_text("\n".join(text for text in TEXTS if text.isprintable()) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False, add_dummy_prefix=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
    )  # fmt: skip
    return folder


class TestConversion:
    """Folders without a tokenizer.json."""

    def test_a_vocabulary_and_merges_of_a_known_class(self, tmp_path: Path) -> None:
        folder = write_tokenizer(tmp_path / "whole", "GPT-2")
        whole = tokenizer(str(folder), offline=True)
        Backend.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
        (folder / "tokenizer.json").unlink()
        parts = tokenizer(str(folder), offline=True)
        assert parts.begin == whole.begin
        for text, wanted, ids in zip(TEXTS, whole.encode_batch(TEXTS), parts.encode_batch(TEXTS), strict=True):
            assert ids.tolist() == wanted.tolist(), text

    @pytest.mark.parametrize("kind", ["StarCoder2", "plain", "GPT-2 alone"])
    def test_files_that_do_not_say_how_text_is_cut(self, tmp_path: Path, kind: str) -> None:
        folder = write_tokenizer(tmp_path, kind)
        Backend.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
        (folder / "tokenizer.json").unlink()
        with pytest.raises(SaeError, match=r"needs a tokenizer\.json"):
            tokenizer(str(folder), offline=True)

    def test_pieces_are_those_of_sentence_piece(self, pieces: Path) -> None:
        import sentencepiece

        (pieces / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
        tok = tokenizer(str(pieces), offline=True)
        own = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
        for text in TEXTS[1:9]:
            assert tok.encode_batch([text])[0].tolist() == own.encode(text), text

    def test_other_pieces_are_refused(self, pieces: Path) -> None:
        (pieces / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        with pytest.raises(SaeError, match="otherwise than SentencePiece"):
            tokenizer(str(pieces), offline=True)
