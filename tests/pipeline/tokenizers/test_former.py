"""Stores made when transformers built tokenizers anew: continued where the ids are right, told of where not."""

import json
from pathlib import Path

import pytest
from support.small_tokenizers import CORPUS, write_tokenizer

from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize
from sae.pipeline.tokenizers.conversion import build
from sae.pipeline.tokenizers.former import identity, judge
from sae.pipeline.tokenizers.huggingface import Ends, HuggingFaceTokenizer
from sae.pipeline.tokenizers.matching import matches
from sae.pipeline.tokenizers.tokenizer import tokenizer


class Notes(Silent):
    """What a stage says of a new store."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        if line.startswith("a new store: "):
            self.lines.append(line)


def as_before(folder: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a folder as earlier versions had it."""
    loaded = build("--tokenizer x", folder)
    begin = loaded.bos_token_id if loaded.bos_token_id is not None else loaded.eos_token_id
    ends = Ends(begin, loaded.bos_token_id is not None, loaded.eos_token_id)
    return HuggingFaceTokenizer(loaded.backend_tokenizer, folder.name, ends, folder)


def made(folder: Path, root: Path, **settings: object) -> tuple[TokenStore, list[str]]:
    source = root / "documents.jsonl"
    root.mkdir(exist_ok=True)
    source.write_text("\n".join(json.dumps({"text": f"{i} {text}"}) for i, text in enumerate(CORPUS) if text.strip()))
    given = {"source": str(source), "tokenizer": str(folder), "context": 32, "tokens": "all", "validation": 0}
    config = TokenizeConfig.model_validate({**given, **settings})
    store = tokenize(config, root, notes := Notes(), offline=True).stores["train"]
    return store, notes.lines


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr("sae.pipeline.tokenize.stage.tokenizer", lambda spec, offline: as_before(Path(spec)))
    return monkeypatch


@pytest.mark.parametrize("kind", ["GPT-2", "Qwen2", "Pythia", "Gemma", "BLOOM", "plain", "tokens added"])
def test_a_store_with_the_right_ids_is_continued(tmp_path: Path, before: pytest.MonkeyPatch, kind: str) -> None:
    folder = write_tokenizer(tmp_path / "model", kind)
    old, _ = made(folder, tmp_path / "cache")
    before.undo()
    again, notes = made(folder, tmp_path / "cache")
    assert again.key == old.key
    assert notes == []
    assert matches(again, str(folder), offline=True)


@pytest.mark.parametrize("kind", ["SmolLM", "GPT-NeoX, digits", "Qwen2 alone", "Llama 2", "Cohere"])
def test_a_store_with_other_ids_is_told_of(tmp_path: Path, before: pytest.MonkeyPatch, kind: str) -> None:
    folder = write_tokenizer(tmp_path / "model", kind)
    old, _ = made(folder, tmp_path / "cache")
    before.undo()
    new, notes = made(folder, tmp_path / "cache")
    assert new.key != old.key
    assert len(notes) == 1
    assert old.key in notes[0]
    assert "do not use it" in notes[0]
    if kind != "Llama 2":  # which differs only in documents that begin with spaces
        with pytest.raises(SaeError, match=r"(the same vocabulary, but|token \d+ is)"):
            matches(old, str(folder), offline=True)
    assert matches(new, str(folder), offline=True)
    again, notes = made(folder, tmp_path / "cache")
    assert (again.key, notes) == (new.key, [])


def test_another_tokenizer_of_the_same_name(tmp_path: Path) -> None:
    old, _ = made(write_tokenizer(tmp_path / "model", "SmolLM"), tmp_path / "cache")
    new, notes = made(write_tokenizer(tmp_path / "model", "plain"), tmp_path / "cache")
    assert new.key == old.key
    assert notes == []
    new, notes = made(write_tokenizer(tmp_path / "model", "GPT-2"), tmp_path / "cache")
    assert new.key != old.key
    assert notes == [f"a new store: {old.key} has the same text, with another tokenizer of that name"]


def test_what_is_judged(tmp_path: Path) -> None:
    tok = tokenizer(str(write_tokenizer(tmp_path / "model", "SmolLM")))
    former = identity(as_before(tmp_path / "model"))
    assert judge(tok, identity(tok)) == "same"
    assert judge(tok, former) == "other"
    assert judge(tok, {**former, "digest": "0" * 32}) == "unknown"
    assert judge(tokenizer("tiny"), former) == "unknown"
