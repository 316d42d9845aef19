"""Tokenizer folders of the families people use, each trained on a few lines, as Hugging Face would save them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers as pre

# What separates tokenizers: numbers, spaces, contractions, accents in two spellings, other scripts, code, specials.
TEXTS = [
    "", " ", "a", "In 1984 there were 3700 people and 1234567 cows; don't ask, WE'LL say 1,000.50!",
    "  two  spaces\tand\ttabs\n\n\nnew lines \r\n",
    "naïve café nai\u0308ve cafe\u0301 ﬁne ½ Å", "日本語のテキスト 🙂🙃 مرحبا",
    "def f(x):\n    return x ** 2  # 42\n", "HelloWorld helloWORLD it's IT'S they'RE", "<s>x</s><|endoftext|> y<unk>",
    "a" * 60 + " " * 40 + "0" * 20, "\u200b\x00\x7f\ufffd \u2028 end ",
]  # fmt: skip
CORPUS = [
    *TEXTS,
    "The year 1999 had 365 days; a dog and a cat went out to play in the garden, didn't they?",
    "numbers 10 20 300 4000 and words, words, words; we'll see what they've done by 2024",
] * 4
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def _byte_level(*before: Any, regex: bool = True, prefix: bool = False, normalizer: Any = None) -> Backend:
    """A byte-level BPE whose pieces are cut by `before`, too."""
    made = Backend(models.BPE())
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=480, special_tokens=["<|endoftext|>", "<s>"], show_progress=False,
            initial_alphabet=pre.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    made.pre_tokenizer = pre.Sequence([*before, pre.ByteLevel(add_prefix_space=prefix, use_regex=regex)])
    if not before:
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def _split(pattern: str, behavior: str = "isolated") -> Any:
    return pre.Split(Regex(pattern), behavior=behavior)


def _pieces(form: str) -> Backend:
    """A SentencePiece-like BPE with bytes to fall back on, as Llama 2 ("legacy"), Mistral ("metaspace") or Gemma."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre.Split("▁", "merged_with_next")
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=560, special_tokens=[*special, *alphabet], show_progress=False)
    )
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    made = Backend.from_str(json.dumps(state))
    if form == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = None
    elif form == "metaspace":
        made.normalizer = None
        made.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def _unigram() -> Backend:
    made = Backend(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre.Metaspace()
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return made


def _word_piece() -> Backend:
    made = Backend(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(
            vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
        ),
    )
    return made


def _added() -> Backend:
    """Added tokens that text may hold, one of which swallows the space before it."""
    made = _byte_level()
    made.add_tokens([AddedToken("café", normalized=False), AddedToken("cow", lstrip=True, single_word=True)])
    made.add_special_tokens(["<|pad|>"])
    return made


def _cut() -> Backend:
    """With a length and a padding stored in the file."""
    made = _byte_level()
    made.enable_truncation(5)
    made.enable_padding(length=64)
    return made


BACKENDS: dict[str, Callable[[], Backend]] = {
    "gpt2": _byte_level,
    "digits": lambda: _byte_level(pre.Digits(individual_digits=True)),
    "digits in threes": lambda: _byte_level(_split(r"\p{N}{1,3}"), _split(GPT2, "removed"), regex=False),
    "prefix space": lambda: _byte_level(prefix=True),
    "llama3": lambda: _byte_level(_split(LLAMA3), regex=False),
    "qwen2": lambda: _byte_level(_split(QWEN2), regex=False, normalizer=normalizers.NFC()),
    "no regex": lambda: _byte_level(regex=False),
    "nfc": lambda: _byte_level(normalizer=normalizers.NFC()),
    "punctuation": lambda: _byte_level(pre.Punctuation(), pre.Digits(individual_digits=True)),
    "llama2": lambda: _pieces("legacy"),
    "mistral": lambda: _pieces("metaspace"),
    "gemma": lambda: _pieces("gemma"),
    "unigram": _unigram,
    "wordpiece": _word_piece,
    "added": _added,
    "cut": _cut,
}
ENDS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
SENTENCE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# kind -> backend, class in tokenizer_config.json, model type in config.json, special tokens, id of the begin token
KINDS: dict[str, tuple[str, str | None, str | None, dict[str, Any], int]] = {
    "GPT-2": ("gpt2", "GPT2Tokenizer", "gpt2", ENDS, 0),
    "GPT-2 alone": ("gpt2", "GPT2TokenizerFast", None, ENDS, 0),
    "GPT-2 from an old hub folder": ("gpt2", None, "gpt2", {}, 0),
    "SmolLM": ("digits", "GPT2Tokenizer", "llama", ENDS, 0),
    "SmolLM alone": ("digits", "GPT2TokenizerFast", None, ENDS, 0),
    "StarCoder2": ("digits", "GPT2Tokenizer", "starcoder2", ENDS, 0),
    "digits in threes": ("digits in threes", "GPT2Tokenizer", "gpt2", ENDS, 0),
    "Pythia": ("nfc", "GPTNeoXTokenizer", "gpt_neox", ENDS, 0),
    "OLMo": ("nfc", "GPTNeoXTokenizerFast", "olmo", ENDS, 0),
    "GPT-NeoX, digits": ("digits", "GPTNeoXTokenizer", None, ENDS, 0),
    "Qwen2": ("qwen2", "Qwen2Tokenizer", "qwen2", {**ENDS, "bos_token": None}, 0),
    "Qwen2 that is GPT-2": ("gpt2", "Qwen2TokenizerFast", "qwen2", {**ENDS, "bos_token": None}, 0),
    "Qwen2 alone": ("llama3", "Qwen2Tokenizer", None, ENDS, 0),
    "Llama 3": ("llama3", "PreTrainedTokenizerFast", "llama", ENDS, 0),
    "Llama 3 as Llama": ("llama3", "LlamaTokenizerFast", "llama", ENDS, 0),
    "Llama 2": ("llama2", "LlamaTokenizer", "llama", SENTENCE, 1),
    "Llama 2, fast": ("llama2", "LlamaTokenizerFast", None, SENTENCE, 1),
    "Code Llama": ("llama2", "CodeLlamaTokenizer", "llama", SENTENCE, 1),
    "Mistral": ("mistral", "LlamaTokenizer", "mistral", SENTENCE, 1),
    "Gemma": ("gemma", "GemmaTokenizer", "gemma", SENTENCE, 1),
    "Gemma, fast": ("gemma", "GemmaTokenizerFast", None, SENTENCE, 1),
    "BLOOM": ("no regex", "BloomTokenizerFast", "bloom", SENTENCE | {"eos_token": "<|endoftext|>"}, 1),
    "Cohere": ("punctuation", "CohereTokenizerFast", "cohere", ENDS, 0),
    "prefix space": ("prefix space", "GPT2Tokenizer", "gpt2", ENDS, 0),
    "T5": ("unigram", "T5Tokenizer", "t5", {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}, 1),
    "XLNet": ("unigram", "XLNetTokenizer", "xlnet", {"bos_token": "</s>", "unk_token": "<unk>"}, 1),
    "BERT": ("wordpiece", "BertTokenizer", "bert", {"cls_token": "[CLS]", "unk_token": "[UNK]"}, 2),
    "plain": ("digits", "PreTrainedTokenizerFast", None, ENDS, 0),
    "tokens as objects": (
        "digits", "PreTrainedTokenizerFast", "llama", {"bos_token": {"content": "<s>", "__type": "AddedToken"}}, 1,
    ),
    "no class": ("digits", None, "llama", ENDS, 0),
    "a class nobody knows": ("digits", "NewTokenizer", "new", ENDS, 0),
    "a length in the file": ("cut", "GPT2Tokenizer", "gpt2", ENDS, 0),
    "tokens added": ("added", "GPT2Tokenizer", "gpt2", ENDS, 0),
}  # fmt: skip


@cache
def saved(backend: str) -> str:
    """A backend's tokenizer.json."""
    return BACKENDS[backend]().to_str()


def write_tokenizer(folder: Path, kind: str) -> Path:
    """Make the folder of one of KINDS."""
    backend, class_name, model_type, special, _ = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(saved(backend), encoding="utf-8")
    named = {} if class_name is None else {"tokenizer_class": class_name}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **special}))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
