"""Tokenizers of folders without a tokenizer.json: made by transformers, and believed where that can be checked.

A SentencePiece model is asked for the same pieces. A vocabulary with merges (vocab.json, merges.txt) says nothing of
how text is cut into words, so it is taken for GPT-2 alone.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from sae.cache.errors import SaeError
from sae.pipeline.tokenizers.foreign import foreign_bytes, foreign_json, said
from sae.pipeline.tokenizers.huggingface import CONFIG, TOKENIZER, TOKENIZER_CONFIG, Ends, plain

# Numbers, spaces, contractions, accents spelled in two ways, other scripts, code: where ways to cut text differ.
PROBES = (
    "In 1984 there were 3700 people and 1234567 cows; don't ask, WE'LL say 1,000.50!",
    "  two  spaces\tand tabs\n\n\nend ",
    "naïve café nai\u0308ve cafe\u0301 ﬁne ½ Å", "日本語のテキスト 🙂 مرحبا", "def f(x):\n    return x ** 2  # 42\n",
    "HelloWorld helloWORLD it's IT'S they'RE", "a" * 40 + " " * 20 + "0" * 20,
)  # fmt: skip


def converted(option: str, folder: Path) -> tuple[Backend, Ends]:
    """The backend transformers makes of a folder's other files. Raises SaeError where that cannot be relied on."""
    needs = f"it needs a {TOKENIZER}"
    config = foreign_json(folder / TOKENIZER_CONFIG, option) or {}
    model = foreign_json(folder / CONFIG, option) or {}
    if "auto_map" in config:
        raise SaeError(f"{option}: its tokenizer is Python code of its own, which is never run; {needs}")
    pieces = sorted(folder.glob("*.model"))
    names = ["vocab.json", "merges.txt", *(path.name for path in pieces)]
    there = [name for name in names if foreign_bytes(folder / name, option) is not None]
    if not there:
        raise SaeError(f"{option}: holds no tokenizer; {needs}")
    loaded = build(option, folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or len(backend.get_vocab(with_added_tokens=False)) < 2:
        raise SaeError(f"{option}: transformers makes no tokenizer of its {', '.join(there)}; {needs}")
    plain(backend)
    if pieces:
        _check_pieces(option, backend, pieces[0])
    else:
        _check_class(option, loaded, model)
    begin = loaded.bos_token_id if loaded.bos_token_id is not None else loaded.eos_token_id
    if begin is None:
        raise SaeError(f"{option}: has neither a bos nor an eos token to begin documents with; try another")
    return backend, Ends(int(begin), loaded.bos_token_id is not None, loaded.eos_token_id)


def build(option: str, folder: Path) -> Any:
    """Return the tokenizer that transformers makes of a folder, without its code and without the network."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of configurations that say nothing of a tokenizer
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder.absolute()), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a stranger's files make of it: KeyError, TypeError, a library's
        raise SaeError(
            f"{option}: no tokenizer that transformers can read ({said(error)}); it needs a {TOKENIZER}"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)


def _check_pieces(option: str, backend: Backend, model: Path) -> None:
    """Raise SaeError unless SentencePiece itself makes the same pieces of the probes."""
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in PROBES:
        wanted = [own.id_to_piece(i) for i in own.encode(text)]
        if backend.encode(text, add_special_tokens=False).tokens != wanted:
            raise SaeError(
                f"{option}: what transformers makes of its {model.name} cuts {text[:20]!r} otherwise than "
                f"SentencePiece does; it needs a {TOKENIZER}"
            )


def _check_class(option: str, loaded: Any, model: dict[str, Any]) -> None:
    """Raise SaeError unless it is GPT-2's own: others use its class with digits or lines cut in ways of their own."""
    if type(loaded).__name__ != "GPT2Tokenizer" or model.get("model_type") != "gpt2":
        raise SaeError(f"{option}: its files do not say how text is cut into words; it needs a {TOKENIZER}")
