"""Train the embedded byte-level BPE on the training documents of the `python` source.

    python scripts/train_tiny_bpe.py [--vocab 4096] [--out pipeline/embedded]

Writes `bpe.tiktoken` (tiktoken's format: base64 of the token's bytes, a space, its rank) and the same tokenizer for
transformers as `model/tokenizer.json` and `model/tokenizer_config.json`. Deterministic: the same text gives the same
bytes. The last id is `<|endoftext|>`, as in GPT-2; ids below it are the 256 bytes and then the merges in the order they
were learned, which is what makes id = rank = merge order, and both tokenizers the same function.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sae.pipeline.tokenize.sources import is_validation, text_source

END_OF_TEXT = "<|endoftext|>"
VALIDATION = 0.1  # the `tiny` preset's fraction


def train(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE with `vocab` entries in all, GPT-2's pattern, `<|endoftext|>` last."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab - 1, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    ids, merges = tok.get_vocab(), json.loads(tok.to_str())["model"]["merges"]
    assert ids[END_OF_TEXT] == vocab - 1 == len(ids) - 1, "the text is too small for this vocabulary"
    # Two merges that spell one token would make rank order and merge order differ: tiktoken could not say the same.
    assert len(merges) == vocab - 1 - 256, "a token was learned twice"
    return tok


def byte_of() -> dict[str, int]:
    """The character that stands for each byte in a byte-level BPE -> the byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=4096, help="entries, end-of-text included")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "pipeline" / "embedded")
    args = parser.parse_args()

    documents = list(text_source("python", offline=True).open())
    texts = [text for text in documents if not is_validation(text, VALIDATION)]
    tok = train(texts, args.vocab)

    table = byte_of()
    ranked = sorted((rank, token) for token, rank in tok.get_vocab().items() if token != END_OF_TEXT)
    lines = [base64.b64encode(bytes(table[c] for c in token)) + b" %d\n" % rank for rank, token in ranked]
    folder = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (args.out / "bpe.tiktoken").write_bytes(b"".join(lines))
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    held_out = [text for text in documents if is_validation(text, VALIDATION)]
    n = sum(len(e.ids) for e in tok.encode_batch(held_out))
    n_bytes = sum(len(text.encode()) for text in held_out)
    print(f"{len(texts)} documents, {args.vocab} entries, {n_bytes / n:.3f} bytes a held-out token")


if __name__ == "__main__":
    main()
