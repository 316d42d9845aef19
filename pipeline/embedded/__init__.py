"""The small real tokenizer and language model in this repository, named `tiny`; README.md says how they were made."""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
MODEL = _FOLDER / "model"  # a GPT-2 with its tokenizer, as transformers loads it
BPE = _FOLDER / "bpe.tiktoken"  # the same tokenizer as tiktoken's ranks
NAME = "tiny"


def resolve(name: str) -> str:
    """The folder of the embedded model where `name` is "tiny"; any other name unchanged."""
    return str(MODEL) if name == NAME else name
