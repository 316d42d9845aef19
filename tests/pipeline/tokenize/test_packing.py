"""Documents -> contexts: nothing lost, nothing doubled, and the same bytes however often it was interrupted."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_stores import few, files, shrunk, some

from sae.cache import activations
from sae.cache.errors import SaeError
from sae.cache.store.manifest import Windows
from sae.cache.tokens import TokenStore
from sae.pipeline.language_model.token_mask import TokenMask, TokenRows
from sae.pipeline.runtime.progress import Silent
from sae.pipeline.tokenize import encoding, stage
from sae.pipeline.tokenize.packing import DocumentPosition, Packer
from sae.pipeline.tokenize.sources import Unreachable
from sae.pipeline.tokenize.sources.base import Indexed
from sae.pipeline.tokenize.stage import TokenizeConfig, tokenize
from sae.pipeline.tokenizers.layout import Layout

BEGIN, SEPARATOR = 0, 1
documents_st = st.lists(st.integers(0, 40), max_size=30)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with shrunk() as patch:
        patch.setattr(activations, "WINDOWS", Windows(1, 1))  # so that every row is kept, and counted
        patch.setattr(stage, "BLOCK_DOCUMENTS", 7)
        patch.setattr(encoding, "PIECE_CHARACTERS", 50)
        yield


# --- the packer -------------------------------------------------------------------------------------------------------


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Documents of these lengths whose tokens are all different."""
    ends = np.cumsum([SEPARATOR + 1, *lengths])
    return [np.arange(start, end, dtype=np.uint32) for start, end in pairwise(ends)]


def place_of(document: int, token: int = 0) -> DocumentPosition:
    return DocumentPosition(None, 0, document, token, document)


@st.composite
def layouts(draw: Any) -> Layout:
    """Every combination of rules that a user may ask for."""
    packing, begin = (
        draw(st.sampled_from(["concat", "document"])),
        draw(st.sampled_from(["context", "document", "none"])),
    )
    between = [None] if packing == "document" else [None, SEPARATOR, *([BEGIN] if begin != "document" else [])]
    least = draw(st.sampled_from([0, 0, 1, 2, 9]))
    return Layout(draw(st.integers(2, 12)), packing, BEGIN, begin, draw(st.sampled_from(between)), least)


def packed_whole(documents: list[np.ndarray], layout: Layout) -> list[tuple[list[int], list[int], int]]:
    """Every context by the definition, token by token: (tokens, documents, length)."""
    first = [BEGIN] if layout.begin == "context" else []
    contexts, held, owners = [], [*first], []

    def close(number: int) -> None:
        length, missing = len(held), layout.context - len(held)
        owner = [owners[0]] * len(first) + owners + [number] * missing
        if length > 1:
            contexts.append((held + [BEGIN] * missing, owner, length))
        held[:], owners[:] = first, []

    for number, document in enumerate(documents):
        lead = [] if layout.separator is None or not owners else [layout.separator]
        for token in [*lead, *([BEGIN] if layout.begin == "document" else []), *document.tolist()]:
            held.append(token)
            owners.append(number)
            if len(held) == layout.context:
                close(number)
        if layout.packing == "document" and owners:
            close(number)
    return contexts


def as_contexts(arrays: dict[str, np.ndarray]) -> list[tuple[list[int], list[int], int]]:
    tokens, document, length = arrays["tokens"], arrays["document"], arrays["length"]
    return [(tokens[i].tolist(), document[i].tolist(), int(length[i])) for i in range(len(tokens))]


@some
@given(documents_st, layouts(), st.data())
def test_any_way_of_taking_gives_the_same(lengths: list[int], layout: Layout, data: Any) -> None:
    """Documents arrive one by one and contexts leave in pieces of any size; all agree with the definition."""
    documents = [document for document in documents_of(lengths) if layout.keeps(document)]
    expected = packed_whole(documents, layout)
    packer = Packer(layout)
    found = []
    for number, document in enumerate(documents):
        packer.add(layout.document(document), place_of(number))
        if packer.contexts and data.draw(st.booleans()):
            found += as_contexts(packer.take(data.draw(st.integers(1, packer.contexts)))[0])
    assert packer.contexts == len(expected) - len(found)
    if packer.contexts:
        found += as_contexts(packer.take(packer.contexts)[0])
    assert found == expected
    assert packer.contexts == 0


@some
@given(documents_st, layouts(), st.data())
def test_the_place_after_a_window_continues_it(lengths: list[int], layout: Layout, data: Any) -> None:
    """A packer that begins at the place another one gave makes the rest."""
    documents = [document for document in documents_of(lengths) if layout.keeps(document)]
    expected = packed_whole(documents, layout)
    if not expected:
        return
    packer = Packer(layout)
    for number, document in enumerate(documents):
        packer.add(layout.document(document), place_of(number))
    taken = data.draw(st.integers(1, len(expected)))
    found, place = packer.take(taken)
    assert as_contexts(found) == expected[:taken]
    resumed = Packer(layout)
    resumed.add(layout.document(documents[place.document])[place.token :], place)
    for number in range(place.document + 1, len(documents)):
        resumed.add(layout.document(documents[number]), place_of(number))
    assert resumed.contexts == len(expected) - taken
    if resumed.contexts:
        assert as_contexts(resumed.take(resumed.contexts)[0]) == expected[taken:]


# --- the stage --------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character, without a pool."""

    slug, n_vocab, begin, has_begin, end = "letters", 128, BEGIN, True, 3

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("ascii"), np.uint8).astype(np.uint32) for text in texts]

    def vocabulary(self) -> list[bytes]:
        return [bytes([i]) for i in range(128)]

    def recipe(self) -> dict[str, Any]:
        return {"name": "letters"}


class Texts:
    """A source of given texts that counts how often it was read."""

    slug = "texts"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def recipe(self) -> dict[str, Any]:
        return {"source": "texts"}

    def open(self, state: dict[str, Any] | None = None) -> Indexed:
        return Indexed(self.texts, state)


def texts_of(n: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [
        "".join(random.choice(list("abcdefgh "), int(random.integers(0, 60)))) + f"{number:04d}" for number in range(n)
    ]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made = texts_of(200)
    monkeypatch.setattr(stage, "text_source", lambda *_, **__: Texts(made))
    monkeypatch.setattr(stage, "tokenizer", lambda *_, **__: Letters())
    return made


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def config(**settings: Any) -> TokenizeConfig:
    defaults = {"context": 8, "tokens": "all", "validation_tokens": "all", "validation": 0.2, "begin": "document"}
    return TokenizeConfig(**{**defaults, **settings})


def documents_in(store: TokenStore) -> list[str]:
    """Texts of a store from its tokens, document numbers and lengths; the last one may be cut off by the end."""
    tokens, owner = store.contexts(0, store.n_contexts), store.document_ids(0, store.n_contexts)
    real = np.arange(store.context_length) < store.lengths(0, store.n_contexts)[:, None]
    tokens, owner = tokens[real], owner[real]
    assert sorted(owner.tolist()) == owner.tolist()
    found = []
    for number in range(int(owner[-1]) + 1):
        ids = tokens[owner == number]
        assert ids[0] == BEGIN
        assert BEGIN not in ids[1:]
        found.append(bytes(ids[1:].astype(np.uint8)).decode("ascii"))
    return found


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_every_document_is_in_one_split(tmp_path: Path, texts: list[str], packing: str) -> None:
    stores = tokenize(config(packing=packing), tmp_path, Silent()).stores
    found = {split: documents_in(store) for split, store in stores.items()}
    assert len(found["validation"]) > 20
    if packing == "document":
        # a last token by itself, in a context of its own, is left out
        whole = {text if len(text) % 8 else text[:-1] for text in texts}
        assert sorted(found["train"] + found["validation"]) == sorted(whole)
    else:
        for documents in found.values():
            assert set(documents[:-1]) <= set(texts)
            assert any(text.startswith(documents[-1]) for text in texts)
        assert len(texts) - 2 <= len(found["train"] + found["validation"]) <= len(texts)
    assert not set(found["train"][:-1]) & set(found["validation"][:-1])
    assert found["train"] != [text for text in texts if text in found["train"]]  # shuffled
    assert all(store.closed for store in stores.values())


RULES: list[dict[str, Any]] = [
    {},
    {"packing": "document"},
    {"begin": "context"},
    {"begin": "context", "separator": "eos", "min_tokens": 12},
    {"begin": "context", "packing": "document", "min_tokens": 5},
    {"begin": "none", "separator": "begin"},
    {"begin": "document", "separator": "eos", "min_tokens": 20},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_resuming_at_every_window_gives_the_same_bytes(tmp_path: Path, texts: list[str], rules: dict[str, Any]) -> None:
    whole = tokenize(config(**rules), tmp_path / "whole", Silent()).stores["train"]
    assert len(whole.manifest.windows) > 4
    for window in whole.manifest.windows:
        rows = TokenRows(whole, TokenMask()).count(activations.WINDOWS, window.stop).within
        stores = tokenize(config(**rules, tokens=rows), tmp_path / "parts", Silent()).stores
        assert stores["train"].n_contexts == window.stop
    stores = tokenize(config(**rules), tmp_path / "parts", Silent()).stores
    assert files(stores["train"].path) == files(whole.path)
    before = files(whole.path)
    assert tokenize(config(**rules), tmp_path / "whole", Silent()).stores["train"].n_contexts == whole.n_contexts
    assert files(whole.path) == before


@pytest.mark.parametrize("rules", RULES[1:4], ids=str)
def test_killed_between_windows(
    tmp_path: Path, texts: list[str], rules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a commit, the last one among them: the next call ends with the same bytes, closed."""
    whole = tokenize(config(**rules), tmp_path / "whole", Silent()).stores["train"]
    append = stage.TokenWriter.append
    for last in (0, 3, len(whole.manifest.windows) - 1):
        root = tmp_path / str(last)

        def append_or_die(self: Any, arrays: Any, notes: Any, last: int = last) -> Any:
            window = append(self, arrays, notes)
            if window.index == last:
                raise KeyboardInterrupt
            return window

        with monkeypatch.context() as patch:
            patch.setattr(stage.TokenWriter, "append", append_or_die)
            with pytest.raises(KeyboardInterrupt):
                tokenize(config(**rules), root, Silent())
        assert files(tokenize(config(**rules), root, Silent()).stores["train"].path) == files(whole.path)


@few
@given(st.integers(1, 3000), st.integers(2, 40))
def test_what_is_asked_for_is_rounded_up(tmp_path_factory: Any, tokens: int, context: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "text_source", lambda *_, **__: Texts(texts_of(120)))
        patch.setattr(stage, "tokenizer", lambda *_, **__: Letters())
        settings = config(tokens=tokens, context=context, validation=0)
        store = tokenize(settings, tmp_path_factory.mktemp("asked"), Silent()).stores["train"]
    available = (sum(map(len, texts_of(120))) + 120) // context
    rows = TokenRows(store, TokenMask()).count(activations.WINDOWS, available).rows
    assert store.complete
    if store.closed:
        assert store.n_contexts == available
    else:
        assert store.n_tokens >= tokens and rows >= tokens
        assert store.n_contexts == store.windows.round_up(store.n_contexts) <= available


def test_documents_are_shuffled_by_bits_that_stay(tmp_path: Path, texts: list[str]) -> None:
    """Blocks of seven documents, each in the order of raw PCG64 outputs seeded by the shuffle and the block."""
    found = documents_in(tokenize(config(validation=0, seed=5), tmp_path, Silent()).stores["train"])
    expected = []
    for block in range(0, len(texts), 7):
        bits = np.random.PCG64([5, block // 7]).random_raw(len(texts[block : block + 7]))
        expected += [texts[block + i] for i in sorted(range(len(bits)), key=lambda i: bits[i])]
    assert found[:-1] == expected[: len(found) - 1]
    assert np.random.PCG64([5, 1]).random_raw(2).tolist() == [14281546376153053393, 8683300866460616067]


def test_a_larger_validation_share_is_another_store(tmp_path: Path, texts: list[str]) -> None:
    keys = [tokenize(config(**{"tokens": 8, **one}), tmp_path, Silent()).stores["train"].key for one in (
        {"tokens": 16}, {"validation": 0.3}, {"seed": 1}, {"packing": "document"}, {"context": 9},
    )]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert tokenize(config(tokens=8), tmp_path, Silent()).stores["train"].key == keys[0]  # how many is no identity


def test_no_validation_at_all(tmp_path: Path, texts: list[str]) -> None:
    stores = tokenize(config(validation=0), tmp_path, Silent()).stores
    assert list(stores) == ["train"]
    assert len(documents_in(stores["train"])) >= len(texts) - 1


def test_too_little_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "tokenizer", lambda *_, **__: Letters())
    monkeypatch.setattr(stage, "text_source", lambda *_, **__: Texts(["abc"]))
    with pytest.raises(SaeError, match="holds less than one context of 8 tokens; try a smaller `context`"):
        tokenize(config(validation=0), tmp_path, Silent())
    monkeypatch.setattr(stage, "text_source", lambda *_, **__: Texts(["abcdefghijklmn"]))
    assert list(tokenize(config(validation=1e-9), tmp_path, notes := Notes()).stores) == ["train"]
    assert "no validation store: the documents of `source = fineweb` that fell to it (1e-09 of all)" in notes.lines[-1]
    assert len(list((tmp_path / "tokens").glob("*"))) == 1  # nor the beginning of one


def test_the_vocabulary_is_kept(tmp_path: Path, texts: list[str]) -> None:
    assert tokenize(config(), tmp_path, Silent()).stores["train"].vocabulary() == Letters().vocabulary()


def test_documents_are_numbered_in_store_order(tmp_path: Path, texts: list[str]) -> None:
    store = tokenize(config(), tmp_path, Silent()).stores["train"]
    owner = store.document_ids(0, store.n_contexts).flatten().tolist()
    assert {after - before for before, after in pairwise(owner)} == {0, 1}
    assert owner[0] == 0


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded tokenizer in this process and in two others."""
    monkeypatch.setattr(stage, "text_source", lambda *_, **__: Texts(texts_of(300)))
    monkeypatch.setattr(stage, "ALONE_CHARACTERS", 0)
    settings = config(tokenizer="tiny")
    alone = tokenize(settings, tmp_path / "one", Silent(), workers=1).stores
    together = tokenize(settings, tmp_path / "two", Silent(), workers=2).stores
    for split, store in alone.items():
        assert files(together[split].path) == files(store.path)


# --- what begins with the begin token, and what stands between -------------------------------------------------------


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_stage_lays_documents_as_the_definition_says(
    tmp_path: Path, texts: list[str], rules: dict[str, Any]
) -> None:
    settings = config(validation=0, **rules)
    store = tokenize(settings, tmp_path, Silent()).stores["train"]
    laid = settings.layout(Letters())
    (order,) = [[i for block in range(0, len(texts), 7) for i in _shuffled(block, texts)]]
    ids = [ids for ids in Letters().encode_batch([texts[i] for i in order]) if len(ids) >= laid.min_tokens]
    found = {
        "tokens": store.contexts(0, store.n_contexts), "document": store.document_ids(0, store.n_contexts),
        "length": store.lengths(0, store.n_contexts),
    }  # fmt: skip
    assert as_contexts(found) == packed_whole(ids, laid)
    begins = found["tokens"][:, 0] == BEGIN
    assert begins.all() if laid.begin == "context" else not begins.all()


def _shuffled(block: int, texts: list[str]) -> list[int]:
    bits = np.random.PCG64([0, block // 7]).random_raw(len(texts[block : block + 7]))
    return [block + i for i in sorted(range(len(bits)), key=lambda i: bits[i])]


def test_rules_of_before_keep_their_recipe(texts: list[str]) -> None:
    """Documents that begin with the begin token, and nothing else, is what recipes of 0.1 say without saying it."""
    keys = {"source", "tokenizer", "context_length", "packing", "shuffle", "validation", "split"}

    def added(**settings: Any) -> dict[str, Any]:
        recipe = stage.token_recipe(config(**settings), Texts(texts), Letters(), "train")
        assert keys <= set(recipe)
        return {key: value for key, value in recipe.items() if key not in keys}

    assert added(begin="document") == added(begin="document", separator=None) == added(separator="none") == {}
    assert added(begin=None) == added(begin="context") == {"begin": "context", "separator": BEGIN}
    assert added(begin="context", packing="document") == {"begin": "context"}
    assert added(begin="context", separator="eos") == added(begin="context", separator=3) == {
        "begin": "context", "separator": 3,
    }  # fmt: skip
    assert added(begin="context", separator="a")["separator"] == ord("a")
    assert added(begin="none") == {"begin": "none"}
    assert added(min_tokens=4) == {"min_tokens": 4}


def test_without_a_begin_token_documents_begin_as_before(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "has_begin", False)
    assert config(begin=None).layout(Letters()) == Layout(8, "concat", BEGIN)
    assert config(begin="context").layout(Letters()).begin == "context"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"separator": "<|nothing|>"}, "tokenize.separator = '<|nothing|>': in letters not a token of its own; try"),
        ({"separator": 128}, "tokenize.separator = 128: letters has tokens 0 to 127"),
        ({"separator": "begin"}, "is the begin token, and with tokenize.begin = document each document begins with it"),
        ({"separator": "eos", "packing": "document"}, "with `packing = document` no context holds two documents"),
    ],
)
def test_separators_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SaeError, match=re.escape(message)):
        config(**settings).layout(Letters())


def test_no_separator_without_an_end_or_with_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Letters, "end", None)
    with pytest.raises(
        SaeError, match=r"tokenize\.separator = eos: letters has no such token; try begin, or a token's"
    ):
        config(separator="eos").layout(Letters())
    monkeypatch.setattr(Letters, "vocabulary", lambda self: [b"a", b"a"])
    with pytest.raises(SaeError, match="the text of tokens 0, 1; give the id"):
        config(separator="a").layout(Letters())


def test_a_new_default_says_where_the_old_tokens_are(tmp_path: Path, texts: list[str]) -> None:
    old = tokenize(config(), tmp_path, Silent()).stores["train"]
    new = tokenize(config(begin=None), tmp_path, notes := Notes()).stores["train"]
    assert new.key != old.key
    said = [line for line in notes.lines if "`tokenize.begin = document` continues that one" in line]
    assert len(said) == 1 and old.key in said[0]
    tokenize(config(begin=None), tmp_path, notes := Notes())
    tokenize(config(begin="context", seed=1), tmp_path, notes)
    tokenize(config(begin=None, seed=2), tmp_path, notes)
    assert not [line for line in notes.lines if "continues" in line]


def test_documents_too_short_leave_too_little(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(SaeError, match="holds less than one context of 8 tokens in documents of at least 900; try a"):
        tokenize(config(min_tokens=900), tmp_path, Silent())


# --- a source that moves ----------------------------------------------------------------------------------------------


class Moved(Texts):
    """A source of which the hub says today that it is `commit`, or nothing at all."""

    def __init__(self, texts: list[str], commit: str | None, slug: str = "texts") -> None:
        super().__init__(texts)
        self.commit, self.slug = commit, slug

    def recipe(self) -> dict[str, Any]:
        if self.commit is None:
            raise Unreachable("source = texts: no hub")
        return {"source": "moved", "revision": self.commit}

    def __str__(self) -> str:
        return f"texts@{self.commit}"

    def earlier(self, recipe: dict[str, Any]) -> "Moved | None":
        return Moved(self.texts, recipe["revision"]) if recipe["source"] == "moved" else None

    def open(self, state: dict[str, Any] | None = None) -> Indexed:
        if self.commit == "unreadable":
            raise SaeError("source = texts: cannot be opened")
        return super().open(state)


def test_text_that_has_moved_and_text_that_cannot_be_asked_for(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(commit: str | None, slug: str = "texts", **settings: Any) -> tuple[str, str]:
        monkeypatch.setattr(stage, "text_source", lambda *_, **__: Moved(texts, commit, slug))
        stores = tokenize(config(**{"tokens": 100, "validation": 0, **settings}), tmp_path, notes := Notes()).stores
        return stores["train"].key, "\n".join(line for line in notes.lines if re.match("a new store: |source = ", line))

    with pytest.raises(Unreachable, match="no hub"):
        run(None)
    first, said = run("a")
    assert said == ""
    assert run("a", "another") == (first, "")  # the same text by another name
    assert run(None) == (first, f"source = texts: no hub; going on with the text that {first} is of")
    second, said = run("b")
    assert second != first
    assert said.startswith("a new store: the text has changed since " + first)
    assert said.endswith("tokens) was made; `source = texts@a` continues that one")
    assert run("b") == (second, "")
    run("b", tokens="all")
    assert run(None, tokens="all")[0] == second  # which has more
    with pytest.raises(Unreachable, match="no hub"):
        run(None, seed=9)
