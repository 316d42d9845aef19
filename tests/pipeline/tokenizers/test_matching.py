"""Tokens of another tokenizer than the model's are told by content, whatever the sizes of the vocabularies."""

import json
import shutil
from pathlib import Path

import pytest
from support.harvesting import harvest
from support.small_hub import hub
from support.small_tokenizers import CORPUS, write_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from sae.cache.errors import SaeError
from sae.cache.tokens import TokenStore
from sae.pipeline import embedded
from sae.pipeline.harvest.sources.language_model import HarvestConfig
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize
from sae.pipeline.tokenizers.matching import GPT2_DIGEST, difference, matches, model_tokenizer
from sae.pipeline.tokenizers.tokenizer import tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    texts = [text for text in CORPUS if text.strip() and "<s>" not in text] * 2
    path.write_text("\n".join(json.dumps({"text": f"{i} {text}"}) for i, text in enumerate(texts)))
    return path


def tokens(source: Path, folder: str | Path, root: Path, **settings: object) -> TokenStore:
    config = TokenizeConfig.model_validate(
        {"source": str(source), "tokenizer": str(folder), "context": 32, "tokens": "all", "validation": 0, **settings}
    )
    return tokenize(config, root, Silent(), offline=True).stores["train"]


@pytest.mark.parametrize(
    "kind", ["SmolLM", "Qwen2", "Llama 3", "Llama 2", "Mistral", "Gemma", "prefix space", "T5", "BERT", "tokens added"]
)
@pytest.mark.parametrize("layout", [{}, {"packing": "document"}, {"begin": "none", "separator": "none"}])
def test_the_models_own_tokens_match(tmp_path: Path, source: Path, kind: str, layout: dict[str, str]) -> None:
    """By their digest, and where that is another (as between libraries) by bytes and by encoding again."""
    store = tokens(source, write_tokenizer(tmp_path / "model", kind), tmp_path / "cache", **layout)
    assert matches(store, str(tmp_path / "model"), offline=True)
    whole = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    last = max(tokenizer(str(tmp_path / "model")).n_vocab, 0)
    whole["added_tokens"].append({"id": last, "content": "<|more|>", **added})
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(whole))
    own = model_tokenizer(str(tmp_path / "model"))
    assert own is not None
    assert own.recipe()["digest"] != store.recipe["tokenizer"]["digest"]
    assert difference(store, own) is None


@pytest.mark.parametrize(
    ("of_tokens", "of_model"),
    [
        ("SmolLM", "GPT-2"), ("GPT-2", "SmolLM"), ("GPT-2", "prefix space"), ("Llama 3", "GPT-2"), ("SmolLM", "Cohere"),
        ("Gemma", "Llama 2"), ("GPT-2", "Pythia"), ("GPT-2", "tokens added"),
    ],
)  # fmt: skip
def test_text_cut_otherwise_is_noticed_with_one_vocabulary(
    tmp_path: Path, source: Path, of_tokens: str, of_model: str
) -> None:
    store = tokens(source, write_tokenizer(tmp_path / "one", of_tokens), tmp_path / "cache")
    write_tokenizer(tmp_path / "model", of_model)
    with pytest.raises(SaeError, match=r"(the same vocabulary, but|token \d+ is)") as caught:
        matches(store, str(tmp_path / "model"), offline=True)
    message = str(caught.value)
    assert message.isprintable()
    assert all(part in message for part in (store.key, "(one)", f"tokenizer = {tmp_path / 'model'}", "unchecked"))


def test_one_document_longer_than_the_sample(tmp_path: Path) -> None:
    source = tmp_path / "long.txt"
    source.write_text(" ".join(f"In {year} there were {year * 37} people." for year in range(2000)))
    store = tokens(source, write_tokenizer(tmp_path / "one", "SmolLM"), tmp_path / "cache")
    same, other = (model_tokenizer(str(write_tokenizer(tmp_path / kind, kind))) for kind in ("tokens added", "GPT-2"))
    assert same is not None
    assert other is not None
    assert difference(store, other) is not None
    digits = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    digits["model"]["continuing_subword_prefix"] = ""
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(digits))
    own = model_tokenizer(str(tmp_path / "one"))
    assert own is not None
    assert own.recipe()["digest"] != store.recipe["tokenizer"]["digest"]
    assert difference(store, own) is None


def test_other_words_under_the_same_ids(tmp_path: Path, source: Path) -> None:
    store = tokens(source, write_tokenizer(tmp_path / "one", "Mistral"), tmp_path / "cache")
    write_tokenizer(tmp_path / "model", "T5")
    with pytest.raises(SaeError, match=r"token 0 is '<unk>' in the store and '<pad>' there"):
        matches(store, str(tmp_path / "model"), offline=True)


def test_nobody_knows(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    store = tokens(source, write_tokenizer(tmp_path / "one", "SmolLM"), tmp_path / "cache")
    (tmp_path / "model").mkdir()
    shutil.copy(tmp_path / "one" / "config.json", tmp_path / "model")
    assert not matches(store, str(tmp_path / "model"), offline=True)
    assert not matches(store, "someone/something", offline=True)


def test_a_model_with_a_damaged_tokenizer_is_said(tmp_path: Path, source: Path) -> None:
    store = tokens(source, write_tokenizer(tmp_path / "one", "SmolLM"), tmp_path / "cache")
    (write_tokenizer(tmp_path / "model", "SmolLM") / "tokenizer.json").write_text("{")
    with pytest.raises(SaeError, match=r"model = .*: its tokenizer.json is not sound JSON"):
        matches(store, str(tmp_path / "model"), offline=True)


def test_random_weights_have_the_tokenizer_of_their_shape(tmp_path: Path, source: Path) -> None:
    store = tokens(source, write_tokenizer(tmp_path / "model", "SmolLM"), tmp_path / "cache")
    assert matches(store, f"random:{tmp_path / 'model'}", offline=True)
    write_tokenizer(tmp_path / "model", "GPT-2")
    with pytest.raises(SaeError, match="the same vocabulary"):
        matches(store, f"random:{tmp_path / 'model'}", offline=True)


def test_the_embedded_model_has_the_embedded_tokenizer(tmp_path: Path, source: Path) -> None:
    store = tokens(source, "tiny", tmp_path / "cache")
    assert matches(store, "tiny", offline=True)
    assert matches(store, str(embedded.MODEL), offline=True)
    with pytest.raises(SaeError, match="another tokenizer"):
        matches(store, str(write_tokenizer(tmp_path / "model", "SmolLM")), offline=True)


def test_a_model_of_the_hub_has_the_tokenizer_of_its_repository(tmp_path: Path, source: Path) -> None:
    store = tokens(source, write_tokenizer(tmp_path / "one", "SmolLM"), tmp_path / "cache")
    models = {f"someone/{kind}": write_tokenizer(tmp_path / kind, kind) for kind in ("SmolLM", "Pythia")}
    with hub(models, tmp_path / "hub") as there:
        assert matches(store, "someone/SmolLM")
        asked = len(there.asked)
        assert matches(store, "someone/SmolLM", offline=True)  # cached
        assert len(there.asked) == asked
        with pytest.raises(SaeError, match="tokenizer = hf:someone/Pythia"):
            matches(store, "someone/Pythia")


def test_gpt2_is_known_by_name(
    tmp_path: Path, source: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "gpt2_bpe" / "tiktoken_cache"))
    store = tokens(source, "gpt2", tmp_path / "cache")
    assert store.recipe["tokenizer"]["digest"] == GPT2_DIGEST
    assert all(matches(store, name, offline=True) for name in ("gpt2", "distilgpt2", "openai-community/gpt2-xl"))
    assert matches(store, str(shared_data / "gpt2_bpe" / "hf_tokenizer"), offline=True)
    for model in (write_tokenizer(tmp_path / "model", "Pythia"), shared_data / "models" / "stories260K" / "hf"):
        with pytest.raises(SaeError, match="another tokenizer"):
            matches(store, str(model), offline=True)
    other = tokens(source, write_tokenizer(tmp_path / "one", "SmolLM"), tmp_path / "cache")
    with pytest.raises(SaeError, match="tokenizer = gpt2"):
        matches(other, "gpt2-medium", offline=True)


class Notes(Silent):
    """What a stage says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_a_harvest_refuses_other_tokens_unless_told_to_take_them(tmp_path: Path, source: Path) -> None:
    """The sizes fit in every case: 480 ids and an embedding of 512."""
    model = write_tokenizer(tmp_path / "model", "SmolLM")
    small = GPT2Config(vocab_size=512, n_embd=8, n_layer=1, n_head=1, n_positions=32, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(small).save_pretrained(model)
    own = tokens(source, model, tmp_path / "cache")
    other = tokens(source, write_tokenizer(tmp_path / "other", "GPT-2"), tmp_path / "cache")

    def harvested(store: TokenStore, **settings: str) -> list[str]:
        config = HarvestConfig.model_validate({"model": str(model), "layer": [0], **settings})
        harvest(config, [store], tmp_path / "cache", notes := Notes(), offline=True)
        return [line for line in notes.lines if "only their sizes" in line]

    assert harvested(own) == []
    with pytest.raises(SaeError, match=r"harvest\.tokenizer = unchecked"):
        harvested(other)
    assert harvested(other, tokenizer="unchecked") == []
    (model / "tokenizer.json").unlink()
    assert len(harvested(other)) == 1
