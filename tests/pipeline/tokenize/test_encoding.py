"""Documents -> tokens: what a tokenizer stumbles over, ids that are there already, and when processes are started."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from sae.cache.errors import SaeError
from sae.pipeline.tokenize import encoding
from sae.pipeline.tokenize.encoding import Block, Encoder, encoded
from sae.pipeline.tokenize.sources import Document
from sae.pipeline.tokenizers.huggingface import Ends, HuggingFaceTokenizer
from sae.pipeline.tokenizers.tokenizer import TiktokenTokenizer, Tokenizer, embedded_encoding, tokenizer


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return tokenizer("tiny", offline=True)


@pytest.mark.parametrize("blank", [" ", "\n", "\t \r\n"], ids=repr)
def test_a_million_blanks_are_encoded_as_a_thousand_are(blank: str) -> None:
    """tiktoken's own pattern gives up there. A short text takes both ways, and they agree."""
    tok = TiktokenTokenizer(embedded_encoding())

    class Fails:
        """The encoding, where the pattern always gives up."""

        def __getattr__(self, name: str) -> Any:
            return getattr(embedded_encoding(), name)

        def encode_to_numpy(self, *_: Any, **__: Any) -> Any:
            raise ValueError("Regex error while tokenizing")

    other = TiktokenTokenizer(embedded_encoding())
    other._encoding = Fails()  # type: ignore[assignment]
    for text in (f"def f(x):{blank * 999}return 1{blank * 3}", f"I'll{blank}2, don't \u00e9\u4e2d!?{blank * 7}x", ""):
        assert other.encode_batch([text])[0].tolist() == tok.encode_batch([text])[0].tolist()
    text = f"a{blank * (1_000_000 // len(blank))}b"
    (ids,) = tok.encode_batch([text])
    assert b"".join(tok.vocabulary()[i] for i in ids).decode() == text


def test_text_that_a_tokenizer_cannot_encode_is_shown(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok = HuggingFaceTokenizer(words, "words", Ends(begin=2, has_begin=False, end=2), tmp_path)
    assert [ids.tolist() for ids in encoded(tok, ["a b", "b"])] == [[0, 1], [1]]
    with pytest.raises(
        SaeError, match=r"tokenizer = words: cannot encode the text of 9 characters that begins 'c \\n odd"
    ) as caught:
        encoded(tok, ["a b", "c \n odd a", "b"])
    assert "\n" not in str(caught.value) and "UNK" in str(caught.value)


@pytest.mark.parametrize("kind", ["PanicException", "KeyboardInterrupt", "MemoryError"])
def test_a_panic_is_of_the_text_and_an_interrupt_is_not(tiny: Tokenizer, kind: str) -> None:
    raised = {"KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}.get(kind) or type(
        kind, (BaseException,), {}
    )

    class Panics:
        slug = "panics"

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            raise raised("index out of bounds")

    with pytest.raises(SaeError if kind == "PanicException" else raised, match="index out of bounds"):
        encoded(Panics(), ["a"])  # type: ignore[arg-type]


def test_ready_made_ids_are_checked_and_lose_their_begin_token(tiny: Tokenizer) -> None:
    ids = [np.array(one, np.uint32) for one in ([4095, 5, 4095], [7], [], [4095])]
    found = encoded(tiny, [ids[0], "text", ids[1], ids[2], ids[3]])
    assert [found[i].tolist() for i in (0, 2, 3, 4)] == [[5, 4095], [7], [], []]
    assert found[1].tolist() == tiny.encode_batch(["text"])[0].tolist()
    with pytest.raises(SaeError, match="tokenizer = tiny: has tokens 0 to 4095, and the ready-made ids hold 4096"):
        encoded(tiny, [np.array([1, 4096], np.uint32)])


@pytest.mark.parametrize(("characters", "started"), [(100, False), (1000, False), (1010, True)])
def test_processes_are_started_for_much_text_alone(
    tiny: Tokenizer, characters: int, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 10)
    asked: list[bool] = []
    encoder = Encoder("tiny", tiny, lambda: asked.append(True), alone=1000)
    documents: list[Document] = ["ab" * 5] * (2 + characters // 10)  # two are left out

    def blocks() -> Iterator[Block]:
        yield Block(None, 0, documents[:7])
        yield Block(None, 1, documents[7:])

    found = [(block.number, index, ids.tolist()) for block, index, ids in encoder.documents(blocks(), 2)]
    whole = [ids.tolist() for ids in tiny.encode_batch([str(one) for one in documents])]
    assert [ids for *_, ids in found] == whole[2:]
    assert [place for *place, _ in found] == [[0, i] for i in range(2, 7)] + [[1, i] for i in range(len(documents) - 7)]
    assert bool(asked) is started
